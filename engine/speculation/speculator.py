"""Speculation as the engine loop sees it: drafts into a plan before its step, lessons after it.

The loop calls `extend` between planning and computing a step, and `learn` after its commit.
"""

import logging

from engine.lanes import Lanes
from engine.scheduler import Scheduler, StepPlan
from engine.sequence import Sequence
from engine.speculation.candidates import Candidate
from engine.speculation.policy import SpeculationPolicy

log = logging.getLogger(__name__)


class Speculator:
    """Asks the policy for drafts and tells it what became of them."""

    def __init__(
        self, policy: SpeculationPolicy, scheduler: Scheduler, lanes: Lanes, max_step_tokens: int
    ) -> None:
        self.policy = policy
        self._scheduler = scheduler
        self._lanes = lanes
        self._max_step_tokens = max_step_tokens
        self._max_drafts = max((d.max_drafts for d in policy.drafters.values()), default=0)
        self.num_drafted = 0  # tokens in the latest step that were drafted
        # Of the coming step: where in the plan each candidate is, and its text's length.
        self._indices: list[int] = []
        self._lengths: list[int] = []

    def extend(self, plan: StepPlan) -> None:
        """Add drafts to the sequences of a plan that lack only their next token."""
        self._indices = []
        self.num_drafted = 0
        if not self._max_drafts:
            return
        entries = plan.entries
        candidates: list[Candidate] = []
        num_tokens = 0
        for index, (seq, num_new_tokens) in enumerate(entries):
            num_tokens += num_new_tokens
            if num_new_tokens == 1 and len(seq.token_ids) - seq.num_computed_tokens == 1:
                # A sequence that has just been given its lane has no text there yet.
                room = 0 if seq in plan.admitted else self._room(seq)
                candidates.append(Candidate(seq, room, seq.drafter))
                self._indices.append(index)
        if not candidates:
            return
        self._lanes.write_new_blocks([entries[index] for index in self._indices])
        self._lengths = [len(candidate.sequence.token_ids) for candidate in candidates]
        try:
            drafts = self.policy.draft(candidates, num_tokens - len(candidates))
        except Exception:
            # Drafts are a bonus: whatever a drafter does, the texts go on without it.
            log.exception("speculation is off from here on: a drafter failed")
            self._stop("a drafter failed; the log has the error")
            return
        budget = self._max_step_tokens - num_tokens
        for index, draft in zip(self._indices, drafts, strict=True):
            num_drafts = min(len(draft.token_ids), budget)
            if num_drafts:
                budget -= num_drafts
                self.num_drafted += num_drafts
                seq = entries[index][0]
                seq.draft_ids = draft.token_ids[:num_drafts]
                if seq.draft_stats is not None:
                    seq.draft_stats.announce(draft.drafter, num_drafts)
                entries[index] = (seq, 1 + num_drafts)

    def learn(self, plan: StepPlan, num_tokens: int, step_s: float) -> None:
        """Take in what the committed step accepted, and how long it took."""
        if not self._indices:
            return
        num_verified = 0
        for index, length in zip(self._indices, self._lengths, strict=True):
            seq, num_new_tokens = plan.entries[index]
            num_verified += num_new_tokens
            emitted_ids = seq.token_ids[length:]
            if emitted_ids:
                self.policy.observe(seq.seq_id, num_new_tokens - 1, emitted_ids)
        # Prompts cost their attention and no logits: only steps without any are alike.
        if num_verified == num_tokens:
            self.policy.observe_step(num_tokens, step_s)

    def _room(self, seq: Sequence) -> int:
        if seq.drafter == "off":
            return 0
        return self._scheduler.draft_room(seq, self._max_drafts)

    def _stop(self, reason: str) -> None:
        self._indices = []
        self._max_drafts = 0
        self.policy.unavailable.update(dict.fromkeys(self.policy.drafters, reason))
