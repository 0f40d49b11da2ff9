"""Predicts speed from a calibration: steps, tokens per second and time to first token.

The preview shows it, the receipt of an apply is held against it.
"""

import itertools
from typing import Literal

import msgspec

from engine.planning.calibration import SHORT_PROMPT, Calibration, Timing
from engine.planning.drafting import Drafting

_CHUNK_TOKENS = 512  # of a prompt while nothing decodes
_MIN_MARGIN = 0.15  # other processes, the page cache, the clock of the processor
_MOST_STEPS = 2.5  # half the range of nine in ten steps, by that of the middle half
_MAX_MARGIN = 0.20
# What the event loop and a client on the same machine take of a step's cores: decoding text,
# framing, sending and reading. In units of the calibration's piece of Python, as measured by the
# CPU time of both while 1, 4 and 8 streams ran; a little more than half is the client's.
_STREAM_WORK_PER_STEP = 3.6
_STREAM_WORK_PER_SEQUENCE = 0.84


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
    speculation: Literal["off", "measured", "estimated"] = "off"  # where its gain comes from
    speculation_gain: float = 1.0  # in the tokens per second of a sequence alone
    speculation_gain_together: float = 1.0


class CostModel:
    """Seconds of steps, interpolated between those that were measured."""

    def __init__(self, calibration: Calibration, drafting: Drafting | None = None) -> None:
        self.calibration = calibration
        self._drafting = drafting
        self._widths = sorted(calibration.decode)
        self._chunks = sorted(calibration.prefill)

    def decode_step_s(self, num_sequences: float, context_tokens: float) -> float:
        """A step that advances sequences by one token; `context_tokens` is their sum."""
        return self.verify_step_s(num_sequences, context_tokens, 0)

    def verify_step_s(
        self, num_sequences: float, context_tokens: float, num_drafted: float
    ) -> float:
        """The same with drafted tokens, which stand behind these sequences' own.

        They read no keys and values that their sequence does not read anyway: what context adds
        for them is what it adds for a prompt's tokens in one chunk.
        """
        calibration = self.calibration
        seconds = _interpolate(self._widths, calibration.decode, num_sequences + num_drafted)
        beyond = max(0.0, context_tokens - num_sequences * SHORT_PROMPT)
        seconds += beyond * calibration.context_s_per_token
        return seconds + num_drafted * beyond / num_sequences * calibration.prefill_context_s

    def prefill_s(self, prompt_tokens: int) -> float:
        """All chunks of a prompt that is computed alone."""
        seconds = 0.0
        for begin in range(0, prompt_tokens, _CHUNK_TOKENS):
            size = min(_CHUNK_TOKENS, prompt_tokens - begin)
            if size < self._chunks[0]:
                # Small chunks cost what as many decoding sequences do, up to the smallest chunk.
                first = self.calibration.decode[self._widths[0]].seconds
                last = self.calibration.prefill[self._chunks[0]].seconds
                share = (size - 1) / (self._chunks[0] - 1)
                seconds += first + share * max(0.0, last - first)
            else:
                seconds += _interpolate(self._chunks, self.calibration.prefill, size)
            seconds += size * begin * self.calibration.prefill_context_s
        return seconds

    def margin(self, num_sequences: float) -> float:
        """Half the width of a prediction's interval, as a share of it."""
        near = min(self._widths, key=lambda width: abs(width - num_sequences))
        spread = self.calibration.decode[near].spread
        # What is accepted depends on the text.
        least = _MIN_MARGIN if self._drafting is None else _MAX_MARGIN
        return min(_MAX_MARGIN, max(least, _MOST_STEPS * spread))

    def gain(self, num_sequences: float, context_tokens: float, extra_s: float = 0.0) -> float:
        """Tokens per second with drafts over those without; `extra_s` is added to every step."""
        if self._drafting is None:
            return 1.0
        context = context_tokens / num_sequences

        def step_s(num_own: float, num_drafted: float) -> float:
            return self.verify_step_s(num_own, num_own * context, num_drafted) + extra_s

        return self._drafting.gain(num_sequences, step_s)

    def tokens_per_s(
        self,
        num_sequences: float,
        context_tokens: float,
        *,
        is_streamed: bool = True,
        is_drafted: bool = True,
    ) -> float:
        """What the engine's steps emit, all sequences together, and streamed to clients or not."""
        extra_s = self.streaming_s(num_sequences) if is_streamed else 0.0
        step_s = self.decode_step_s(num_sequences, context_tokens) + extra_s
        gain = self.gain(num_sequences, context_tokens, extra_s) if is_drafted else 1.0
        return gain * num_sequences / step_s

    def speed(self, concurrency: int, prompt_tokens: int, output_tokens: int) -> Speed:
        """Speeds in the middle of an output, as a client sees them."""
        context = prompt_tokens + output_tokens / 2
        alone = self.tokens_per_s(1, context)
        together = self.tokens_per_s(concurrency, concurrency * context)
        prefill_s = self.prefill_s(prompt_tokens)
        ttft_s = prefill_s + self.streaming_s(1)
        return Speed(
            decode_tokens_per_s=_around(alone, self.margin(1)),
            total_tokens_per_s=_around(together, self.margin(concurrency)),
            prefill_tokens_per_s=_around(prompt_tokens / prefill_s, _MAX_MARGIN),
            ttft_ms=_around(1e3 * ttft_s, _MAX_MARGIN),
            concurrency=concurrency,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            speculation="off" if self._drafting is None else self._drafting.basis,
            speculation_gain=self.gain(1, context, self.streaming_s(1)),
            speculation_gain_together=self.gain(
                concurrency, concurrency * context, self.streaming_s(concurrency)
            ),
        )

    def streaming_s(self, num_sequences: float) -> float:
        """What sending a step's tokens takes of the cores that compute the next one."""
        work = _STREAM_WORK_PER_STEP + num_sequences * _STREAM_WORK_PER_SEQUENCE
        return work * self.calibration.python_s


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
