"""Applies a proposal while requests run: build, check, switch, measure, keep or roll back.

One apply at a time, on a thread of its own. Whatever fails before the switch leaves the old state
serving; afterwards a receipt says what was promised and what came of it.
"""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any, Protocol, TypeVar

import msgspec

from engine.config import ConfigError, EngineConfig
from engine.deployment import Deployment, deploy, reclaimable_bytes, redeploy
from engine.machine import available_memory_bytes
from engine.planning.apply_run import ApplyRun
from engine.planning.apply_types import ApplyBusy, ApplyRequest, Status, now
from engine.planning.drafting import measured_drafts
from engine.planning.memory import shortage_text
from engine.planning.observer import Observer
from engine.planning.pace import Pace
from engine.planning.preview import Planner, Preview
from engine.planning.proposal import Proposal
from engine.planning.quality import Quality, QualityMeasurer
from engine.planning.receipts import Receipt, ReceiptLog
from engine.runner import EngineSettings, Runner
from engine.speculation.profiles import DraftProfiles
from engine.speculation.report import SpeculationReport
from engine.speculation.setup import Speculation
from engine.types import SamplingParams, Submit

log = logging.getLogger(__name__)

T = TypeVar("T")

_NICENESS = 10  # of the thread that packs weights beside those that serve
_ANY_BYTES = 1 << 60
_PROBE_TOKENS = 64
_KEPT_STATUSES = 50
_PACE_S = 30.0  # of steps that say how fast the machine is now
_REPORT_WAIT_S = 2.0  # a step may be under way


class SwitchableEngine(Protocol):
    """What the applier asks of the engine."""

    def submit(self, message: Submit) -> None: ...

    def switch(
        self,
        core: Any,
        settings: EngineSettings,
        *,
        speculation: Speculation = ...,
        timeout_s: float = 60.0,
    ) -> Future[None]: ...

    def park(self, grace_s: float) -> Future[None]: ...

    def redraft(self, speculation: Speculation) -> Future[None]: ...

    def speculation(self) -> Future[SpeculationReport]: ...

    def draft_profiles(self) -> Future[DraftProfiles]: ...

    def time_step(self, num_tokens: int, other: Runner | None = ...) -> Future[float | None]: ...

    def stop(self, grace_s: float) -> object: ...


