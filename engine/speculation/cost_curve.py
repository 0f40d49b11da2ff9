"""How long something takes by its size, learned from noisy times while serving.

The policy keeps one curve for a step by its number of tokens, and one for each drafter and number
of drafts by the number of sequences. Times never fall as the size grows.
"""

import math
from bisect import bisect_left
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
# A time counts as at most this much off, so that no single one moves the curve far: a stall of a
# second weighs as much as a step that is a quarter slower than expected.
MAX_SURPRISE = 0.25
COMMON_RATE = 0.04  # by how much of a surprise the whole curve moves,
OWN_RATE = 0.04  # and the measured size besides, once it is well known
STALE_AFTER = 200.0  # times taken in, after which what a size's rests on counts 1 / e
MAX_WEIGHT = 20.0
SEED_WEIGHT = 10.0
LEAST_WEIGHT = 0.01
REBUILD_EVERY = 8  # times taken in
GUESSED_SLOPE = 0.05  # per size, where a single size is known


class CostCurve:
    """Seconds by size, 1 … max_size."""

    def __init__(self, max_size: int) -> None:
        self.sizes = (*SIZES[: bisect_left(SIZES, max_size)], max_size)
        self.is_known = False  # whether any time was taken in
        self._max_size = max_size
        # A size's time is that of the seeds, times what was learned since, times what is the
        # machine's speed of the moment and concerns all sizes.
        self._seeds_s: dict[int, float] = {}
        self._seeded_s: FloatArray = np.zeros(len(self.sizes))
        self._ratios = np.ones(len(self.sizes))
        self._common = 1.0
        # How many times stand behind each ratio; 0: it is that of its neighbours.
        self._weights = np.zeros(len(self.sizes))
        self._last_seen = np.zeros(len(self.sizes))
        self._num_observed = 0
        self._num_pending = 0  # of these, not in the curve yet
        self._curve: FloatArray = np.zeros(max_size + 1)

    def seed(self, size: int, time_s: float) -> None:
        """Take a careful measurement as the truth about one size."""
        index = min(range(len(self.sizes)), key=lambda i: abs(self.sizes[i] - size))
        self._seeds_s[size] = time_s / self._common
        self._ratios[index] = 1.0
        self._weights[index] = SEED_WEIGHT
        self._last_seen[index] = self._num_observed
        self._seeded_s = _through(self._seeds_s, self.sizes)
        self.is_known = True
        self._rebuild()

    def observe(self, size: int, time_s: float) -> None:
        """Take in a time that was measured while serving; sizes past the end are ignored."""
        if size > self._max_size or size < 1 or time_s <= 0.0:
            return
        if not self.is_known:
            self.seed(size, time_s)
            return
        self._num_observed += 1
        surprise = time_s / float(self._curve[size]) - 1.0
        # Most of a lasting change concerns all sizes, those too that are not run at the moment:
        # without this, a machine that got slower would look like a size that got dearer.
        self._common *= 1.0 + COMMON_RATE * _limited(surprise, MAX_SURPRISE)
        right = bisect_left(self.sizes, size)
        if self.sizes[right] == size:
            self._correct(right, surprise, 1.0)
        else:
            low, high = self.sizes[right - 1], self.sizes[right]
            share = (size - low) / (high - low)
            self._correct(right - 1, surprise, 1.0 - share)
            self._correct(right, surprise, share)
        self._num_pending += 1
        if self._num_pending >= REBUILD_EVERY:
            self._rebuild()

    def times_s(self) -> FloatArray:
        """Return the times by size, index 0 unused; do not write to it."""
        return self._curve

    @property
    def common(self) -> float:
        """The part of the times that is the machine's speed of the moment, the same for all."""
        return self._common

    def points(self) -> list[tuple[int, float]]:
        """Return (size, seconds) of the sizes that were measured."""
        return [
            (size, float(self._curve[size]))
            for size, weight in zip(self.sizes, self._weights, strict=True)
            if weight
        ]

    def _correct(self, index: int, surprise: float, share: float) -> None:
        age = self._num_observed - float(self._last_seen[index])
        weight = float(self._weights[index]) * math.exp(-age / STALE_AFTER)
        if weight < 1.0:
            # What is known of it is its place among the others.
            weights = self._current_weights()
            self._ratios[index] = np.interp(self.sizes[index], *self._fresh_ratios(weights))
        # A size that is new or was not run for long learns fast.
        rate = max(OWN_RATE, 1.0 / (weight + 2.0))
        limit = MAX_SURPRISE * (1.0 + rate)
        self._ratios[index] *= 1.0 + rate * share * _limited(surprise, limit)
        self._weights[index] = min(weight + share, MAX_WEIGHT)
        self._last_seen[index] = self._num_observed

    def _current_weights(self) -> FloatArray:
        """How many times stand behind each size, old ones counting less."""
        weights: FloatArray = self._weights * np.exp(
            (self._last_seen - self._num_observed) / STALE_AFTER
        )
        return weights

    def _fresh_ratios(self, weights: FloatArray) -> tuple[list[int], FloatArray]:
        """Sizes that were met lately, in ascending order, and their ratios; at least one."""
        fresh = np.flatnonzero(weights >= min(1.0, float(weights.max())))
        return [self.sizes[index] for index in fresh.tolist()], self._ratios[fresh]

    def _rebuild(self) -> None:
        self._num_pending = 0
        weights = self._current_weights()
        # A size that was not met for long keeps its place among the others, which moved on.
        others = np.interp(self.sizes, *self._fresh_ratios(weights))
        ratios = (weights * self._ratios + others) / (weights + 1.0)
        times_s = never_falling(
            (self._seeded_s * ratios).tolist(), (weights + LEAST_WEIGHT).tolist()
        )
        curve = np.interp(np.arange(self._max_size + 1), self.sizes, times_s)
        self._curve = curve * self._common


def _through(seeds_s: dict[int, float], sizes: Row[int]) -> FloatArray:
    """Times at `sizes` on straight lines through the seeds, and beyond the last as before it."""
    known = sorted(seeds_s)
    times_s = [seeds_s[size] for size in known]
    if len(known) == 1:
        slope = GUESSED_SLOPE * times_s[0]
        start_s = max(times_s[0] - slope * (known[0] - 1), 0.5 * times_s[0])
    else:
        slope = max(0.0, (times_s[-1] - times_s[-2]) / (known[-1] - known[-2]))
        start_s = times_s[0]
    if known[0] > 1:
        known, times_s = [1, *known], [start_s, *times_s]
    if known[-1] < sizes[-1]:
        times_s = [*times_s, times_s[-1] + slope * (sizes[-1] - known[-1])]
        known = [*known, sizes[-1]]
    return np.interp(sizes, known, times_s)


def _limited(value: float, limit: float) -> float:
    return min(max(value, -limit), limit)


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
