"""Which runner serves, and how another one takes over from it under running sequences.

The engine thread owns one `Succession`, tells it of changes that are asked for, and lets it step.
"""

import logging
from collections.abc import Iterable

from engine.migration import (
    WARM_UP_ID,
    Former,
    Park,
    Redraft,
    Switch,
    SwitchError,
    joined_load,
)
from engine.runner import NOTHING, Runner, StepCounts, StepFailedError
from engine.scheduler import Scheduler
from engine.types import EngineLoad, FinishReason, TokenEvent

log = logging.getLogger(__name__)

Change = Switch | Park | Redraft


class Succession:
    """The runner of the moment, and what is under way to change it."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.is_parked = False  # there is no core, and sequences wait for one
        self._former: Former | None = None  # while its sequences move to the core that took over
        self._change: Switch | Park | None = None  # waits for its time
        self._change_until_s = 0.0
        self._is_new = True

    @property
    def scheduler(self) -> Scheduler:
        """That of the runner which serves: whoever comes is added to it."""
        return self.runner.scheduler

    @property
    def is_changing(self) -> bool:
        return self._change is not None or self._former is not None

    @property
    def is_moving(self) -> bool:
        """Whether sequences of the former runner are under way."""
        return self._former is not None

    def take_new(self) -> bool:
        """Whether another core serves since this was last asked."""
        is_new, self._is_new = self._is_new, False
        return is_new

    def begin(self, change: Change, now_s: float) -> None:
        """Change the drafters at once, or the core as soon as `advance` can."""
        if self.is_changing:
            if is_wanted(change):
                change.done.set_exception(SwitchError("another change of the core is under way"))
        elif isinstance(change, Redraft):
            if is_wanted(change):
                self._redraft(change)
        else:
            self._change = change
            wait_s = change.grace_s if isinstance(change, Park) else change.timeout_s
            self._change_until_s = now_s + wait_s

    def advance(self, now_s: float) -> None:
        """Make the change that waits, if its time has come or nobody wants it any more."""
        change = self._change
        if change is None:
            return
        is_over = now_s >= self._change_until_s
        if isinstance(change, Park):
            has_come = is_over or not self.scheduler.has_work
        else:
            needed, length = self.scheduler.queues.longest_end, change.settings.max_model_len
            has_come = is_over or self.is_parked or needed <= length
        if not has_come and not change.done.cancelled():
            return
        self._change = None
        if not is_wanted(change):
            return
        if isinstance(change, Park):
            self.runner.release_core()
            self.is_parked = True
            change.done.set_result(None)
        elif needed <= length:
            self._switch(change)
        else:
            change.done.set_exception(
                SwitchError(f"a sequence that may grow to {needed} tokens still runs")
            )

    def step_former(self, events: list[TokenEvent]) -> StepCounts:
        """Move a sequence if it is time, and advance those that have not moved."""
        former = self._former
        if former is None:
            return NOTHING
        former.move(self.scheduler)
        if not former.runner.scheduler.has_work:
            # Once all have caught up the new core has shown that it can step.
            if not self.scheduler.queues.is_catching_up:
                self._former = None
                self._is_new = True
                former.switch.done.set_result(None)
            return NOTHING
        new_events, counts = former.step()
        events += new_events
        return counts

    def step(self, events: list[TokenEvent]) -> StepCounts:
        """Plan, compute and commit a step of the runner that serves.

        Where it fails while sequences still move, all go back to the former one; else it raises
        StepFailedError.
        """
        if self.is_parked or not self.scheduler.has_work:
            return NOTHING
        try:
            new_events, counts = self.runner.step()
        except StepFailedError as failure:
            if self._former is None:
                raise
            log.exception("the new core's step of %d sequences failed", len(failure.plan.entries))
            self._revert(self._former, f"the new core's step failed: {failure.__cause__}")
            return NOTHING
        assert counts.num_tokens, "there is work, but nothing that a step could advance"
        events += new_events
        return counts

    def abort(self, seq_id: int) -> TokenEvent | None:
        """End a sequence wherever it is; None where there is none."""
        return self._first(scheduler.abort(seq_id) for scheduler in self._schedulers())

    def load(self) -> EngineLoad:
        former = self._former.runner.scheduler.load() if self._former is not None else None
        return joined_load(self.scheduler.load(), former)

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[TokenEvent]:
        ended = (scheduler.end_all(reason, error) for scheduler in self._schedulers())
        return [event for events in ended for event in events]

    def abandon(self, error: str, unread: Iterable[Change]) -> list[TokenEvent]:
        """End everything with no regard to a core that may be broken, and refuse all changes."""
        changes: list[Change] = [change for change in unread if is_wanted(change)]
        if self._change is not None and is_wanted(self._change):
            changes.append(self._change)
        if self._former is not None:
            changes.append(self._former.switch)
        for change in changes:
            change.done.set_exception(SwitchError(error))
        ended = (scheduler.abandon(error) for scheduler in self._schedulers())
        return [event for events in ended for event in events]

    def _schedulers(self) -> list[Scheduler]:
        if self._former is None:
            return [self.scheduler]
        return [self.scheduler, self._former.runner.scheduler]

    @staticmethod
    def _first(events: Iterable[TokenEvent | None]) -> TokenEvent | None:
        return next((event for event in events if event is not None), None)

    def _redraft(self, change: Redraft) -> None:
        if self.is_parked:
            change.done.set_exception(SwitchError("there is no core at the moment"))
            return
        try:
            self.runner.change_speculation(change.speculation)
        except Exception as error:
            log.exception("the drafters could not be changed")
            change.done.set_exception(SwitchError(f"the drafters could not be changed: {error}"))
        else:
            change.done.set_result(None)

    def _switch(self, change: Switch) -> None:
        former = Former(self.runner, change)
        is_serving = self.scheduler.has_work
        try:
            self.runner = Runner(
                change.core, change.settings, change.speculation, is_serving=is_serving
            )
        except Exception as error:
            change.done.set_exception(SwitchError(f"the new core could not be set up: {error}"))
            return
        self.scheduler.continue_counts(former.runner.scheduler)
        self.is_parked = False
        former.move(self.scheduler)
        self._former = former

    def _revert(self, former: Former, error: str) -> None:
        """Go back to the former core with all sequences."""
        self.scheduler.abort(WARM_UP_ID)
        self.scheduler.suspend_all()
        for seq in self.scheduler.queues.take_waiting():
            former.runner.scheduler.adopt(seq)
        self.runner = former.runner
        self._former = None
        self._is_new = True
        former.switch.done.set_exception(SwitchError(error))


def is_wanted(change: Change) -> bool:
    """Whether its sender still waits for it; from here on it cannot be withdrawn."""
    return change.done.set_running_or_notify_cancel()
