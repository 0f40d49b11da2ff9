"""One core with the scheduler, the batch and the drafters that drive it: computes a step at a time.

The engine loop owns one, and for a while two where another core takes over.
"""

import logging
import time
from collections.abc import Generator

import msgspec

from engine.batch import Batch, Core
from engine.block_manager import BlockManager
from engine.scheduler import Scheduler, StepPlan
from engine.speculation.calibration import MOST_CALIBRATED_TOKENS, calibration
from engine.speculation.policy import SpeculationPolicy
from engine.speculation.setup import OFF, Speculation
from engine.speculation.speculator import Speculator
from engine.types import TokenEvent

CALIBRATION_S = 1.0  # at most, of steps and drafts that are timed

log = logging.getLogger(__name__)


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine thread must know of the model and the options, decided at load."""

    max_model_len: int
    num_kv_blocks: int  # that the core has allocated
    eos_token_ids: tuple[int, ...]
    max_sequences: int = 64
    max_step_tokens: int = 512
    num_kept_blocks: int | None = None  # for text that nobody holds; None: all


class StepCounts(msgspec.Struct, frozen=True):
    """What a step computed; see `StepReport`."""

    num_tokens: int = 0
    num_drafted: int = 0
    num_decoding: int = 0
    num_emitted: int = 0

    def __add__(self, other: "StepCounts") -> "StepCounts":
        return StepCounts(
            self.num_tokens + other.num_tokens,
            self.num_drafted + other.num_drafted,
            self.num_decoding + other.num_decoding,
            self.num_emitted + other.num_emitted,
        )


NOTHING = StepCounts()


class StepFailedError(RuntimeError):
    """A step that could not be computed; the sequences of its plan have not advanced."""

    def __init__(self, plan: StepPlan, error: Exception) -> None:
        super().__init__(f"the model could not be computed: {error}")
        self.plan = plan


class ParkedCore:
    """Stands in while there is no core; no step is planned then."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def bind(self, **buffers: object) -> None:
        """Keep nothing."""

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        raise AssertionError("a step while the engine is parked")


