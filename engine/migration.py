"""The change of the core or of the drafters under running sequences: messages to the engine thread,
and the state that served before until its sequences have moved.

A sequence moves between two steps and is computed again from its tokens by the new core. One moves
at a time, while the others go on decoding where they are: the pause of each is its own computation
and not everybody's.
"""

from concurrent.futures import Future

from msgspec.structs import replace

from engine.batch import Core
from engine.runner import NOTHING, EngineSettings, Runner, StepCounts, StepFailedError
from engine.scheduler import Scheduler
from engine.speculation.setup import Speculation
from engine.types import EngineLoad, TokenEvent


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


class Former:
    """What served before; the engine steps it beside what serves now, until all have moved."""

    def __init__(self, runner: Runner, switch: Switch) -> None:
        self.runner = runner
        self.switch = switch

    def move(self, target: Scheduler) -> None:
        """Hand the waiting sequences over, and a running one if `target` has caught up."""
        scheduler = self.runner.scheduler
        for seq in scheduler.take_waiting():
            target.adopt(seq)
        if not target.is_catching_up:
            running = scheduler.take_running()
            if running is not None:
                target.adopt(running)

    def step(self) -> tuple[list[TokenEvent], StepCounts]:
        """Advance the sequences that have not moved; events, and what was computed."""
        try:
            return self.runner.step()
        except StepFailedError as failure:
            return self.runner.scheduler.fail(failure.plan, str(failure)), NOTHING


def joined_load(current: EngineLoad, former: EngineLoad | None) -> EngineLoad:
    """The load of both; blocks are the new core's, which newcomers get."""
    if former is None:
        return current
    return replace(
        current,
        num_running=current.num_running + former.num_running,
        num_waiting=current.num_waiting + former.num_waiting,
    )
