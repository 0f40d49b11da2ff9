"""One apply from its preview to its receipt, on a thread of its own; the applier starts it."""

import logging
import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from engine.config import ConfigError, EngineConfig
from engine.deployment import Deployment
from engine.ledger import Ledger
from engine.machine import available_memory_bytes
from engine.migration import SwitchError, settle
from engine.planning.apply_types import Mode, State, Status, now
from engine.planning.core_probe import self_check
from engine.planning.cost_model import CostModel
from engine.planning.memory import shortage_text
from engine.planning.observer import DecodeWindow
from engine.planning.preview import Preview
from engine.planning.proposal import changes_drafters_only, settings_of
from engine.planning.receipts import MemoryOutcome, Receipt, SpeedOutcome, speed_outcome
from engine.planning.rehearsal import Estimate, rehearse
from engine.speculation.setup import OFF

if TYPE_CHECKING:
    from engine.planning.applier import Applier

log = logging.getLogger(__name__)

_ROOM = 1.05  # of what a new state needs, before it is built beside the old one
_DRAIN_S = 30.0
_PARK_TIMEOUT_S = 60.0  # for a step that is under way
_SWITCH_TIMEOUT_S = 600.0  # until the last sequence has moved
_MIN_STEPS = 24  # of decoding, for a speed to be measured
_ENOUGH_STEPS = 60
_MEASURE_S = 3.0


