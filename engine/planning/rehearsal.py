"""How fast a built core will serve where its setting was never calibrated: the promise of an apply
under load.

The run of an apply asks before the switch. Made-up steps of the new core and of the one that serves
are timed in turns between two steps that serve, where nothing else computes. What the new one takes
more, or less, is put on top of the steps that were observed under the present load.
"""

import logging
from concurrent.futures import Future
from typing import Protocol

import msgspec

from engine.deployment import Deployment
from engine.planning.cost_model import Interval
from engine.planning.observer import DecodeWindow
from engine.runner import Runner

log = logging.getLogger(__name__)

_TURNS = 5  # each three pauses of two steps in the running streams
_WAIT_S = 10.0  # for a turn; a step may be under way
_MIN_STEPS = 24  # observed before
# Few and short steps without context, of a machine that serves: less is known than after a
# calibration.
_MARGIN = 0.30
_MAX_CHANGE = 0.25  # of the number of sequences, for the estimate to be about the same load


class RehearsingEngine(Protocol):
    """What a rehearsal asks of the engine."""

    def time_step(self, num_tokens: int, other: Runner | None = None) -> Future[float | None]: ...


class Estimate(msgspec.Struct, frozen=True):
    """A step of the new core at the load that was observed."""

    step_s: float
    num_tokens: float  # of it, drafted ones included
    token_s: float  # for each token more
    num_sequences: float

    def interval(self, window: DecodeWindow) -> Interval | None:
        """Tokens per second for the steps of a window, as many as they did emit.

        What drafts give is the text's affair: it changes with every request. None where the load is
        not the one that this is about.
        """
        if abs(window.mean_sequences / self.num_sequences - 1.0) > _MAX_CHANGE:
            return None
        added_s = self.token_s * (window.mean_tokens - self.num_tokens)
        num_emitted = window.mean_emitted * window.mean_sequences
        value = num_emitted / max(self.step_s + added_s, self.step_s / 2)
        return Interval(value, value * (1 - _MARGIN), value * (1 + _MARGIN))


def rehearse(
    engine: RehearsingEngine, new: Deployment, before: DecodeWindow | None
) -> Estimate | None:
    """Time the core of `new`, which serves nobody yet; None where there is nothing to go by.

    It decides nothing: where the core cannot step at all, the switch will find out.
    """
    if before is None or before.num_steps < _MIN_STEPS:
        return None
    num_tokens = min(round(before.mean_tokens), new.engine_settings.max_step_tokens // 2)
    try:
        runner = Runner(new.loaded.core, new.engine_settings, is_serving=True)
        turns = [
            (
                engine.time_step(num_tokens).result(_WAIT_S),
                engine.time_step(num_tokens, runner).result(_WAIT_S),
                engine.time_step(2 * num_tokens, runner).result(_WAIT_S),
            )
            for _ in range(_TURNS)
        ]
    except Exception as error:
        log.warning("the new state could not be timed beforehand: %r", error)
        return None
    times = [[one for one in several if one is not None] for several in zip(*turns, strict=True)]
    if not all(times):
        return None
    old_s, new_s, double_s = map(min, times)
    return Estimate(
        step_s=max(before.step_s + new_s - old_s, new_s),
        num_tokens=before.mean_tokens,
        token_s=max(0.0, double_s - new_s) / num_tokens,
        num_sequences=before.mean_sequences,
    )
