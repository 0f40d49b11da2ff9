"""Chooses, between two steps, who drafts for which sequence and how many drafts are verified.

The scheduler calls `draft` before a step that decodes, `observe` for each sequence that the step
advanced, and `observe_step` once; all on the engine thread.
"""

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Row

from engine.sequence import Sequence
from engine.speculation.acceptance import Acceptance
from engine.speculation.candidates import Candidate, StepDrafts
from engine.speculation.costs import Costs
from engine.speculation.drafter import NO_DRAFT, Draft, Drafter
from engine.speculation.models import Ask, ModelDrafters
from engine.speculation.plan import Choice, choose_counts
from engine.speculation.probes import ProbeCredit, Rest
from engine.speculation.profiles import DraftProfiles, RecentDrafts
from engine.speculation.single_stream import LongRunRate, SingleStep
from engine.speculation.speedup import SpeedupMeter
from engine.speculation.tally import Tally

log = logging.getLogger(__name__)

FREE_PROBE_DRAFTS = 4
FORGET_EVERY = 512  # steps
SPEEDUP_MEMORY = 16.0  # steps


class SpeculationPolicy:
    """Owns the drafters, what is known of their acceptance, and what steps and drafts cost."""

    def __init__(
        self,
        drafters: Row[Drafter],
        costs: Costs,
        *,
        unavailable: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`unavailable` names drafters that cannot be used here, each with the reason."""
        self._clock = clock
        self.costs = costs
        self.drafters = {drafter.name: drafter for drafter in drafters}
        self.unavailable = dict(unavailable or {})
        self.acceptance = {drafter.name: Acceptance(drafter) for drafter in drafters}
        self.tally = Tally({drafter.name: drafter.max_drafts for drafter in drafters})
        self.models = ModelDrafters(
            [drafter for drafter in drafters if not drafter.is_free], self.acceptance, costs
        )
        self._last: Choice | SingleStep | None = None
        self.last_load = (0, 0)  # candidates and tokens without drafts of the last choice
        self._free = [drafter for drafter in drafters if drafter.is_free]
        self._pending: dict[int, list[Draft]] = {}  # what was drafted for the coming step
        self._verified: dict[int, Draft] = {}  # of that, what goes into it
        self._credit = ProbeCredit()
        self._rest = Rest()
        self._speedup = 1.0  # against no drafts, that recent choices promised
        self._single_rate = LongRunRate()
        self._num_calls = 0
        self.meter = SpeedupMeter()
        # Of the coming step: seconds of drafting and of models' part in it, sequences, and tokens
        # drafted and emitted.
        self._draft_s = self._models_s = 0.0
        self._num_sequences = self._num_drafted = self._num_emitted = 0
        self._max_drafts = max((drafter.max_drafts for drafter in drafters), default=0)
        self._recent = RecentDrafts(self._max_drafts)

    @property
    def last_choice(self) -> Choice | None:
        """What was decided last."""
        return self._last.choice() if isinstance(self._last, SingleStep) else self._last

    def profiles(self) -> DraftProfiles:
        """What recent drafts promised, for plans of other loads and other costs."""
        planners = self.models.planners
        return self._recent.profiles({name: one.profiles() for name, one in planners.items()})

    def draft(self, candidates: list[Candidate], num_other_tokens: int = 0) -> list[Draft]:
        """Return what to verify for each candidate in the coming step, often nothing.

        `candidates` are all sequences that decode in it; num_other_tokens counts its other
        tokens, those of prompts. Before the cost of a step is known nothing is drafted.
        """
        began_s = self._clock()
        drafts = self._draft(candidates, num_other_tokens)
        self._draft_s = self._clock() - began_s
        if self._pending:
            self._recent.add_time(len(candidates), self._draft_s - self._models_s)
        return drafts

    def _draft(self, candidates: list[Candidate], num_other_tokens: int) -> list[Draft]:
        self._num_calls += 1
        self._num_sequences, self._num_drafted, self._num_emitted = len(candidates), 0, 0
        self._models_s = 0.0
        self._credit.begin_step()
        self._pending.clear()
        self._verified.clear()
        if self._num_calls % FORGET_EVERY == 0:
            seq_ids = {candidate.sequence.seq_id for candidate in candidates}
            for acceptance in self.acceptance.values():
                acceptance.keep_only(seq_ids)
        if len(candidates) == 1 and not num_other_tokens and candidates[0].num_drafts is None:
            return [self._draft_single(candidates[0])]
        times_s = self.costs.step.times_s()
        step = StepDrafts(candidates, num_other_tokens, times_s, self._max_drafts)
        if not step.open or not self.costs.step.is_known or self._rest.is_on(step.base_tokens):
            return step.drafts
        if not num_other_tokens and self._is_plain_due(candidates):
            return step.drafts
        for drafter in tuple(self._free):
            indices = step.with_drafter("auto") + step.with_drafter(drafter.name)
            depths = step.limits(indices, drafter.max_drafts)
            self._ask(step, Ask(drafter.name, indices, depths))
        if self._free:
            self._recent.add_rows(step.survivals[step.with_drafter("auto")])
        if self.models.planners:
            rate = max(self._speedup, 1.0) * step.plain_rate
            price = step.token_price(rate)
            for ask in self.models.assign(step, rate, may_probe=self._credit.is_left):
                self.models.set_confidence(ask.name, len(ask.indices), rate, price)
                self._ask(step, ask)
        return self._choose(step)

    def _draft_single(self, candidate: Candidate) -> Draft:
        """The same for a step of one sequence and nothing else."""
        if candidate.max_drafts <= 0 or candidate.drafter == "off" or not self.costs.step.is_known:
            return NO_DRAFT
        if self.meter.is_plain_due(1):
            return NO_DRAFT
        seconds = self.costs.step.few_s()
        step = SingleStep(candidate, seconds, self._single_rate.per_s(seconds[1]))
        for drafter in tuple(self._free):
            if candidate.drafter in ("auto", drafter.name):
                self._ask_single(step, Ask(drafter.name, [0], [step.limit(drafter.max_drafts)]))
        if self.models.planners:
            ask = self.models.assign_single(step, may_probe=self._credit.is_left)
            if ask is not None:
                self._ask_single(step, ask)
        if not step.count and step.free_draft.token_ids and self._credit.is_left:
            self._credit.owe(seconds[1])
            count = min(FREE_PROBE_DRAFTS, len(step.free_draft.token_ids))
            step.force(step.free_draft, [], count)
        self._single_rate.observe(step.emitted, step.expected_s)
        self._remember(step, (1, 1), step.emitted / step.expected_s * seconds[1])
        if not step.count:
            return NO_DRAFT
        self._verified[step.seq_id] = step.draft
        return step.draft.truncated(step.count)

    def _ask_single(self, step: SingleStep, ask: Ask) -> None:
        called = self._call(ask, [step.candidate.sequence])
        if called is None:
            return
        ((draft,), draft_s) = called
        step.sunk_s += draft_s
        if ask.verified:
            self._credit.owe(step.seconds[1])
        survivals = self.acceptance[ask.name].survivals_of(step.seq_id, draft)
        if self.drafters[ask.name].is_free:
            step.free_draft = draft
            if step.candidate.drafter == "auto":
                self._recent.add_row(survivals)
        if not draft.token_ids:
            return
        if ask.verified:
            step.force(draft, survivals, len(draft.token_ids))
        else:
            step.consider(draft, survivals)
        self._pending.setdefault(step.seq_id, []).append(draft)

    def observe(self, seq_id: int, num_verified: int, emitted_ids: Row[int]) -> int:
        """Learn from what a step emitted for a sequence; return how many drafts were accepted.

        num_verified drafted tokens of the returned draft were in the step. Drafts that were not
        verified are judged as well, as far as the emitted tokens reach.
        """
        verified = self._verified.pop(seq_id, None)
        num_accepted = 0
        for draft in self._pending.pop(seq_id, ()):
            num_matched = _num_matched(draft.token_ids, emitted_ids)
            self.acceptance[draft.drafter].observe(seq_id, draft, num_matched, len(emitted_ids))
            if draft is verified and num_verified:
                num_accepted = min(num_matched, num_verified)
                self.tally.count_draft(draft.drafter, num_verified, num_accepted)
        self.tally.count_sequence(num_verified, len(emitted_ids))
        self._num_drafted += num_verified
        self._num_emitted += len(emitted_ids)
        return num_accepted

    def observe_step(self, num_step_tokens: int, step_s: float) -> None:
        """Learn from the time of a step, that of `draft` not included."""
        self.meter.observe(
            self._num_sequences, self._num_drafted, self._num_emitted, self._draft_s, step_s
        )
        self.costs.step.observe(num_step_tokens, step_s)
        self._credit.end_step(step_s)

    def _ask(self, step: StepDrafts, ask: Ask) -> None:
        """Ask a drafter and put its drafts into the step, over those that are there."""
        if not ask.indices:
            return
        called = self._call(ask, [step.candidates[index].sequence for index in ask.indices])
        if called is None:
            return
        drafts, draft_s = called
        step.sunk_s += draft_s
        if ask.verified:
            self._credit.owe(step.seconds(0))
        if not any(draft.token_ids for draft in drafts):
            return
        acceptance = self.acceptance[ask.name]
        seq_ids = [step.seq_ids[index] for index in ask.indices]
        rows = acceptance.bucket_rows(drafts, acceptance.max_drafts)
        survivals = acceptance.survivals(rows, acceptance.odds(seq_ids))
        step.put(ask.indices, drafts, survivals, ask.verified)
        for seq_id, draft in zip(seq_ids, drafts, strict=True):
            if draft.token_ids:
                self._pending.setdefault(seq_id, []).append(draft)

    def _call(self, ask: Ask, sequences: Row[Sequence]) -> tuple[list[Draft], float] | None:
        """Ask a drafter and take in what that took; None where it failed, and is given up."""
        began_s = self._clock()
        try:
            drafts = self.drafters[ask.name].propose(sequences, ask.depths)
        except Exception as error:
            log.exception("the drafter %s failed; it is not asked any more", ask.name)
            self._disable(ask.name, f"it failed: {error!r}")
            return None
        draft_s = self._clock() - began_s
        if ask.num_probed:
            self._credit.pay(draft_s * ask.num_probed / len(sequences))
        planner = self.models.planners.get(ask.name)
        if planner is None:
            return drafts, draft_s
        self._models_s += draft_s
        longest = max(len(draft.token_ids) for draft in drafts)
        if longest:  # else it has only caught up with a prompt
            if len(sequences) == 1:
                planner.cost.observe(1, longest, self.models.draft_s(ask.name, draft_s))
            else:
                planner.cost.observe(len(sequences), max(ask.depths), draft_s)
            for draft, depth in zip(drafts, ask.depths, strict=True):
                if depth == planner.max_drafts:
                    planner.add_profile(draft)
        return drafts, draft_s

    def _disable(self, name: str, reason: str) -> None:
        """Go on without a drafter: text never depends on one."""
        self.unavailable[name] = reason
        self._free = [drafter for drafter in self._free if drafter.name != name]
        self.models.remove(name)
        del self.drafters[name]

    def _choose(self, step: StepDrafts) -> list[Draft]:
        """Cut the step's drafts to what pays."""
        emitted, num_forced = float(len(step.candidates)), 0
        survivals = step.survivals if step.has_drafts else step.survivals[:, :0]
        if step.forced:
            forced = list(step.forced)
            emitted += float(survivals[forced].sum())
            num_forced = sum(step.forced.values())
            survivals = survivals.copy()
            survivals[forced] = 0.0
        choice = choose_counts(
            survivals, emitted, step.times_s, num_forced=num_forced, sunk_s=step.sunk_s
        )
        counts = choice.counts
        for index, count in step.forced.items():
            counts[index] = count
        self._rest.observe(step.base_tokens, choice.num_verified)
        if not choice.num_verified:
            self._probe_free(step, counts)
        load = len(step.candidates), step.base_tokens
        self._remember(choice, load, choice.expected_rate / step.plain_rate)
        for index, count in enumerate(counts):
            draft = step.drafts[index]
            if count:
                self._verified[step.seq_ids[index]] = draft
            step.drafts[index] = draft.truncated(count)
        return step.drafts

    def _probe_free(self, step: StepDrafts, counts: list[int]) -> None:
        """Verify a draft that cost nothing now and then, where none promises to pay."""
        index = step.open[self._num_calls % len(step.open)]
        count = min(FREE_PROBE_DRAFTS, len(step.drafts[index].token_ids))
        if not count or counts[index] or not self.drafters[step.drafts[index].drafter].is_free:
            return
        if self._credit.is_left and step.is_decoding_only:
            self._credit.owe(step.seconds(0))
            counts[index] = count

    def _is_plain_due(self, candidates: list[Candidate]) -> bool:
        is_due = self.meter.is_plain_due(len(candidates))
        return is_due and all(candidate.num_drafts is None for candidate in candidates)

    def _remember(self, last: Choice | SingleStep, load: tuple[int, int], speedup: float) -> None:
        self._last = last
        self.last_load = load
        self._speedup += (speedup - self._speedup) / SPEEDUP_MEMORY
        self.tally.estimate(speedup)


def _num_matched(drafted_ids: Row[int], emitted_ids: Row[int]) -> int:
    count = 0
    for drafted, emitted in zip(drafted_ids, emitted_ids, strict=False):
        if drafted != emitted:
            break
        count += 1
    return count
