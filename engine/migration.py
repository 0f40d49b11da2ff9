"""The change of the core under running sequences: messages to the engine thread, and the state
that served before until its sequences have moved.

A sequence moves between two steps and is computed again from its tokens by the new core. One moves
at a time, while the others go on decoding where they are: the pause of each is its own computation
and not everybody's.
"""

from concurrent.futures import Future
from typing import TYPE_CHECKING

from msgspec.structs import replace

from engine.batch import Batch, Core
from engine.scheduler import Scheduler
from engine.types import EngineLoad, TokenEvent

if TYPE_CHECKING:
    from engine.loop import EngineSettings


class Switch:
    """Serve with another core from the next step on.

    `done` resolves when every sequence has moved; it fails, and the former core serves on, where
    the new one's steps fail before that.
    """

    def __init__(self, core: Core, settings: "EngineSettings", timeout_s: float) -> None:
        self.core = core
        self.settings = settings
        self.timeout_s = timeout_s  # for sequences that the new length could not hold
        self.done: Future[None] = Future()


class Park:
    """Let running sequences go on for `grace_s`, then release the core; they wait for the next."""

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self.done: Future[None] = Future()


class SwitchError(RuntimeError):
    """A switch that was not made; the former core serves on."""


class Former:
    """Core, scheduler and batch that served before; the engine steps them beside the new ones."""

    def __init__(
        self,
        core: Core,
        settings: "EngineSettings",
        scheduler: Scheduler,
        batch: Batch,
        switch: Switch,
    ) -> None:
        self.core = core
        self.settings = settings
        self.scheduler = scheduler
        self.batch = batch
        self.switch = switch

    def move(self, target: Scheduler) -> None:
        """Hand the waiting sequences over, and a running one if `target` has caught up."""
        for seq in self.scheduler.take_waiting():
            target.adopt(seq)
        if not target.is_catching_up:
            running = self.scheduler.take_running()
            if running is not None:
                target.adopt(running)

    def step(self) -> tuple[list[TokenEvent], int]:
        """Advance the sequences that have not moved; events, and the number of tokens."""
        plan = self.scheduler.schedule()
        if not plan.entries:
            return [], 0
        for seq in plan.admitted:
            self.batch.open_lane(seq)
        num_tokens, num_sequences, num_rows = self.batch.fill(plan.entries)
        try:
            self.core.step(num_tokens, num_sequences, num_rows)
        except Exception as error:
            return self.scheduler.fail(plan, f"the model could not be computed: {error}"), 0
        return self.scheduler.commit(plan, self.batch.sampled()), num_tokens


class ParkedCore:
    """Stands in while there is no core; the engine plans no step then."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def bind(self, **buffers: object) -> None:
        """Keep nothing."""

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        raise AssertionError("a step while the engine is parked")


def joined_load(current: EngineLoad, former: EngineLoad | None) -> EngineLoad:
    """The load of both; blocks are the new core's, which newcomers get."""
    if former is None:
        return current
    return replace(
        current,
        num_running=current.num_running + former.num_running,
        num_waiting=current.num_waiting + former.num_waiting,
    )
