"""Predicts speed from a calibration: steps, tokens per second and time to first token.

The preview shows it, the receipt of an apply is held against it.
"""

import itertools

import msgspec

from engine.planning.calibration import SHORT_PROMPT, Calibration, Timing

_CHUNK_TOKENS = 512  # of a prompt while nothing decodes
_MIN_MARGIN = 0.12  # other processes, the page cache, the clock of the processor
_MAX_MARGIN = 0.20
# What the event loop takes of a step: decoding text, framing and sending, on the same cores.
EVENT_LOOP_S_PER_TOKEN = 90e-6
EVENT_LOOP_S_PER_STEP = 150e-6


class Interval(msgspec.Struct, frozen=True):
    """A prediction and the range that it should fall in."""

    value: float
    low: float
    high: float


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What one load would see."""

    decode_tokens_per_s: Interval  # of a sequence alone
    total_tokens_per_s: Interval  # of `concurrency` sequences together
    prefill_tokens_per_s: Interval
    ttft_ms: Interval  # of a request alone
    concurrency: int
    prompt_tokens: int
    output_tokens: int


class CostModel:
    """Seconds of steps, interpolated between those that were measured."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._widths = sorted(calibration.decode)
        self._chunks = sorted(calibration.prefill)

    def decode_step_s(self, num_sequences: float, context_tokens: float) -> float:
        """A step that advances sequences by one token; `context_tokens` is their sum."""
        seconds = _interpolate(self._widths, self._calibration.decode, num_sequences)
        beyond = max(0.0, context_tokens - num_sequences * SHORT_PROMPT)
        return seconds + beyond * self._calibration.context_s_per_token

    def prefill_s(self, prompt_tokens: int) -> float:
        """All chunks of a prompt that is computed alone."""
        seconds = 0.0
        for begin in range(0, prompt_tokens, _CHUNK_TOKENS):
            size = min(_CHUNK_TOKENS, prompt_tokens - begin)
            if size < self._chunks[0]:
                # Small chunks cost what as many decoding sequences do, up to the smallest chunk.
                first = self._calibration.decode[self._widths[0]].seconds
                last = self._calibration.prefill[self._chunks[0]].seconds
                share = (size - 1) / (self._chunks[0] - 1)
                seconds += first + share * max(0.0, last - first)
            else:
                seconds += _interpolate(self._chunks, self._calibration.prefill, size)
            seconds += size * begin * self._calibration.prefill_context_s
        return seconds

    def margin(self, num_sequences: float) -> float:
        """Half the width of a prediction's interval, as a share of it."""
        near = min(self._widths, key=lambda width: abs(width - num_sequences))
        spread = self._calibration.decode[near].spread
        return min(_MAX_MARGIN, max(_MIN_MARGIN, 2 * spread))

    def speed(self, concurrency: int, prompt_tokens: int, output_tokens: int) -> Speed:
        """Speeds in the middle of an output, as a client sees them."""
        context = prompt_tokens + output_tokens / 2
        single_s = self.served_step_s(1, context)
        together_s = self.served_step_s(concurrency, concurrency * context)
        prefill_s = self.prefill_s(prompt_tokens)
        ttft_s = prefill_s + EVENT_LOOP_S_PER_STEP + EVENT_LOOP_S_PER_TOKEN
        margin = self.margin(1)
        return Speed(
            decode_tokens_per_s=_around(1 / single_s, margin),
            total_tokens_per_s=_around(concurrency / together_s, self.margin(concurrency)),
            prefill_tokens_per_s=_around(prompt_tokens / prefill_s, _MAX_MARGIN),
            ttft_ms=_around(1e3 * ttft_s, _MAX_MARGIN),
            concurrency=concurrency,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
        )

    def served_step_s(self, num_sequences: float, context_tokens: float) -> float:
        """A decode step with what the event loop adds to it."""
        step_s = self.decode_step_s(num_sequences, context_tokens)
        return step_s + EVENT_LOOP_S_PER_STEP + num_sequences * EVENT_LOOP_S_PER_TOKEN


def _around(value: float, margin: float) -> Interval:
    return Interval(value, value * (1 - margin), value * (1 + margin))


def _interpolate(sizes: list[int], timings: dict[int, Timing], size: float) -> float:
    """Between two measured sizes, and on along the last two beyond them."""
    if len(sizes) == 1:
        return timings[sizes[0]].seconds * max(1.0, size / sizes[0])
    pairs = list(itertools.pairwise(sizes))
    low, high = next((pair for pair in pairs if size <= pair[1]), pairs[-1])
    first, last = timings[low].seconds, timings[high].seconds
    share = (size - low) / (high - low)
    return max(first / 2, first + share * (last - first))
