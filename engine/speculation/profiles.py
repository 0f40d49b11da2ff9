"""What drafts promised in recent steps, kept so that others can work out what they would gain at
another load or where steps cost something else.

The policy fills a `RecentDrafts`; the planner asks the engine thread for `DraftProfiles`.
"""

import statistics
from collections import deque
from collections.abc import Sequence as Row

import msgspec
import numpy as np

from engine.speculation.cost_curve import FloatArray
from engine.speculation.depth import ENOUGH_PROFILES

NUM_ROWS = 512  # of sequences in steps
NUM_TIMES = 64  # of each number of sequences


class DraftProfiles(msgspec.Struct, frozen=True, kw_only=True):
    """Survivals of recent drafts, and what deciding on them took."""

    # (S, K), a row for each sequence in a step, newest last: all 0 where nothing was found.
    free: FloatArray
    models: dict[str, FloatArray]  # (P, K) of full depth, for drafters with enough of them
    deciding_s: tuple[tuple[int, float], ...]  # (sequences, seconds of a step), no model's run


class RecentDrafts:
    """The last rows of free drafters, whatever was verified of them, and times of deciding."""

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        self._rows: deque[Row[float] | FloatArray] = deque(maxlen=NUM_ROWS)
        self._deciding_s: dict[int, deque[float]] = {}

    def add_rows(self, survivals: FloatArray) -> None:
        """Take in a row for each sequence that a step asked free drafters for."""
        self._rows.extend(survivals[-NUM_ROWS:])

    def add_row(self, survivals: list[float]) -> None:
        """Take in that of a single one, which may be shorter."""
        self._rows.append(survivals)

    def add_time(self, num_sequences: int, deciding_s: float) -> None:
        """Take in what a step's drafting took without the runs of models."""
        times = self._deciding_s.get(num_sequences)
        if times is None:
            times = self._deciding_s[num_sequences] = deque(maxlen=NUM_TIMES)
        times.append(deciding_s)

    def profiles(self, models: dict[str, FloatArray]) -> DraftProfiles:
        """What there is now, with the profiles of models that have enough."""
        free = np.zeros((len(self._rows), self._max_drafts))
        for row, survivals in zip(free, self._rows, strict=True):
            row[: len(survivals)] = survivals
        return DraftProfiles(
            free=free,
            models={name: rows for name, rows in models.items() if len(rows) >= ENOUGH_PROFILES},
            deciding_s=tuple(
                (count, statistics.median(times))
                for count, times in sorted(self._deciding_s.items())
            ),
        )
