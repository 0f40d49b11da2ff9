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

_TURNS = 5  # each a pause of two short steps in the running streams
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
    """Tokens per second of all sequences with the new core, at the load that was observed."""

    tokens_per_s: float
    num_sequences: float

    def interval(self, num_sequences: float) -> Interval | None:
        """The promise for a load; None where it is not the one that this is about."""
        if abs(num_sequences / self.num_sequences - 1.0) > _MAX_CHANGE:
            return None
        value = self.tokens_per_s
        return Interval(value, value * (1 - _MARGIN), value * (1 + _MARGIN))


def rehearse(
    engine: RehearsingEngine, new: Deployment, before: DecodeWindow | None
) -> Estimate | None:
    """Time the core of `new`, which serves nobody yet; None where there is nothing to go by.

    It decides nothing: where the core cannot step at all, the switch will find out.
    """
    if before is None or before.num_steps < _MIN_STEPS:
        return None
    num_tokens = min(round(before.mean_tokens), new.engine_settings.max_step_tokens)
    try:
        runner = Runner(new.loaded.core, new.engine_settings, is_serving=True)
        turns = [
            (
                engine.time_step(num_tokens).result(_WAIT_S),
                engine.time_step(num_tokens, runner).result(_WAIT_S),
            )
            for _ in range(_TURNS)
        ]
    except Exception as error:
        log.warning("the new state could not be timed beforehand: %r", error)
        return None
    old_s, new_s = zip(*turns, strict=True)
    times = [[one for one in several if one is not None] for several in (old_s, new_s)]
    if not all(times):
        return None
    added_s = min(times[1]) - min(times[0])
    step_s = max(before.step_s + added_s, min(times[1]))
    tokens_per_s = before.tokens_per_s * before.step_s / step_s
    return Estimate(tokens_per_s, before.mean_sequences)