class ApplyRun:
    """One apply from its preview to its receipt."""

    def __init__(self, applier: "Applier", status: Status, *, measure: bool) -> None:
        self._applier = applier
        self._status = status
        self._measure = measure
        self._old = applier.deployment
        self._began_s = time.monotonic()
        self._build_s = self._switch_s = 0.0
        # What is promised: by the model of a calibrated setting, else by the new core's own steps.
        self._model: CostModel | None = None
        self._estimate: Estimate | None = None
        self._before: DecodeWindow | None = None  # the load and its speed, shortly before
        self._pauses_s: dict[str, float] = {}  # by the state in which they ended

    def run(self) -> None:
        """Never raises: whatever goes wrong becomes the status."""
        self._applier.observer.begin_pauses()
        try:
            self._apply()
        except (ConfigError, SwitchError) as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("an apply failed")
            self._fail(f"unexpected: {error!r}")

    def _apply(self) -> None:
        applier, request = self._applier, self._status.proposal
        config = request.changed(self._old.config)
        self._before = applier.observer.window(time.monotonic() - 10.0, None)
        pace = applier.pace()
        preview = applier.preview(request, measure=self._measure)
        if not preview.memory.fits:
            raise ConfigError(shortage_text(preview.memory))
        plan = applier.planner.plan(config)
        self._model = applier.planner.cost_model(config, plan, measure=False, pace=pace)
        ledger = plan.ledger
        mode = self._mode(config, ledger)
        self._update("building", f"building the new state ({mode})", mode=mode, preview=preview)
        if mode == "next_step":
            self._change_drafters(config, ledger.draft_bytes)
        elif mode == "beside":
            self._build_beside(config)
        else:
            self._build_drained(config)
        new = applier.deployment
        memory = MemoryOutcome(new.loaded.ledger.components(), new.measured().components())
        del new  # a rollback may need its memory
        self._finish(memory, preview)

    def _mode(self, config: EngineConfig, ledger: Ledger) -> Mode:
        if changes_drafters_only(self._old.config, config):
            return "next_step"
        needed = (ledger.total_bytes - ledger.runtime_bytes) * _ROOM
        return "beside" if needed <= available_memory_bytes() else "drain"

    def _change_drafters(self, config: EngineConfig, draft_bytes: int) -> None:
        """The core stays, and with it all that it has computed."""
        applier = self._applier
        began_s = time.monotonic()
        new = applier.rebuild_drafters(config, draft_bytes)
        self._build_s = time.monotonic() - began_s
        self._update("switching", "the next step drafts in the new way")
        began_s = time.monotonic()
        settle(applier.engine().redraft(new.loaded.speculation), _SWITCH_TIMEOUT_S)
        self._switch_s = time.monotonic() - began_s
        applier.deployment = new
        applier.announce(new, new.loaded.max_model_len)

    def _build_beside(self, config: EngineConfig) -> None:
        applier = self._applier
        new = self._timed_build(config)
        self._check(new)
        shorter = min(new.loaded.max_model_len, self._old.loaded.max_model_len)
        applier.announce(self._old, shorter)
        try:
            self._switch_to(new)
        except BaseException:
            applier.announce(self._old, self._old.loaded.max_model_len)
            raise

    def _build_drained(self, config: EngineConfig) -> None:
        """Memory does not hold both: release the old state, then build; else build it again."""
        applier = self._applier
        shorter = applier.planner.plan(config).context.max_model_len
        length = self._old.loaded.max_model_len
        applier.announce(self._old, min(shorter, length))
        try:
            settle(applier.engine().park(_DRAIN_S), _DRAIN_S + _PARK_TIMEOUT_S)
        except BaseException:
            applier.announce(self._old, length)
            raise
        # The last references to the old core and its memory: a drafter shares parts of it.
        self._old = applier.deployment = msgspec.structs.replace(
            self._old,
            loaded=msgspec.structs.replace(self._old.loaded, core=None, speculation=OFF),
        )
        applier.announce(self._old, min(shorter, length))
        try:
            new = self._timed_build(config)
            self._check(new)
            self._switch_to(new)
        except BaseException as error:
            self._update("building", f"building the old state again: {error}")
            self._build_again(self._old.config)
            raise

    def _build_again(self, config: EngineConfig) -> None:
        """Serve with the old setting again after the core has been released."""
        applier = self._applier
        try:
            again = applier.build(config)
            self._old = applier.deployment = again
            self._hand_over(again)
        except BaseException:
            # Nothing is left to serve with: nobody may wait for it, and /health has to say so.
            log.critical("there is no state to serve with: the engine ends")
            applier.engine().stop(0.0)
            raise
        applier.announce(again, again.loaded.max_model_len)

    def _timed_build(self, config: EngineConfig) -> Deployment:
        began_s = time.monotonic()
        new = self._applier.build(config)
        self._build_s = time.monotonic() - began_s
        return new

    def _check(self, new: Deployment) -> None:
        self._update("checking", "the new state computes a text at once and token by token")
        fault = self_check(new.loaded.core, new.loaded.spec.vocab_size)
        if fault is not None:
            raise ConfigError(f"the new state failed its self-check: {fault}")
        if self._model is None and self._status.mode == "beside":
            self._estimate = rehearse(self._applier.engine(), new, self._before)

    def _switch_to(self, new: Deployment) -> None:
        """Move the running sequences; on return the new deployment is the one that serves."""
        applier = self._applier
        self._update("switching", "running sequences move to the new state")
        began_s = time.monotonic()
        self._hand_over(new)
        self._switch_s = time.monotonic() - began_s
        applier.deployment = new
        applier.announce(new, new.loaded.max_model_len)

    def _hand_over(self, to: Deployment) -> None:
        speculation = to.loaded.speculation
        done = self._applier.engine().switch(
            to.loaded.core, to.engine_settings, speculation=speculation
        )
        settle(done, _SWITCH_TIMEOUT_S)

    def _finish(self, memory: MemoryOutcome, preview: Preview) -> None:
        self._update("measuring", "measuring what the new setting does")
        window = self._observe()
        speed = speed_outcome(window, self._model, self._before, self._estimate)
        missed = (
            speed.predicted is not None
            and speed.measured is not None
            and speed.measured < speed.predicted.low
        )
        if missed and self._status.proposal.auto_rollback:
            assert speed.predicted is not None
            reason = (
                f"measured {speed.measured:.1f} tokens/s, the promise was at least "
                f"{speed.predicted.low:.1f}"
            )
            self._update("switching", f"rolling back: {reason}")
            self._roll_back()
            self._end("rolled_back", reason, memory, speed, preview)
            return
        reason = "measured speed is below the promise" if missed else "as promised"
        if speed.predicted is None:
            reason = "speed was not predicted"
        self._end("done", reason, memory, speed, preview)

    def _observe(self) -> DecodeWindow | None:
        """Watch decode steps for a while; where there are too few, decode something."""
        applier = self._applier
        since_s = time.monotonic()
        has_probed = False
        while True:
            time.sleep(0.1)
            num_steps = applier.observer.num_steps(since_s)
            waited_s = time.monotonic() - since_s
            is_enough = waited_s >= _MEASURE_S and num_steps >= _MIN_STEPS
            is_plenty = waited_s > _MEASURE_S / 3 and num_steps >= _ENOUGH_STEPS
            if is_enough or is_plenty or waited_s > 3 * _MEASURE_S:
                return applier.observer.window(since_s, self._model)
            if num_steps < _MIN_STEPS and waited_s > _MEASURE_S / 6 and not has_probed:
                has_probed = True
                applier.probe()

    def _roll_back(self) -> None:
        applier = self._applier
        old, new = self._old, applier.deployment
        if self._status.mode == "next_step":
            settle(applier.engine().redraft(old.loaded.speculation), _SWITCH_TIMEOUT_S)
        else:
            applier.announce(new, min(old.loaded.max_model_len, new.loaded.max_model_len))
            if self._status.mode == "drain":
                settle(applier.engine().park(0.0), _PARK_TIMEOUT_S)
                applier.announce(old, min(old.loaded.max_model_len, new.loaded.max_model_len))
                applier.deployment = old
                del new  # its memory is needed
                self._build_again(old.config)
                return
            self._hand_over(old)
        applier.deployment = old
        applier.announce(old, old.loaded.max_model_len)

    def _fail(self, error: str) -> None:
        self._end("failed", error, None, None, self._status.preview)

    def _end(
        self,
        state: State,
        reason: str,
        memory: MemoryOutcome | None,
        speed: SpeedOutcome | None,
        preview: Preview | None,
    ) -> None:
        applier = self._applier
        self._note_pause()
        applier.observer.end_pauses()
        outcomes: dict[State, Literal["kept", "rolled_back", "failed"]] = {
            "done": "kept",
            "rolled_back": "rolled_back",
        }
        receipt = Receipt(
            id=self._status.id,
            at=now(),
            outcome=outcomes.get(state, "failed"),
            reason=reason,
            before=settings_of(self._old.config),
            after=settings_of(applier.deployment.config),
            mode=self._status.mode,
            build_s=self._build_s,
            switch_s=self._switch_s,
            longest_pause_s=max(self._pauses_s.values()),
            pauses_s=self._pauses_s,
            memory=memory,
            speed=speed,
            quality=preview.quality if preview is not None else None,
        )
        applier.keep_receipt(receipt)
        log.info("%s: %s, %s", receipt.id, receipt.outcome, reason)
        self._update(state, reason, receipt=receipt)

    def _note_pause(self) -> None:
        state, pause_s = self._status.state, self._applier.observer.take_pause_s()
        self._pauses_s[state] = max(pause_s, self._pauses_s.get(state, 0.0))

    def _update(self, state: State, detail: str, **changes: Any) -> None:
        self._note_pause()
        seconds = time.monotonic() - self._began_s
        self._status = msgspec.structs.replace(
            self._status, state=state, detail=detail, seconds=seconds, **changes
        )
        self._applier.keep(self._status)
