"""The engine thread: inbox → schedule → core step → commit → one report to the server.

The server starts one `Engine`, submits and aborts from its event loop, and receives every event
through the callback it gave. Everything else here belongs to the thread.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from engine.batch import Core
from engine.migration import (
    WARM_UP_ID,
    Former,
    Park,
    Redraft,
    Switch,
    SwitchError,
    joined_load,
)
from engine.runner import NOTHING, EngineSettings, Runner, StepCounts, StepFailedError
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.speculation.report import SpeculationReport, report
from engine.speculation.setup import OFF, Speculation
from engine.types import Abort, EngineLoad, FinishReason, StepReport, Submit, TokenEvent

log = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5  # an idle thread wakes this often, only to renew its heartbeat
MAX_FAILED_STEPS = 3  # in a row, before the thread gives up
FAILED = f"the engine stopped: {MAX_FAILED_STEPS} steps in a row failed"
JOIN_WAIT_S = 5.0  # beyond the grace time, for the step that runs when it ends


class Engine:
    """Computes submitted sequences on a thread of its own.

    `on_report` is called on that thread, once per step with all events of the step, and on the
    caller's thread for a `submit` that comes after the end.
    """

    def __init__(
        self,
        core: Core,
        settings: EngineSettings,
        on_report: Callable[[StepReport], None],
        speculation: Speculation = OFF,
    ) -> None:
        self._on_report = on_report
        self._eos_token_ids = frozenset(settings.eos_token_ids)
        self._runner = Runner(core, settings, speculation)
        self._former: Former | None = None  # while its sequences move to the core that took over
        self._change: Switch | Park | None = None  # waits for its time
        self._change_until_s = 0.0
        self._is_parked = False
        self._inbox: deque[Submit | Abort | Switch | Park | Redraft] = deque()
        self._inquiries: deque[Future[SpeculationReport]] = deque()
        self._wake = threading.Event()
        # Guards the inbox against its end: a message is either read by the thread or refused.
        self._inbox_lock = threading.Lock()
        self._closed_with: tuple[FinishReason, str | None] | None = None
        self._stop_at_s: float | None = None
        self._is_idle = True
        self._has_new_core = True  # of which the next report tells
        self._num_failed_steps = 0
        self._num_arrivals = 0
        self._heartbeat_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def _scheduler(self) -> Scheduler:
        return self._runner.scheduler

    def start(self) -> None:
        self._thread.start()

    def switch(
        self,
        core: Core,
        settings: EngineSettings,
        *,
        speculation: Speculation = OFF,
        timeout_s: float = 60.0,
    ) -> Future[None]:
        """Serve with another core from the next step on; running sequences move to it.

        The future resolves when all have moved. It fails with SwitchError, and the former core
        serves on, where the new one cannot step, or where sequences that may outgrow the new
        length have not ended after `timeout_s`.
        """
        return self._request_change(Switch(core, settings, speculation, timeout_s))

    def park(self, grace_s: float) -> Future[None]:
        """Release the core once nothing runs or `grace_s` is over; a switch brings the next.

        Sequences that have not ended wait, and so does whatever is submitted meanwhile.
        """
        return self._request_change(Park(grace_s))

    def redraft(self, speculation: Speculation) -> Future[None]:
        """Draft in another way from the next step on. The future fails with SwitchError, and the
        former drafters draft on, where that cannot be done."""
        return self._request_change(Redraft(speculation))

    def speculation(self) -> Future[SpeculationReport]:
        """What speculation does now and why; answered between two steps. Callable anywhere."""
        request: Future[SpeculationReport] = Future()
        with self._inbox_lock:
            if self._closed_with is None:
                self._inquiries.append(request)
            else:
                request.cancel()
        self._wake.set()
        return request

    def submit(self, message: Submit) -> None:
        """Queue a sequence; callable from any thread. After the end it is answered at once."""
        with self._inbox_lock:
            closed_with = self._closed_with
            if closed_with is None:
                self._inbox.append(message)
        if closed_with is None:
            self._wake.set()
        else:
            self._hand_over(StepReport((_refusal(message, *closed_with),), EngineLoad()))

    def abort(self, seq_id: int) -> None:
        """End a sequence before the next step; unknown and finished ids are ignored."""
        self._inbox.append(Abort(seq_id))
        self._wake.set()

    def stop(self, grace_s: float) -> bool:
        """Refuse new sequences, give the others `grace_s` to finish, then abort them.

        Blocks until the thread has ended, so an event loop calls it in another thread. False
        where a step did not return in time: the thread is then left behind.
        """
        with self._inbox_lock:
            if self._closed_with is None:
                self._closed_with = ("abort", None)
        self._stop_at_s = time.monotonic() + grace_s
        self._wake.set()
        if self._thread.ident is None:
            return True
        self._thread.join(grace_s + JOIN_WAIT_S)
        return not self._thread.is_alive()

    def heartbeat_age_s(self) -> float:
        """Seconds since the thread last came round; a step that hangs makes it grow."""
        return time.monotonic() - self._heartbeat_s

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def is_idle(self) -> bool:
        """Whether every message has been handled and no sequence is left."""
        return self._is_idle and not self._inbox

    def check_integrity(self) -> None:
        """Raise AssertionError where the engine's books do not add up; only while idle."""
        self._scheduler.check_integrity()

    def _run(self) -> None:
        try:
            if self._runner.step_costs:
                self._report([], self._load())  # admission wants to know before the first request
            while self._turn():
                pass
        except Exception as error:
            log.exception("the engine thread ends")
            self._close(f"the engine failed: {error!r}")
        # Whoever asked after the last turn is not left waiting.
        with self._inbox_lock:
            for request in self._inquiries:
                request.cancel()

    def _answer_inquiries(self) -> None:
        while self._inquiries:
            request = self._inquiries.popleft()
            # One who has gone away has cancelled it.
            if request.set_running_or_notify_cancel():
                request.set_result(report(self._runner.speculator.policy))

    def _turn(self) -> bool:
        """Handle the inbox and compute one step, or wait for work; false at the end."""
        self._heartbeat_s = time.monotonic()
        self._answer_inquiries()
        if self._has_nothing_to_do() and not self._inbox:
            return self._wait()
        self._is_idle = False
        events = self._read_inbox()
        if self._change is not None:
            self._try_change(self._change)
        stop_at_s = self._stop_at_s
        if stop_at_s is not None and (self._is_parked or self._heartbeat_s >= stop_at_s):
            events += self._end_all("abort")
        counts = NOTHING
        if self._former is not None:
            counts += self._step_former(self._former, events)
        if self._scheduler.has_work and not self._is_parked:
            counts += self._step(events)
        step_s = time.monotonic() - self._heartbeat_s if counts.num_tokens else 0.0
        has_failed = self._num_failed_steps >= MAX_FAILED_STEPS
        if has_failed:
            events += self._end_all("error", FAILED)
        if events or counts.num_tokens or self._has_new_core:
            self._report(events, self._load(), step_s, counts)
        if has_failed:
            self._close(FAILED)
        elif self._former is None:
            self._runner.calibrate_on()  # between two steps, so that it is in the time of none
        return not has_failed

    def _wait(self) -> bool:
        if not self._is_idle:
            if self._runner.end_calibration():
                self._report([], self._load())  # it held blocks until now
            self._scheduler.check_integrity()
            self._is_idle = True
        if self._stop_at_s is not None:
            # Whoever set it had closed the inbox before: what is not in it now never comes.
            return bool(self._inbox)
        self._wake.wait(IDLE_WAIT_S)
        # Cleared before the inbox is read: a message that comes after it sets the event again.
        self._wake.clear()
        return True

    def _read_inbox(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while self._inbox:
            message = self._inbox.popleft()
            event = None
            if isinstance(message, Abort):
                event = self._scheduler.abort(message.seq_id)
                if event is None and self._former is not None:
                    event = self._former.runner.scheduler.abort(message.seq_id)
            elif isinstance(message, Submit):
                event = self._accept(message)
            else:
                self._begin_change(message)
            if event is not None:
                events.append(event)
        return events

    def _accept(self, message: Submit) -> TokenEvent | None:
        num_tokens = len(message.prompt_ids)
        limit = self._runner.settings.max_model_len - 1
        if not 1 <= num_tokens <= limit:
            return _refusal(
                message, "error", f"a prompt must have 1 to {limit} tokens, this has {num_tokens}"
            )
        self._num_arrivals += 1
        self._scheduler.add(Sequence(message, self._eos_token_ids, self._num_arrivals))
        return None

    def _step(self, events: list[TokenEvent]) -> StepCounts:
        """Plan, compute and commit one step; all counts are 0 where it failed."""
        try:
            new_events, counts = self._runner.step()
        except StepFailedError as failure:
            log.exception("a step of %d sequences failed", len(failure.plan.entries))
            if self._former is not None:
                self._revert(self._former, f"the new core's step failed: {failure.__cause__}")
                return NOTHING
            events += self._scheduler.fail(failure.plan, str(failure))
            self._num_failed_steps += 1
            return NOTHING
        assert counts.num_tokens, "there is work, but nothing that a step could advance"
        self._num_failed_steps = 0
        events += new_events
        return counts

    # Changes of the core; see migration.py

    def _request_change(self, message: Switch | Park | Redraft) -> Future[None]:
        with self._inbox_lock:
            if self._closed_with is not None:
                message.done.set_exception(SwitchError("the engine is stopping"))
            else:
                self._inbox.append(message)
        self._wake.set()
        return message.done

    def _has_nothing_to_do(self) -> bool:
        if self._change is not None or self._former is not None:
            return False
        if self._is_parked and self._stop_at_s is None:
            return True
        return not self._scheduler.has_work

    def _begin_change(self, message: Switch | Park | Redraft) -> None:
        if self._change is not None or self._former is not None:
            if _is_wanted(message):
                message.done.set_exception(SwitchError("another change of the core is under way"))
            return
        if isinstance(message, Redraft):
            self._redraft(message)
            return
        self._change = message
        wait_s = message.grace_s if isinstance(message, Park) else message.timeout_s
        self._change_until_s = time.monotonic() + wait_s

    def _redraft(self, message: Redraft) -> None:
        if not _is_wanted(message):
            return
        if self._is_parked:
            message.done.set_exception(SwitchError("there is no core at the moment"))
            return
        try:
            self._runner.change_speculation(message.speculation)
        except Exception as error:
            log.exception("the drafters could not be changed")
            message.done.set_exception(SwitchError(f"the drafters could not be changed: {error}"))
        else:
            message.done.set_result(None)
        self._heartbeat_s = time.monotonic()  # timing the steps is no part of the next one

    def _try_change(self, message: Switch | Park) -> None:
        is_over = self._heartbeat_s >= self._change_until_s
        if isinstance(message, Park):
            has_come = is_over or not self._scheduler.has_work
        else:
            needed, length = self._scheduler.longest_end, message.settings.max_model_len
            has_come = is_over or self._is_parked or needed <= length
        if not has_come and not message.done.cancelled():
            return
        self._change = None
        if not _is_wanted(message):
            return
        if isinstance(message, Park):
            self._park(message)
        elif needed <= length:
            self._switch(message)
        else:
            message.done.set_exception(
                SwitchError(f"a sequence that may grow to {needed} tokens still runs")
            )

    def _switch(self, message: Switch) -> None:
        former = Former(self._runner, message)
        try:
            is_serving = self._scheduler.has_work
            self._runner = Runner(
                message.core, message.settings, message.speculation, is_serving=is_serving
            )
        except Exception as error:
            message.done.set_exception(SwitchError(f"the new core could not be set up: {error}"))
            return
        self._scheduler.continue_counts(former.runner.scheduler)
        self._is_parked = False
        former.move(self._scheduler)
        self._former = former

    def _step_former(self, former: Former, events: list[TokenEvent]) -> StepCounts:
        """Move a sequence if it is time, and advance those that have not moved."""
        former.move(self._scheduler)
        if not former.runner.scheduler.has_work:
            # Once all have caught up the new core has shown that it can step.
            if not self._scheduler.is_catching_up:
                self._former = None
                self._has_new_core = True
                former.switch.done.set_result(None)
            return NOTHING
        new_events, counts = former.step()
        events += new_events
        return counts

    def _revert(self, former: Former, error: str) -> None:
        """Go back to the former core with all sequences."""
        self._scheduler.abort(WARM_UP_ID)
        self._scheduler.suspend_all()
        for seq in self._scheduler.take_waiting():
            former.runner.scheduler.adopt(seq)
        self._runner = former.runner
        self._former = None
        self._has_new_core = True
        former.switch.done.set_exception(SwitchError(error))

    def _park(self, message: Park) -> None:
        self._runner.release_core()
        self._is_parked = True
        message.done.set_result(None)

    def _load(self) -> EngineLoad:
        former = self._former.runner.scheduler.load() if self._former is not None else None
        return joined_load(self._scheduler.load(), former)

    def _end_all(self, reason: FinishReason, error: str | None = None) -> list[TokenEvent]:
        events = self._scheduler.end_all(reason, error)
        if self._former is not None:
            events += self._former.runner.scheduler.end_all(reason, error)
        return events

    def _close(self, error: str) -> None:
        """Answer everything that is or will be submitted with an error."""
        with self._inbox_lock:
            self._closed_with = ("error", error)
            unread = [message for message in self._inbox if isinstance(message, Submit)]
            changes = [m for m in self._inbox if isinstance(m, Switch | Park | Redraft)]
            self._inbox.clear()
        events = self._scheduler.abandon(error)
        if self._change is not None:
            changes.append(self._change)
        changes = [change for change in changes if _is_wanted(change)]
        if self._former is not None:
            events += self._former.runner.scheduler.abandon(error)
            changes.append(self._former.switch)
        for change in changes:
            change.done.set_exception(SwitchError(error))
        events += [_refusal(message, "error", error) for message in unread]
        self._is_idle = True
        if events:
            self._report(events, self._load())

    def _report(
        self,
        events: list[TokenEvent],
        load: EngineLoad,
        step_s: float = 0.0,
        counts: StepCounts = NOTHING,
    ) -> None:
        step_costs = self._runner.step_costs if self._has_new_core else None
        self._has_new_core = False
        self._hand_over(
            StepReport(
                tuple(event for event in events if event.seq_id != WARM_UP_ID),
                load,
                step_s,
                counts.num_tokens,
                counts.num_drafted,
                counts.num_decoding,
                counts.num_emitted,
                step_costs,
            )
        )

    def _hand_over(self, report: StepReport) -> None:
        try:
            self._on_report(report)
        except Exception:
            # A callback that fails, such as one whose event loop has closed, has no readers.
            log.exception("a report was not taken")


def _is_wanted(change: Switch | Park | Redraft) -> bool:
    """Whether its sender still waits for it; from here on it cannot be withdrawn."""
    return change.done.set_running_or_notify_cancel()


def _refusal(message: Submit, reason: FinishReason, error: str | None) -> TokenEvent:
    return TokenEvent(message.seq_id, (), reason, error=error)
