"""What the engine's steps say of speed while it serves, in emitted tokens: the measured side of a
receipt.

`observe` runs on the engine thread, once a step; the applier reads windows from its own thread.
"""

import threading
import time
from collections import deque

import msgspec

from engine.planning.cost_model import CostModel
from engine.planning.pace import Pace
from engine.types import StepReport

_MAX_STEPS = 4096
_BLOCK_TOKENS = 16
_MIN_PACE_STEPS = 24
_CONTEXT_STEP = 64  # tokens of a sequence's context


class DecodeStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step in which every sequence advanced by its own tokens and nobody caught up."""

    ended_at_s: float
    seconds: float
    num_sequences: int
    num_generated: int
    context_tokens: int
    num_drafted: int
    is_streamed: bool  # to clients; else it is the applier's own


class DecodeWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Decode steps of a while, together."""

    num_steps: int
    mean_sequences: float
    mean_tokens: float  # of a step, drafted ones included
    step_s: float  # mean
    mean_emitted: float  # tokens of a sequence in a step; beyond 1 they are accepted drafts
    tokens_per_s: float  # of all sequences, while steps ran
    predicted_tokens_per_s: float | None  # for the very same steps


class Observer:
    """Keeps the last decode steps, and the pauses between tokens while asked to."""

    def __init__(self) -> None:
        self._steps: deque[DecodeStep] = deque(maxlen=_MAX_STEPS)
        self._lock = threading.Lock()
        self._last_token_s: dict[int, float] | None = None
        self._longest_pause_s = 0.0

    def observe(self, report: StepReport) -> None:
        """Take in one step."""
        now_s = time.monotonic()
        num_generated = sum(len(event.token_ids) for event in report.events)
        num_ended = sum(event.finish_reason is not None for event in report.events)
        num_sequences = report.load.num_running + num_ended
        with self._lock:
            if self._last_token_s is not None:
                self._note_pauses(report, now_s)
            num_advanced = sum(bool(event.token_ids) for event in report.events)
            # Where prompts are computed, the step has more tokens than sequences and drafts.
            num_own = report.num_step_tokens - report.num_drafted
            if num_generated and num_own == num_advanced == num_sequences:
                context = report.load.num_held_blocks * _BLOCK_TOKENS
                context = max(num_sequences, context - num_sequences * _BLOCK_TOKENS // 2)
                self._steps.append(
                    DecodeStep(
                        ended_at_s=now_s,
                        seconds=report.step_s,
                        num_sequences=num_sequences,
                        num_generated=num_generated,
                        context_tokens=context,
                        num_drafted=report.num_drafted,
                        is_streamed=any(event.seq_id >= 0 for event in report.events),
                    )
                )

    def begin_pauses(self) -> None:
        """Note from now on how long each sequence waits between two tokens."""
        with self._lock:
            self._last_token_s, self._longest_pause_s = {}, 0.0

    def take_pause_s(self) -> float:
        """The longest pause that ended since the beginning or the last call, in seconds."""
        with self._lock:
            longest_s, self._longest_pause_s = self._longest_pause_s, 0.0
            return longest_s

    def end_pauses(self) -> None:
        """Note no more of them."""
        with self._lock:
            self._last_token_s = None

    def window(self, since_s: float, model: CostModel | None) -> DecodeWindow | None:
        """All decode steps that ended since then; None where there were none."""
        with self._lock:
            steps = [step for step in self._steps if step.ended_at_s >= since_s]
        if not steps:
            return None
        seconds = sum(step.seconds for step in steps)
        tokens = sum(step.num_generated for step in steps)
        predicted = None
        if model is not None:
            predicted = tokens / _predicted_s(steps, model)
        return DecodeWindow(
            num_steps=len(steps),
            mean_sequences=sum(step.num_sequences for step in steps) / len(steps),
            mean_tokens=sum(s.num_sequences + s.num_drafted for s in steps) / len(steps),
            step_s=seconds / len(steps),
            mean_emitted=tokens / sum(step.num_sequences for step in steps),
            tokens_per_s=tokens / seconds,
            predicted_tokens_per_s=predicted,
        )

    def num_steps(self, since_s: float) -> int:
        """How many decode steps ended since then."""
        with self._lock:
            return sum(step.ended_at_s >= since_s for step in self._steps)

    def pace(self, since_s: float, model: CostModel) -> Pace | None:
        """Times of the steps without drafts that ended since then, by those of the model; None
        where there were few."""
        with self._lock:
            steps = [s for s in self._steps if s.ended_at_s >= since_s and not s.num_drafted]
        if len(steps) < _MIN_PACE_STEPS:
            return None
        predicted_s = sum(
            count / model.tokens_per_s(n, context, is_streamed=is_streamed, is_drafted=False)
            for (n, context, is_streamed), count in _by_load(steps).items()
        )
        seconds = sum(step.seconds for step in steps)
        ago_s = time.monotonic() - steps[0].ended_at_s
        return Pace(seconds / predicted_s, time.time() - ago_s, len(steps))

    def _note_pauses(self, report: StepReport, now_s: float) -> None:
        last = self._last_token_s
        assert last is not None
        for event in report.events:
            if event.token_ids:
                pause_s = now_s - last.get(event.seq_id, now_s)
                self._longest_pause_s = max(self._longest_pause_s, pause_s)
                last[event.seq_id] = now_s
            if event.finish_reason is not None:
                last.pop(event.seq_id, None)


def _predicted_s(steps: list[DecodeStep], model: CostModel) -> float:
    """Seconds that the tokens of these steps should take, each load by its own speed."""
    return sum(
        num_generated / model.tokens_per_s(n, context, is_streamed=is_streamed)
        for (n, context, is_streamed), num_generated in _by_load(steps).items()
    )


def _by_load(steps: list[DecodeStep]) -> dict[tuple[int, float, bool], int]:
    """Generated tokens by sequences, the mean of their contexts' sum, and whether streamed.

    Nearly equal contexts count together: a prediction looks at many depths.
    """
    loads: dict[tuple[int, int, bool], list[int]] = {}
    for step in steps:
        bucket = step.context_tokens // (_CONTEXT_STEP * step.num_sequences)
        load = loads.setdefault((step.num_sequences, bucket, step.is_streamed), [0, 0, 0])
        load[0] += step.num_generated
        load[1] += step.context_tokens
        load[2] += 1
    return {
        (num_sequences, context / count, is_streamed): tokens
        for (num_sequences, _, is_streamed), (tokens, context, count) in loads.items()
    }
