"""What a step costs and how long answers are, learnt from what the engine reports.

The engine client feeds one `CostModel`; admission reads its frozen `Costs` and predicts with them.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable

import msgspec

from engine.speculation.cost_curve import CostCurve

# A mean follows the last few dozen steps or requests: clocks, neighbours and users change.
_STEP_WEIGHT = 0.05
_REQUEST_WEIGHT = 0.05
_SPEED_MEMORY_S = 2.0  # predictions look a few seconds ahead
_SCALE_WEIGHT = 0.02  # what is wrong with predictions in general is no matter of the moment
# A step that hung says nothing of the next one.
_MAX_STEP_RATIO = 4.0
# Predictions below this say nothing about how good predictions are.
_MIN_PREDICTION_S = 0.02
# Tokens of a step up to which its cost is learnt; beyond, it grows as before.
_MAX_TOKENS = 4096


class Costs(msgspec.Struct, frozen=True):
    """`step_points` are (tokens, seconds) of steps, ascending; empty: nothing is known yet."""

    step_points: tuple[tuple[float, float], ...] = ()
    mean_output_tokens: float = 64.0
    mean_prompt_tokens: float = 64.0
    uncached_share: float = 1.0  # of the prompts' tokens, that had to be computed
    ttft_scale: float = 1.0  # observed over predicted
    # Of a decoding sequence in a step: drafts are verified, and accepted ones emitted, together.
    tokens_per_step: float = 1.0
    verified_per_step: float = 1.0

    def step_s(self, num_tokens: float) -> float:
        """Seconds of a step of so many tokens; never less than of a smaller step."""
        points = self.step_points
        if not points:
            return 0.0
        index = bisect_left(points, (num_tokens, 0.0))
        if index == 0:
            return points[0][1]
        low_tokens, low_s = points[index - 1]
        if index == len(points):
            return low_s * num_tokens / low_tokens
        high_tokens, high_s = points[index]
        share = (num_tokens - low_tokens) / (high_tokens - low_tokens)
        return low_s + share * (high_s - low_s)

    def decode_s(self, num_sequences: float) -> float:
        """Seconds for a token of each of so many sequences, prompts aside."""
        return self.step_s(num_sequences * self.verified_per_step) / self.tokens_per_step


class _Mean:
    """Mean of the latest values: of all at first, then with a fixed weight for each new one."""

    __slots__ = ("count", "value", "weight")

    def __init__(self, weight: float, value: float = 0.0, count: int = 0) -> None:
        self.weight = weight
        self.value = value
        self.count = count

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(self.weight, 1 / self.count) * (value - self.value)


class CostModel:
    """The curve of a step's seconds by its tokens, and means over steps and ended sequences."""

    def __init__(self) -> None:
        prior = Costs()
        self._begin_steps((), ())
        # The priors count as a few requests.
        self._output_tokens = _Mean(_REQUEST_WEIGHT, prior.mean_output_tokens, 2)
        self._prompt_tokens = _Mean(_REQUEST_WEIGHT, prior.mean_prompt_tokens, 2)
        self._uncached = _Mean(_REQUEST_WEIGHT, prior.uncached_share, 2)
        self._costs: Costs | None = prior

    def renew(self, step_costs: Iterable[tuple[int, float]] = ()) -> None:
        """Begin anew with what steps were timed to cost: another core computes them from now on.

        Where none were timed the former costs hold until its first step: to know nothing would let
        everybody in.
        """
        self._begin_steps(step_costs, self.costs.step_points)

    def _begin_steps(
        self,
        step_costs: Iterable[tuple[int, float]],
        former_points: tuple[tuple[float, float], ...],
    ) -> None:
        prior = Costs()
        self._former_points = former_points
        # Old times count less and less, and what slows all steps down moves all of the curve.
        self._curve = CostCurve(_MAX_TOKENS)
        for num_tokens, step_s in step_costs:
            self._curve.seed(num_tokens, step_s)
        # The curve says how sizes compare, and follows the usual step; what counts here is the
        # mean of the last seconds, stalls included.
        self._observed_s = self._by_shape_s = 0.0
        self._emitted = _Mean(_STEP_WEIGHT, prior.tokens_per_step)
        self._verified = _Mean(_STEP_WEIGHT, prior.verified_per_step)
        self._ttft_scale = _Mean(_SCALE_WEIGHT, prior.ttft_scale, 4)
        self._costs = None

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            self._costs = Costs(
                self._step_points(),
                self._output_tokens.value,
                self._prompt_tokens.value,
                self._uncached.value,
                self._ttft_scale.value,
                self._emitted.value,
                self._verified.value,
            )
        return self._costs

    def observe_step(self, num_tokens: int, step_s: float) -> None:
        self._curve.observe(num_tokens, step_s)
        curve = self._curve
        shape_s = float(curve.times_s()[min(num_tokens, _MAX_TOKENS)]) / curve.common
        step_s = min(step_s, _MAX_STEP_RATIO * self._slowness * shape_s)
        kept_share = math.exp(-step_s / _SPEED_MEMORY_S)
        self._observed_s = kept_share * self._observed_s + step_s
        self._by_shape_s = kept_share * self._by_shape_s + shape_s
        self._costs = None

    @property
    def _slowness(self) -> float:
        """Seconds of the last steps, against those of the curve's shape."""
        return self._observed_s / self._by_shape_s if self._by_shape_s else self._curve.common

    def observe_decode(self, num_sequences: int, num_emitted: int, num_verified: int) -> None:
        """What a step gave to the sequences that decoded, and how many tokens it verified."""
        self._emitted.add(num_emitted / num_sequences)
        self._verified.add(num_verified / num_sequences)
        self._costs = None

    def observe_first_token(
        self, num_prompt_tokens: int, num_cached_tokens: int, predicted_s: float, observed_s: float
    ) -> None:
        """`predicted_s` is the uncorrected prediction at admission, 0 where there was none."""
        self._prompt_tokens.add(num_prompt_tokens)
        self._uncached.add(1 - num_cached_tokens / num_prompt_tokens)
        if predicted_s > _MIN_PREDICTION_S:
            self._ttft_scale.add(min(4.0, max(0.25, observed_s / predicted_s)))
        self._costs = None

    def observe_end(self, num_output_tokens: int) -> None:
        self._output_tokens.add(num_output_tokens)
        self._costs = None

    def _step_points(self) -> tuple[tuple[float, float], ...]:
        if not self._curve.is_known:
            return self._former_points
        times_s = self._curve.times_s() * (self._slowness / self._curve.common)
        return tuple((float(size), float(times_s[size])) for size in self._curve.sizes)
