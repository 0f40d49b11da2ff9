"""The change of the core or of the drafters under running sequences: messages to the engine thread,
and the state that served before until its sequences have moved.

A sequence is computed again from its tokens by the new core. One moves at a time, and goes on
decoding where it is while the new core warms up for it: a copy of its text is computed there, whose
blocks the prefix cache keeps. Then it moves between two steps, and its pause is the few tokens that
came since.
"""

from concurrent.futures import Future

from msgspec.structs import replace

from engine.batch import Core
from engine.runner import NOTHING, EngineSettings, Runner, StepCounts, StepFailedError
from engine.scheduler import Scheduler
from engine.sequence import Sequence, SequenceStatus
from engine.speculation.setup import Speculation
from engine.types import EngineLoad, SamplingParams, Submit, TokenEvent

WARM_UP_ID = -(1 << 62)  # no request's; nobody is told of its events
_WORTH_BLOCKS = 2  # a text of fewer is not worth a step of its own


class Switch:
    """Serve with another core from the next step on.

    `done` resolves when every sequence has moved; it fails, and the former core serves on, where
    the new one's steps fail before that.
    """

    def __init__(
        self, core: Core, settings: EngineSettings, speculation: Speculation, timeout_s: float
    ) -> None:
        self.core = core
        self.settings = settings
        self.speculation = speculation
        self.timeout_s = timeout_s  # for sequences that the new length could not hold
        self.done: Future[None] = Future()


class Park:
    """Let running sequences go on for `grace_s`, then release the core; they wait for the next."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.done: Future[None] = Future()


class Redraft:
    """Draft in another way from the next step on; the core stays."""

    def __init__(self, speculation: Speculation) -> None:
        self.speculation = speculation
        self.done: Future[None] = Future()


class SwitchError(RuntimeError):
    """A switch that was not made; the former core serves on."""


def settle(done: Future[None], timeout_s: float) -> None:
    """Wait until the engine thread has made a change; raises SwitchError where it does not.

    One that it has not begun after `timeout_s`, because a step does not return, is withdrawn. Once
    begun it ends with the engine's own steps.
    """
    try:
        done.result(timeout_s)
    except TimeoutError:
        if done.cancel():
            raise SwitchError(f"the engine was busy with a step for {timeout_s:g} s") from None
        done.result()


class Former:
    """What served before; the engine steps it beside what serves now, until all have moved."""

    def __init__(self, runner: Runner, switch: Switch) -> None:
        self.runner = runner
        self.switch = switch
        self._warmed_up_id: int | None = None  # the sequence that the new core is warm for
        self._warm_up: Sequence | None = None

    def move(self, target: Scheduler) -> None:
        """Hand the waiting sequences over, and a running one if `target` has caught up."""
        scheduler = self.runner.scheduler
        for seq in scheduler.queues.take_waiting():
            target.adopt(seq)
        first = scheduler.queues.first_running
        target.is_beside_decoding = first is not None
        warm_up = self._warm_up
        if warm_up is not None and warm_up.status is not SequenceStatus.FINISHED:
            return
        if first is None or target.queues.is_catching_up:
            return
        worth_tokens = _WORTH_BLOCKS * self.runner.core.block_size
        if first.seq_id != self._warmed_up_id and len(first.token_ids) > worth_tokens:
            self._warmed_up_id = first.seq_id
            self._warm_up = _warm_up(first)
            target.add(self._warm_up)
        else:
            target.adopt(scheduler.take(first))

    def step(self) -> tuple[list[TokenEvent], StepCounts]:
        """Advance the sequences that have not moved; events, and what was computed."""
        try:
            return self.runner.step()
        except StepFailedError as failure:
            return self.runner.scheduler.fail(failure.plan, str(failure)), NOTHING


def _warm_up(seq: Sequence) -> Sequence:
    """The text of `seq` so far, of its rank, to be computed and forgotten."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    warm_up = Sequence(
        Submit(WARM_UP_ID, tuple(seq.token_ids), params, seq.arrived_at_s), frozenset()
    )
    warm_up.rank = seq.rank
    warm_up.queued_s = 0.0  # it is no request that the prefix cache is judged by
    return warm_up


def joined_load(current: EngineLoad, former: EngineLoad | None) -> EngineLoad:
    """The load of both; blocks are the new core's, which newcomers get."""
    if former is None:
        return current
    return replace(
        current,
        num_running=current.num_running + former.num_running,
        num_waiting=current.num_waiting + former.num_waiting,
    )
