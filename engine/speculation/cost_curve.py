"""How long something takes by its size, learned from noisy times while serving.

The policy keeps one curve for a step by its number of tokens, and one for each drafter and number
of drafts by the number of sequences. Times never fall as the size grows. Machines are shared: any
single time, one of the calibration too, may be several times too long, so that medians decide.
"""

import math
import statistics
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence as Row

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Sizes that a curve holds a time for. Kernels take rows in tiles of 4, 8 or 16, so that times
# form plateaus which end at multiples of these; between two sizes a time is interpolated.
SIZES = (
    *(*range(1, 13), 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 128, 192, 256),
    *(384, 512, 1024, 2048, 4096),
)
LEVEL_WINDOW = 15  # times of all sizes, whose median says how fast the machine is now
# Times of one size, whose median says how it differs from the rest. Longer than twice the other:
# when the machine changes, the times until that is noticed must not look like those of a size.
OWN_WINDOW = 32
# Fewer times say nothing of the size alone: what they show is put down to the machine, which is
# found out soon where it is wrong, while a size that is wrongly taken for dear is not run again.
FEWEST_OWN = 5
SEED_WEIGHT = 2.0  # times that a calibrated one counts as: it was taken in one short moment
BETWEEN_SEEDS_WEIGHT = 0.5
# Where times scatter by more than this, they say little of the few percent that a token more takes:
# the calibration, which takes the least of several, then counts for more.
QUIET = 0.05
STALE_AFTER = 200.0  # times taken in, after which what a size's rests on counts 1 / e
MAX_WEIGHT = 100.0
LEAST_WEIGHT = 0.01
REBUILD_EVERY = 16  # times taken in, but for the first ones:
SOON = 8
FEW = 20  # sizes that `few_s` covers
GUESSED_SLOPE = 0.05  # per size, where a single size is known


class Level:
    """How fast the machine is against the moment of the calibration: it concerns all sizes.

    Without this, a machine that was busy then would look like one on which whatever has been run
    since is cheap, and all else dear.
    """

    def __init__(self) -> None:
        self.log_factor = 0.0
        self._recent = deque([0.0] * int(SEED_WEIGHT), maxlen=LEVEL_WINDOW)

    def observe(self, log_ratio: float) -> None:
        """Take in a measured time by the one expected at level 0, as a logarithm."""
        self._recent.append(log_ratio)
        self.log_factor = statistics.median(self._recent)