class Runner:
    """Plans, computes and commits steps on one core."""

    def __init__(
        self,
        core: Core,
        settings: EngineSettings,
        speculation: Speculation = OFF,
        *,
        is_serving: bool = False,
    ) -> None:
        """While it is to serve at once, what steps cost is timed later, by `calibrate_on`."""
        if settings.num_kv_blocks * core.block_size < settings.max_model_len:
            raise ValueError(
                f"{settings.num_kv_blocks} KV blocks of {core.block_size} tokens cannot hold one "
                f"sequence of {settings.max_model_len}; allocate more or lower max_model_len"
            )
        if settings.max_step_tokens < settings.max_sequences:
            raise ValueError("max_step_tokens must be at least max_sequences")
        self.core = core
        self.settings = settings
        hidden = speculation.hidden_states(settings.max_sequences)
        self._batch = Batch(
            core,
            max_sequences=settings.max_sequences,
            max_step_tokens=settings.max_step_tokens,
            max_model_len=settings.max_model_len,
            eos_token_ids=frozenset(settings.eos_token_ids),
            hidden=hidden,
        )
        self._blocks = BlockManager(
            settings.num_kv_blocks, core.block_size, settings.num_kept_blocks
        )
        self.scheduler = Scheduler(
            self._blocks,
            max_sequences=settings.max_sequences,
            max_step_tokens=settings.max_step_tokens,
            max_model_len=settings.max_model_len,
        )
        self._hidden = hidden
        policy = speculation.policy(self._batch, hidden, max_step_tokens=settings.max_step_tokens)
        self._calibration = self._calibrate(policy)
        if not is_serving:
            self.end_calibration()
        self.speculator = self._speculator(policy)

    @property
    def step_costs(self) -> tuple[tuple[int, float], ...]:
        """(tokens, seconds) of steps, as timed when the core was set up and learned since."""
        return tuple(self.speculator.policy.costs.step.points())

    def step(self) -> tuple[list[TokenEvent], StepCounts]:
        """Compute one step: its events and its counts, all 0 where there was nothing to do.

        Raises StepFailedError where the core could not.
        """
        plan = self.scheduler.schedule()
        if not plan.entries:
            return [], NOTHING
        try:
            self.speculator.extend(plan)
            for seq in plan.admitted:
                self._batch.open_lane(seq)
            began_s = time.perf_counter()
            num_tokens, num_sequences, num_rows = self._batch.fill(plan.entries)
            self.core.step(num_tokens, num_sequences, num_rows)
        except Exception as error:
            raise StepFailedError(plan, error) from error
        events = self.scheduler.commit(plan, self._batch.sampled())
        # What Python does for a step counts too: drafts save whole steps.
        self.speculator.learn(plan, num_tokens, time.perf_counter() - began_s)
        return events, StepCounts(num_tokens, plan.num_drafted, plan.num_decoding, plan.num_emitted)

    def change_speculation(self, speculation: Speculation) -> None:
        """Draft in another way from the next step on; core, cache and texts stay as they are.

        Raises what hinders it; the former drafters then draft on.
        """
        settings, known = self.settings, self.speculator.policy.costs.step
        hidden = speculation.hidden_states(settings.max_sequences)
        try:
            policy = speculation.policy(
                self._batch, hidden, max_step_tokens=settings.max_step_tokens
            )
            self._batch.keep_hidden(hidden)
            if policy.drafters and known.is_known:
                for size, seconds in known.points():
                    policy.costs.step.seed(size, seconds)
        except BaseException:
            self._batch.keep_hidden(self._hidden)
            raise
        self._calibration.close()
        if not known.is_known:
            self._calibration = self._calibrate(policy)
            if not self.scheduler.has_work:
                self.end_calibration()
        self._hidden = hidden
        self.scheduler.forget_hidden()
        self.speculator = self._speculator(policy)

    def _speculator(self, policy: SpeculationPolicy) -> Speculator:
        return Speculator(policy, self.scheduler, self._batch.lanes, self.settings.max_step_tokens)

    def calibrate_on(self) -> None:
        """Time one more size of a step, or of drafts, where that is not complete."""
        try:
            next(self._calibration, None)
        except Exception:
            # It has ended by that; what is not known yet, serving will tell.
            log.exception("what steps and drafts cost could not be timed")

    def end_calibration(self) -> None:
        """Time what is left of them, while nobody waits for a step."""
        for _ in self._calibration:
            pass

    def _calibrate(self, policy: SpeculationPolicy) -> Generator[None]:
        """Seed what a step costs, a size at a time; where no block is free, serving will tell."""
        if not policy.drafters:
            return
        blocks, block_size = self._blocks, self.core.block_size
        most_tokens = min(MOST_CALIBRATED_TOKENS, self.settings.max_step_tokens)
        count = min(
            blocks.num_free,
            blocks.num_blocks_for(most_tokens),
            blocks.num_blocks_for(self.settings.max_model_len),
        )
        taken = blocks.allocate(count)
        try:
            most_tokens = min(most_tokens, count * block_size, self.settings.max_model_len)
            yield from calibration(self._batch, policy, most_tokens, taken, CALIBRATION_S)
        finally:
            blocks.release(taken)

    def time_step(self, num_tokens: int, num_rows: int | None = None) -> float | None:
        """Seconds of a made-up step; None where no block is free for it. Between two steps.

        The second of two counts: as when serving, the core's own step has come before. Logits are
        computed for `num_rows` tokens, by default all.
        """
        if num_tokens > self.settings.max_step_tokens:
            return None
        blocks = self._blocks
        count = blocks.num_blocks_for(num_tokens)
        if blocks.num_free < count:
            return None
        taken = blocks.allocate(count)
        try:
            self._batch.time_probe(num_tokens, taken, num_rows=num_rows)
            return self._batch.time_probe(num_tokens, taken, num_rows=num_rows)
        finally:
            blocks.release(taken)

    def release_core(self) -> None:
        """Put the running sequences back in the queue and let the core go; no step follows."""
        self._calibration.close()
        self.scheduler.suspend_all()
        self.core = ParkedCore(self.core.block_size)
        self._batch = Batch(
            self.core,
            max_sequences=1,
            max_step_tokens=1,
            max_model_len=self.core.block_size,
            eos_token_ids=frozenset(),
        )
        self._hidden = None
        self.speculator = Speculator(
            OFF.policy(self._batch, None, max_step_tokens=1), self.scheduler, self._batch.lanes, 1
        )
