"""What drafts promised in recent steps, kept so that others can work out what they would gain at
another load or where steps cost something else.

The policy fills a `RecentDrafts`; the planner asks the engine thread for `DraftProfiles`.
"""

import statistics
from collections import deque

import msgspec
import numpy as np

from engine.speculation.cost_curve import FloatArray
from engine.speculation.depth import NUM_PROFILES

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
        self._rows = np.zeros((NUM_ROWS, max_drafts))
        self._num_rows = 0
        self._deciding_s: dict[int, deque[float]] = {}

    def add_rows(self, survivals: FloatArray) -> None:
        """Take in a row for each sequence that a step asked free drafters for."""
        survivals = survivals[-NUM_ROWS:]
        at = (self._num_rows + np.arange(len(survivals))) % NUM_ROWS
        self._rows[at] = survivals
        self._num_rows += len(survivals)

    def add_time(self, num_sequences: int, deciding_s: float) -> None:
        """Take in what a step's drafting took without the runs of models."""
        times = self._deciding_s.get(num_sequences)
        if times is None:
            times = self._deciding_s[num_sequences] = deque(maxlen=NUM_TIMES)
        times.append(deciding_s)

    def profiles(self, models: dict[str, FloatArray]) -> DraftProfiles:
        """What there is now, with the profiles of models that have enough."""
        num_rows = min(self._num_rows, NUM_ROWS)
        first = self._num_rows % NUM_ROWS if num_rows == NUM_ROWS else 0
        return DraftProfiles(
            free=np.roll(self._rows[:num_rows], -first, axis=0),
            models={name: rows for name, rows in models.items() if len(rows) >= NUM_PROFILES},
            deciding_s=tuple(
                (count, statistics.median(times))
                for count, times in sorted(self._deciding_s.items())
            ),
        )
