"""What a step costs and how long answers are, learnt from what the engine reports.

The engine client feeds one `CostModel`; admission reads its frozen `Costs` and predicts with them.
"""

from bisect import bisect_left

import msgspec

# A mean follows the last few dozen steps of its size: clocks and neighbours change.
_STEP_WEIGHT = 0.05
_REQUEST_WEIGHT = 0.05
# A step that hung says nothing of the next one.
_MAX_STEP_RATIO = 4.0
_MIN_STEPS_TO_CLIP = 8
# Predictions below this say nothing about how good predictions are.
_MIN_PREDICTION_S = 0.02
# More than any drafter drafts: the step computed a preempted sequence again.
_MAX_VERIFIED = 32


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
    """Means over the steps of each size class (powers of two), and over ended sequences."""

    def __init__(self) -> None:
        prior = Costs()
        self._begin_steps(())
        # The priors count as a few requests.
        self._output_tokens = _Mean(_REQUEST_WEIGHT, prior.mean_output_tokens, 2)
        self._prompt_tokens = _Mean(_REQUEST_WEIGHT, prior.mean_prompt_tokens, 2)
        self._uncached = _Mean(_REQUEST_WEIGHT, prior.uncached_share, 2)
        self._costs: Costs | None = prior

    def renew(self) -> None:
        """Forget what steps cost: another setting computes them from now on.

        The former costs hold until its first step: to know nothing would let everybody in.
        """
        self._begin_steps(self.costs.step_points)

    def _begin_steps(self, former_points: tuple[tuple[float, float], ...]) -> None:
        prior = Costs()
        self._former_points = former_points
        self._tokens: dict[int, _Mean] = {}
        self._seconds: dict[int, _Mean] = {}
        self._emitted = _Mean(_STEP_WEIGHT, prior.tokens_per_step)
        self._verified = _Mean(_STEP_WEIGHT, prior.verified_per_step)
        self._ttft_scale = _Mean(_REQUEST_WEIGHT, prior.ttft_scale, 4)
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
        size = num_tokens.bit_length()
        if size not in self._seconds:
            self._tokens[size] = _Mean(_STEP_WEIGHT)
            self._seconds[size] = _Mean(_STEP_WEIGHT)
        seconds = self._seconds[size]
        if seconds.count >= _MIN_STEPS_TO_CLIP:
            step_s = min(step_s, _MAX_STEP_RATIO * seconds.value)
        seconds.add(step_s)
        self._tokens[size].add(num_tokens)
        self._costs = None

    def observe_decode(
        self, num_sequences: int, num_emitted: int, num_step_tokens: int | None
    ) -> None:
        """What a step gave to the sequences that decoded; None where it computed prompts, too."""
        self._emitted.add(num_emitted / num_sequences)
        if num_step_tokens is not None and num_step_tokens <= _MAX_VERIFIED * num_sequences:
            self._verified.add(num_step_tokens / num_sequences)
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
        if not self._seconds:
            return self._former_points
        points: list[tuple[float, float]] = []
        for size in sorted(self._seconds):
            # Noise must not make a larger step look cheaper.
            floor_s = points[-1][1] if points else 0.0
            points.append((self._tokens[size].value, max(floor_s, self._seconds[size].value)))
        return tuple(points)