class CostCurve:
    """Seconds by size, 1 … max_size: those of the seeds, corrected by size and by the level."""

    def __init__(self, max_size: int, level: Level | None = None) -> None:
        """Curves of things that run on the same occasions may share a level."""
        self.sizes = (*SIZES[: bisect_left(SIZES, max_size)], max_size)
        self.is_known = False  # whether any time was taken in
        self._max_size = max_size
        self._level = Level() if level is None else level
        self._seeds_s: dict[int, float] = {}
        self._seed_curve: FloatArray = np.zeros(max_size + 1)
        # Logarithms of a size's latest times by those of the seeds, at level 0.
        self._own = [deque[float](maxlen=OWN_WINDOW) for _ in self.sizes]
        self._own_medians = np.zeros(len(self.sizes))
        self._spreads = np.zeros(len(self.sizes))  # median deviations from these
        self._changed: set[int] = set()  # sizes whose median is not that of their times any more
        self._weights = [0.0] * len(self.sizes)  # how many times stand behind each
        self._seed_weights = np.full(len(self.sizes), LEAST_WEIGHT)
        self._last_seen = [0] * len(self.sizes)
        self._num_observed = 0
        self._pending: list[tuple[int, float]] = []  # not taken in yet
        self._curve: FloatArray = np.zeros(max_size + 1)  # at level 0
        self._current: FloatArray = self._curve  # at the level that was the latest one then
        self._current_level = 0.0
        self._few: tuple[FloatArray, list[float]] = (self._current, [])

    def seed(self, size: int, time_s: float) -> None:
        """Take in a time that was measured on purpose, before serving."""
        self._seeds_s[size] = time_s / math.exp(self._level.log_factor)
        if len(self._seeds_s) > 1:  # a single one says nothing of the curve's shape
            self._seed_weights[:] = BETWEEN_SEEDS_WEIGHT
            self._seed_weights[[self._nearest(one) for one in self._seeds_s]] = SEED_WEIGHT
        seeded_s = _through(self._seeds_s, self.sizes)
        self._seed_curve = np.interp(np.arange(self._max_size + 1), self.sizes, seeded_s)
        self.is_known = True
        self._rebuild()

    def observe(self, size: int, time_s: float) -> None:
        """Take in a time that was measured while serving; sizes past the end are ignored.

        That is done for a few at once: between two steps all code is out of the caches, and most
        of what one time costs is reading it anew.
        """
        if size > self._max_size or size < 1 or time_s <= 0.0:
            return
        if not self.is_known:
            self.seed(size, time_s)
            return
        self._pending.append((size, time_s))
        # At first each one may change a lot.
        if len(self._pending) >= min(REBUILD_EVERY, 1 + self._num_observed // SOON):
            for one in self._pending:
                self._take_in(*one)
            self._pending.clear()
            self._rebuild()

    def _take_in(self, size: int, time_s: float) -> None:
        self._num_observed += 1
        self._level.observe(math.log(time_s / float(self._curve[size])))
        index = self._nearest(size)
        log_ratio = math.log(time_s / float(self._seed_curve[size]))
        self._own[index].append(log_ratio - self._level.log_factor)
        self._changed.add(index)
        age = self._num_observed - self._last_seen[index]
        weight = self._weights[index] * math.exp(-age / STALE_AFTER)
        self._weights[index] = min(weight + 1.0, MAX_WEIGHT)
        self._last_seen[index] = self._num_observed

    def times_s(self) -> FloatArray:
        """Return the times by size, index 0 unused; do not write to it."""
        if self._current_level != self._level.log_factor:
            self._current_level = self._level.log_factor
            self._current = self._curve * math.exp(self._current_level)
        return self._current

    def few_s(self) -> list[float]:
        """The same for the least sizes, as a list, which is quicker to read one by one."""
        times_s = self.times_s()
        if self._few[0] is not times_s:
            self._few = (times_s, times_s[: FEW + 1].tolist())
        return self._few[1]

    def time_s(self, size: int) -> float:
        """Return the time of one size, without those of the others."""
        return float(self._curve[size]) * math.exp(self._level.log_factor)

    @property
    def common(self) -> float:
        """The part of the times that is the machine's speed of the moment, the same for all."""
        return math.exp(self._level.log_factor)

    def points(self) -> list[tuple[int, float]]:
        """Return (size, seconds) of the sizes that were measured."""
        seeded = {self._nearest(size) for size in self._seeds_s}
        return [
            (size, self.time_s(size))
            for index, size in enumerate(self.sizes)
            if index in seeded or self._own[index]
        ]

    def _nearest(self, size: int) -> int:
        right = bisect_left(self.sizes, size)
        if right and size - self.sizes[right - 1] < self.sizes[right] - size:
            return right - 1
        return right

    def _rebuild(self) -> None:
        for index in self._changed:
            own = self._own[index]
            median = self._own_medians[index] = statistics.median(own)
            self._spreads[index] = statistics.median([abs(value - median) for value in own])
        self._changed.clear()
        ages = self._num_observed - np.array(self._last_seen)
        weights = np.array(self._weights) * np.exp(-ages / STALE_AFTER)  # old times count less
        weights[[len(times) < FEWEST_OWN for times in self._own]] = 0.0
        seed_weights = self._seed_weights * (1.0 + (self._spreads / QUIET) ** 2)
        own_logs = self._own_medians * weights / (weights + seed_weights)
        fresh = np.flatnonzero(weights >= 1.0)
        if len(fresh):
            # A size that was not met lately keeps its place among the others, which moved on.
            others = np.interp(self.sizes, [self.sizes[i] for i in fresh.tolist()], own_logs[fresh])
            own_logs = (weights * own_logs + others) / (weights + 1.0)
        times_s = self._seed_curve[list(self.sizes)] * np.exp(own_logs)
        rising_s = never_falling(times_s.tolist(), (weights + LEAST_WEIGHT).tolist())
        self._curve = np.interp(np.arange(self._max_size + 1), self.sizes, rising_s)
        self._current_level = self._level.log_factor
        self._current = self._curve * math.exp(self._current_level)


def _through(seeds_s: dict[int, float], sizes: Row[int]) -> FloatArray:
    """Times at `sizes` on straight lines through the seeds, and beyond the last as before it.

    A disturbance only ever adds time: where a larger size took less, that bounds the smaller one.
    """
    known = sorted(seeds_s)
    times_s = np.minimum.accumulate([seeds_s[size] for size in known][::-1])[::-1].tolist()
    if len(known) == 1:
        slope = GUESSED_SLOPE * times_s[0]
        start_s = max(times_s[0] - slope * (known[0] - 1), 0.5 * times_s[0])
    else:
        slope = (times_s[-1] - times_s[-2]) / (known[-1] - known[-2])
        start_s = times_s[0]
    if known[0] > 1:
        known, times_s = [1, *known], [start_s, *times_s]
    if known[-1] < sizes[-1]:
        times_s = [*times_s, times_s[-1] + slope * (sizes[-1] - known[-1])]
        known = [*known, sizes[-1]]
    at_sizes_s: FloatArray = np.interp(sizes, known, times_s)
    return at_sizes_s


def never_falling(values: list[float], weights: list[float]) -> list[float]:
    """Return the values that never fall and are nearest to `values` in weighted squares.

    Neighbours that are out of order are pooled (Barlow et al., Statistical Inference under Order
    Restrictions, 1972).
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, values
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            other_mean, other_total, other_count = pools.pop()
            mean = (mean * total + other_mean * other_total) / (total + other_total)
            total += other_total
            count += other_count
        pools.append((mean, total, count))
    return [mean for mean, _, count in pools for _ in range(count)]
