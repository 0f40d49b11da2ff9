"""What drafts gain, from measured times alone: steps with them against steps without.

Only steps that decode as many sequences are compared. The policy owns it, and has it say when a
step without drafts is due for the sake of the comparison.
"""

import statistics
from collections import deque
from dataclasses import dataclass, field

NUM_PLAIN = 9  # latest steps without drafts, of each number of sequences
NUM_RECENT = 256  # steps that are compared
# Steps with drafts, after which one without is due: at first, and once a few were seen.
FIRST_INTERVAL = 16
INTERVAL = 128
FEW = 4
# A step that took this many times the median was held up by something else.
STALL = 3.0


@dataclass(slots=True)
class _Load:
    """Steps that decode one number of sequences."""

    plain_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_PLAIN))
    drafted_s: deque[float] = field(default_factory=lambda: deque(maxlen=NUM_RECENT))
    num_since_plain: int = 0


class SpeedupMeter:
    """Keeps the times of recent steps that decode and do nothing else."""

    def __init__(self) -> None:
        self._loads: dict[int, _Load] = {}
        # Sequences, emitted tokens, seconds of drafting, of the step: None if it had no drafts.
        self._recent: deque[tuple[int, int, float, float | None]] = deque(maxlen=NUM_RECENT)

    def is_plain_due(self, num_sequences: int) -> bool:
        """Whether the next step had better have no drafts, for the comparison to go on."""
        load = self._loads.get(num_sequences)
        if load is None:
            return False
        interval = FIRST_INTERVAL if len(load.plain_s) < FEW else INTERVAL
        return load.num_since_plain >= interval

    def observe(
        self, num_sequences: int, num_drafted: int, num_emitted: int, draft_s: float, step_s: float
    ) -> None:
        """Take in a step of `step_s`, before which drafting took `draft_s`."""
        load = self._loads.setdefault(num_sequences, _Load())
        if num_drafted:
            load.num_since_plain += 1
            load.drafted_s.append(step_s)
        else:
            load.num_since_plain = 0
            load.plain_s.append(step_s)
        is_drafted = num_drafted > 0
        self._recent.append((num_sequences, num_emitted, draft_s, step_s if is_drafted else None))

    def speedup(self) -> float:
        """Decoding's speed against that without drafts; 1 before there is something to compare."""
        plain_medians_s = {
            count: statistics.median(load.plain_s)
            for count, load in self._loads.items()
            if load.plain_s
        }
        limits_s = {
            count: STALL * statistics.median(load.drafted_s)
            for count, load in self._loads.items()
            if load.drafted_s
        }
        without_s = with_s = 0.0
        for num_sequences, num_emitted, draft_s, step_s in self._recent:
            plain_s = plain_medians_s.get(num_sequences)
            if plain_s is None:
                continue
            without_s += num_emitted / num_sequences * plain_s
            spent_s = plain_s if step_s is None else min(step_s, limits_s[num_sequences])
            with_s += spent_s + min(draft_s, STALL * plain_s)
        return without_s / with_s if with_s else 1.0
