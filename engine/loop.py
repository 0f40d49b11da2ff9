"""The engine thread: inbox → schedule → core step → commit → one report to the server.

The server starts one `Engine`, submits and aborts from its event loop, and receives every event
through the callback it gave. Everything else here belongs to the thread.
"""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from engine.batch import Core
from engine.inbox import Inbox
from engine.inquiries import Inquiries, T
from engine.migration import WARM_UP_ID, Park, Redraft, Switch, SwitchError
from engine.runner import NOTHING, EngineSettings, Runner, StepCounts, StepFailedError
from engine.sequence import Sequence
from engine.speculation.profiles import DraftProfiles
from engine.speculation.report import SpeculationReport, report
from engine.speculation.setup import OFF, Speculation
from engine.succession import Change, Succession
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
        self._succession = Succession(Runner(core, settings, speculation))
        self._inbox = Inbox()
        self._inquiries = Inquiries()
        self._stop_at_s: float | None = None
        self._is_idle = True
        self._num_failed_steps = 0
        self._num_arrivals = 0
        self._reported_load = EngineLoad()
        self._heartbeat_s = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

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
        return self._ask(lambda runner: report(runner.speculator.policy))

    def draft_profiles(self) -> Future[DraftProfiles]:
        """What recent drafts promised; answered likewise."""
        return self._ask(lambda runner: runner.speculator.policy.profiles())

    def time_step(
        self, num_tokens: int, other: Runner | None = None, *, num_rows: int | None = None
    ) -> Future[float | None]:
        """Seconds of a made-up step, computed between two steps; None where no block is free.

        It is one of the core that serves, or of `other`, which nobody else may use meanwhile.
        """
        return self._ask(lambda runner: (other or runner).time_step(num_tokens, num_rows))

    def _ask(self, question: Callable[[Runner], T]) -> Future[T]:
        answer = self._inquiries.ask(question)
        self._inbox.wake()
        return answer

    def submit(self, message: Submit) -> None:
        """Queue a sequence; callable from any thread. After the end it is answered at once."""
        closed_with = self._inbox.post(message)
        if closed_with is not None:
            self._hand_over(StepReport((_refusal(message, *closed_with),), EngineLoad()))

    def abort(self, seq_id: int) -> None:
        """End a sequence before the next step; unknown and finished ids are ignored."""
        self._inbox.post_abort(Abort(seq_id))

    def stop(self, grace_s: float) -> bool:
        """Refuse new sequences, give the others `grace_s` to finish, then abort them.

        Blocks until the thread has ended, so an event loop calls it in another thread. False
        where a step did not return in time: the thread is then left behind.
        """
        self._inbox.close("abort")
        self._stop_at_s = time.monotonic() + grace_s
        self._inbox.wake()
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
        self._succession.scheduler.check_integrity()

    def _run(self) -> None:
        try:
            if self._succession.runner.step_costs:
                # Admission wants to know before the first request.
                self._report([], has_new_core=self._succession.take_new())
            while self._turn():
                pass
        except Exception as error:
            log.exception("the engine thread ends")
            self._close(f"the engine failed: {error!r}")
        # Whoever asked after the last turn is not left waiting.
        self._inquiries.end()

    def _turn(self) -> bool:
        """Handle the inbox and compute one step, or wait for work; false at the end."""
        self._heartbeat_s = time.monotonic()
        self._inquiries.answer(self._succession.runner)
        self._heartbeat_s = time.monotonic()  # what answers took is no part of the next step
        if self._has_nothing_to_do() and not self._inbox:
            return self._wait()
        self._is_idle = False
        events = self._read_inbox()
        succession = self._succession
        succession.advance(self._heartbeat_s)
        stop_at_s = self._stop_at_s
        if stop_at_s is not None and (succession.is_parked or self._heartbeat_s >= stop_at_s):
            events += succession.end_all("abort")
        counts = succession.step_former(events) + self._step(events)
        step_s = time.monotonic() - self._heartbeat_s if counts.num_tokens else 0.0
        has_failed = self._num_failed_steps >= MAX_FAILED_STEPS
        if has_failed:
            events += succession.end_all("error", FAILED)
        is_new = succession.take_new()
        if events or counts.num_tokens or is_new:
            self._report(events, step_s, counts, has_new_core=is_new)
        if has_failed:
            self._close(FAILED)
        elif not succession.is_moving:
            # Between two steps, so that it is in the time of none.
            succession.runner.calibrate_on()
        return not has_failed

    def _has_nothing_to_do(self) -> bool:
        succession = self._succession
        if succession.is_changing:
            return False
        if succession.is_parked and self._stop_at_s is None:
            return True
        return not succession.scheduler.has_work

    def _wait(self) -> bool:
        if not self._is_idle:
            self._succession.runner.end_calibration()
            if self._succession.load() != self._reported_load:
                self._report([])  # the calibration held blocks until now
            self._succession.scheduler.check_integrity()
            self._is_idle = True
        if self._stop_at_s is not None:
            # Whoever set it had closed the inbox before: what is not in it now never comes.
            return bool(self._inbox)
        self._inbox.wait(IDLE_WAIT_S)
        return True

    def _read_inbox(self) -> list[TokenEvent]:
        events: list[TokenEvent] = []
        while (message := self._inbox.take()) is not None:
            event = None
            if isinstance(message, Abort):
                event = self._succession.abort(message.seq_id)
            elif isinstance(message, Submit):
                event = self._accept(message)
            else:
                self._succession.begin(message, time.monotonic())
                self._heartbeat_s = time.monotonic()  # what it took is no part of the next step
            if event is not None:
                events.append(event)
        return events

    def _accept(self, message: Submit) -> TokenEvent | None:
        num_tokens = len(message.prompt_ids)
        limit = self._succession.runner.settings.max_model_len - 1
        if not 1 <= num_tokens <= limit:
            return _refusal(
                message, "error", f"a prompt must have 1 to {limit} tokens, this has {num_tokens}"
            )
        self._num_arrivals += 1
        self._succession.scheduler.add(Sequence(message, self._eos_token_ids, self._num_arrivals))
        return None

    def _step(self, events: list[TokenEvent]) -> StepCounts:
        """One step of what serves; all counts are 0 where it failed or there was nothing to do."""
        try:
            counts = self._succession.step(events)
        except StepFailedError as failure:
            log.exception("a step of %d sequences failed", len(failure.plan.entries))
            events += self._succession.scheduler.fail(failure.plan, str(failure))
            self._num_failed_steps += 1
            return NOTHING
        if counts.num_tokens:
            self._num_failed_steps = 0
        return counts

    def _request_change(self, message: Change) -> Future[None]:
        if self._inbox.post(message) is not None:
            message.done.set_exception(SwitchError("the engine is stopping"))
        return message.done

    def _close(self, error: str) -> None:
        """Answer everything that is or will be submitted with an error."""
        unread = self._inbox.end(error)
        changes = [message for message in unread if isinstance(message, Switch | Park | Redraft)]
        events = self._succession.abandon(error, changes)
        events += [_refusal(m, "error", error) for m in unread if isinstance(m, Submit)]
        self._is_idle = True
        if events:
            self._report(events)

    def _report(
        self,
        events: list[TokenEvent],
        step_s: float = 0.0,
        counts: StepCounts = NOTHING,
        *,
        has_new_core: bool = False,
    ) -> None:
        load = self._reported_load = self._succession.load()
        self._hand_over(
            StepReport(
                tuple(event for event in events if event.seq_id != WARM_UP_ID),
                load,
                step_s,
                counts.num_tokens,
                counts.num_drafted,
                counts.num_decoding,
                counts.num_emitted,
                self._succession.runner.step_costs if has_new_core else None,
            )
        )

    def _hand_over(self, report: StepReport) -> None:
        try:
            self._on_report(report)
        except Exception:
            # A callback that fails, such as one whose event loop has closed, has no readers.
            log.exception("a report was not taken")


def _refusal(message: Submit, reason: FinishReason, error: str | None) -> TokenEvent:
    return TokenEvent(message.seq_id, (), reason, error=error)