class Applier:
    """Owns what serves now, once it has been given the first deployment and its engine."""

    def __init__(
        self,
        planner: Planner,
        deployment: Deployment,
        receipts: ReceiptLog,
        *,
        observer: Observer,
        on_change: Callable[[Deployment, int], None],
        build: Callable[..., Deployment] = deploy,
        measurer: QualityMeasurer | None = None,
    ) -> None:
        """`on_change(deployment, max_model_len)` tells the server what requests may ask for.

        It is called on the applier's thread, before a switch that shortens the length and after
        every switch.
        """
        self.planner = planner
        self.deployment = deployment
        self.observer = observer
        self.receipts = receipts
        self._on_change = on_change
        self._build = build
        self._engine: SwitchableEngine | None = None
        self._lock = threading.Lock()
        self._statuses: dict[str, Status] = {}
        self._ids = itertools.count(1)
        self._probe_ids = itertools.count(-1, -1)  # no request has a negative id
        self._thread: threading.Thread | None = None
        self._applied: dict[str, EngineConfig] = {}  # by receipt
        self._measurer = measurer
        self._serves_since_s = time.monotonic()  # with the settings of today

    def attach(self, engine: SwitchableEngine) -> None:
        """Give it the engine that serves the first deployment."""
        self._engine = engine

    @property
    def is_busy(self) -> bool:
        return any(not status.has_ended for status in list(self._statuses.values()))

    def available_bytes(self) -> int:
        """What a deployment in place of the present one could take, its runtime included."""
        ledger = self.deployment.loaded.ledger
        return available_memory_bytes() + reclaimable_bytes(ledger) + ledger.runtime_bytes

    def preview(self, proposal: Proposal, *, measure: bool) -> Preview:
        """What a proposal would do; raises ConfigError."""
        today = self.deployment.config
        self.learn_drafts()
        preview = self.planner.preview(
            today,
            proposal,
            available_bytes=self.available_bytes(),
            measure=measure,
            pace=self.pace(),
        )
        return msgspec.structs.replace(preview, quality=self.quality(proposal.changed(today)))

    def pace(self) -> Pace | None:
        """How fast what serves has been of late against its calibration; None: not known."""
        config = self.deployment.config
        model = self.planner.cost_model(config, self.planner.plan(config), measure=False)
        if model is None:
            return None
        since_s = max(self._serves_since_s, time.monotonic() - _PACE_S)
        return self.observer.pace(since_s, model)

    def status(self, apply_id: str) -> Status | None:
        return self._statuses.get(apply_id)

    def latest(self) -> Status | None:
        """The apply that runs or ran last."""
        return next(reversed(list(self._statuses.values())), None)

    def start(self, request: ApplyRequest, *, measure: bool) -> Status:
        """Begin; raises ConfigError for values that cannot work and ApplyBusy while one runs.

        With `measure`, a setting that was never timed is timed first.
        """
        with self._lock:
            if self.is_busy:
                raise ApplyBusy("an apply is under way; ask again when it has ended")
            memory = self.preview(request, measure=False).memory
            if not memory.fits:
                raise ConfigError(shortage_text(memory))
            status = Status(
                id=f"apply-{next(self._ids)}",
                state="previewing",
                detail="predicting what the setting will do",
                mode="none",
                proposal=request,
                began_at=now(),
                seconds=0.0,
            )
            self.keep(status)
        run = ApplyRun(self, status, measure=measure)
        self._thread = threading.Thread(target=run.run, name="apply", daemon=True)
        self._thread.start()
        return status

    def wait(self, timeout_s: float) -> None:
        """Wait for the apply that runs, if one does."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def keep(self, status: Status) -> None:
        """Publish how far an apply is."""
        statuses = {**self._statuses, status.id: status}
        for apply_id in list(statuses)[:-_KEPT_STATUSES]:
            del statuses[apply_id]
        self._statuses = statuses

    def engine(self) -> SwitchableEngine:
        assert self._engine is not None, "attach was not called"
        return self._engine

    def build(self, config: EngineConfig) -> Deployment:
        """Load a state beside the one that serves, whose text side it takes over."""
        loaded = self.deployment.loaded
        return self._build(
            config,
            niceness=_NICENESS,
            available_bytes=_ANY_BYTES,
            text=(loaded.tokenizer, loaded.chat_template),
        )

    def rebuild_drafters(self, config: EngineConfig, draft_bytes: int) -> Deployment:
        """Load other drafters for the core that serves."""
        return redeploy(self.deployment, config, self.planner.headers, draft_bytes)

    def speculation_report(self) -> SpeculationReport | None:
        """What speculation does; None where the engine does not answer or nobody drafts."""
        if not self.deployment.loaded.speculation.drafters:
            return None
        return _answer(self.engine().speculation())

    def learn_drafts(self) -> None:
        """Let predictions rest on what the drafters have shown by now."""
        if not self.deployment.loaded.speculation.drafters:
            return
        report = _answer(self.engine().speculation())
        profiles = _answer(self.engine().draft_profiles())
        if report is None or profiles is None:
            return
        planner = self.planner
        planner.measured_drafts = planner.measured_drafts.renewed(measured_drafts(report, profiles))

    def quality(self, config: EngineConfig) -> Quality:
        """Of a setting; where it was never measured, that begins in the background."""
        plan = self.planner.plan(config)
        quality = self.planner.quality(config, plan)
        # Not beside an apply: it would weigh on the speed that a receipt is about.
        if quality.basis != "measured" and self._measurer is not None and not self.is_busy:
            self._measurer.request(self.planner.quality_key(plan), config)
            if self._measurer.is_busy:
                return msgspec.structs.replace(quality, note="being measured in the background")
        return quality

    def keep_receipt(self, receipt: Receipt) -> None:
        """Write the receipt of what was applied last."""
        self._applied[receipt.id] = self.deployment.config
        self._serves_since_s = time.monotonic()
        hindrance = self.receipts.append(receipt)
        if hindrance is not None:
            log.warning("a receipt could not be kept: %s", hindrance)

    def latest_receipts(self) -> list[Receipt]:
        """The newest first, each with the quality that is known by now."""
        return [
            msgspec.structs.replace(receipt, quality=self.quality(self._applied[receipt.id]))
            if receipt.quality is not None and receipt.quality.basis != "measured"
            else receipt
            for receipt in self.receipts.latest()
        ]

    def stop(self) -> None:
        """End what runs in the background."""
        if self._measurer is not None:
            self._measurer.stop()

    def announce(self, deployment: Deployment, max_model_len: int) -> None:
        self._on_change(deployment, max_model_len)

    def probe(self) -> None:
        """Decode a sequence of the applier's own, so that there is something to measure."""
        params = SamplingParams(max_tokens=_PROBE_TOKENS, temperature=0.0, ignore_eos=True)
        vocab_size = self.deployment.loaded.spec.vocab_size
        prompt = tuple(7919 * i % vocab_size for i in range(1, 17))
        self.engine().submit(Submit(next(self._probe_ids), prompt, params, time.monotonic()))


def _answer(inquiry: Future[T]) -> T | None:
    """What the engine thread answers; None where it does not."""
    try:
        return inquiry.result(_REPORT_WAIT_S)
    except (TimeoutError, CancelledError):
        inquiry.cancel()
        return None
