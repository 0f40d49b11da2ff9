"""Which sequences the next step advances and by how many tokens, and what follows from a step.

The engine loop calls `schedule` before and `commit` or `fail` after each step. There is no
prefill or decode phase: a sequence catches up to its tokens within the step's token budget.
"""

import time
from collections.abc import Sequence as Row
from dataclasses import dataclass, field

from engine.batch import SampledRows
from engine.block_manager import BlockManager
from engine.mixed_steps import mixed_chunk
from engine.prefix_sharing import PrefixSharing
from engine.queues import Queues
from engine.sequence import Sequence, SequenceStatus
from engine.types import EngineLoad, FinishReason, TokenEvent
from engine.verifier import accept_rows

# Steps that the mean number of drafts is taken over.
DRAFT_MEMORY = 16.0


@dataclass(slots=True)
class StepPlan:
    """Which sequences a step advances, by how many tokens; `admitted` ones are new to a lane.

    The commit adds how many of them decoded, with how many drafts, and what they got.
    """

    entries: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_decoding: int = 0
    num_drafted: int = 0
    num_emitted: int = 0


class Scheduler:
    """Waiting and running sequences, both in order of rank, and the blocks they hold."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_sequences: int,
        max_step_tokens: int,
        max_model_len: int,
    ) -> None:
        self._blocks = blocks
        self._block_size = blocks.block_size
        self._max_step_tokens = max_step_tokens
        self._max_model_len = max_model_len
        self.queues = Queues(max_sequences)
        self._prefixes = PrefixSharing(blocks)
        # Whether others decode on another core between two steps of this one; see migration.py.
        self.is_beside_decoding = False
        self._num_drafted = 0.0  # lately, for each sequence that decoded
        self._num_preemptions = 0
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.queues.by_id)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence whose prompt leaves room for at least one token."""
        assert 0 < seq.num_prompt_tokens < self._max_model_len
        self.queues.add(seq)

    def abort(self, seq_id: int) -> TokenEvent | None:
        """End a sequence between two steps; its blocks are free on return."""
        seq = self.queues.by_id.get(seq_id)
        return None if seq is None else self._end(seq, "abort")

    def end_all(self, reason: FinishReason, error: str | None = None) -> list[TokenEvent]:
        return [self._end(seq, reason, error) for seq in list(self.queues.by_id.values())]

    def abandon(self, error: str) -> list[TokenEvent]:
        """End all sequences after a bug, without touching books that may not add up any more."""
        sequences = list(self.queues.by_id.values())
        self.queues.by_id.clear()
        return [seq.event(finish_reason="error", error=error) for seq in sequences]

    # A core that takes over from another brings a scheduler of its own; see migration.py.

    def take(self, seq: Sequence) -> Sequence:
        """Give up a running sequence, to be computed again elsewhere."""
        self._suspend(seq)
        self.queues.remove(seq)
        return seq

    def adopt(self, seq: Sequence) -> None:
        """Queue a sequence that another scheduler gave up; it keeps its place by arrival."""
        seq.awaited_digest = None
        self.queues.add(seq)

    def forget_hidden(self) -> None:
        """Note that the hidden states of what is computed by now were kept for nobody."""
        for seq in self.queues.running:
            seq.first_computed = (
                self._blocks.num_blocks_for(seq.num_computed_tokens) * self._block_size
            )

    def suspend_all(self) -> None:
        """Put every running sequence back in the queue."""
        for seq in list(self.queues.running):
            self._suspend(seq)

    def continue_counts(self, former: "Scheduler") -> None:
        """Go on counting where another scheduler is."""
        self._num_preemptions = former._num_preemptions
        self._prefixes.continue_counts(former._prefixes)
        self._num_steps = former._num_steps

    def schedule(self) -> StepPlan:
        """Plan a step: running sequences first, then waiting ones, in order of rank."""
        plan = StepPlan()
        num_preemptions = self._num_preemptions
        budget = self._schedule_running(plan)
        # Blocks that were just taken from somebody are not for a newcomer.
        if self.queues.waiting and num_preemptions == self._num_preemptions:
            self._admit(plan, budget)
        return plan

    def commit(self, plan: StepPlan, rows: SampledRows) -> list[TokenEvent]:
        """Advance the plan's sequences by what the step computed and sampled."""
        self._num_steps += 1
        events: list[TokenEvent] = []
        block_size, max_model_len = self._block_size, self._max_model_len
        row_start = rows.start
        for index, (seq, num_new_tokens) in enumerate(plan.entries):
            num_drafts = len(seq.draft_ids)
            is_decoding = (
                num_new_tokens == 1 + num_drafts and len(seq.token_ids) > seq.num_prompt_tokens
            )
            seq.num_computed_tokens += num_new_tokens
            first_row, end_row = row_start[index], row_start[index + 1]
            event = None
            if first_row != end_row:
                event = accept_rows(seq, rows, first_row, end_row, max_model_len)
            if seq.num_computed_tokens // block_size > seq.num_published_blocks:
                self._prefixes.publish(seq)
            if event is None:
                continue
            events.append(event)
            if is_decoding:
                plan.num_decoding += 1
                plan.num_drafted += num_drafts
                plan.num_emitted += len(event.token_ids)
            if event.finish_reason is not None:
                self._leave(seq)
        if plan.num_decoding:
            self._num_drafted += (
                plan.num_drafted / plan.num_decoding - self._num_drafted
            ) / DRAFT_MEMORY
        return events

    def draft_room(self, seq: Sequence, wanted: int) -> int:
        """How many drafts the step may verify behind `seq`, which lacks its next token only.

        Blocks are taken for them while more are free than the running sequences will soon need.
        """
        num_tokens = len(seq.token_ids)
        # The verified drafts and the token after them are all emitted at best.
        left = seq.params.max_tokens - seq.num_output_tokens - 1
        room = min(wanted, left, self._max_model_len - num_tokens - 1)
        if room <= 0:
            return 0
        count = self._blocks.num_blocks_for(num_tokens + room) - len(seq.block_ids)
        if count > 0 and self._blocks.num_free >= count + len(self.queues.running):
            seq.block_ids += self._blocks.allocate(count)
        return min(room, len(seq.block_ids) * self._block_size - num_tokens)

    def fail(self, plan: StepPlan, error: str) -> list[TokenEvent]:
        """End the plan's sequences; nothing that the failed step wrote can be found again."""
        return [self._end(seq, "error", error) for seq, _ in plan.entries]

    def load(self) -> EngineLoad:
        return EngineLoad(
            num_running=len(self.queues.running),
            num_waiting=len(self.queues.waiting),
            num_free_blocks=self._blocks.num_free,
            num_held_blocks=self._blocks.num_held,
            num_total_blocks=self._blocks.num_blocks,
            num_preemptions=self._num_preemptions,
            num_prefix_queried_tokens=self._prefixes.num_queried_tokens,
            num_prefix_hit_tokens=self._prefixes.num_hit_tokens,
            num_steps=self._num_steps,
        )

    def check_integrity(self) -> None:
        """Raise AssertionError where blocks, lanes and queues do not add up."""
        self._blocks.check_integrity([seq.block_ids for seq in self.queues.running])
        self.queues.check_integrity()
        self._prefixes.check_integrity()

    def _schedule_running(self, plan: StepPlan) -> int:
        """Plan the running sequences and return what is left of the token budget."""
        running = self.queues.running
        # A sequence that lacks one token always gets it: max_step_tokens >= max_sequences.
        num_decoding = sum(len(seq.token_ids) - seq.num_computed_tokens == 1 for seq in running)
        budget = self._max_step_tokens - num_decoding
        if num_decoding or self.is_beside_decoding:
            budget = min(budget, self._mixed_chunk(num_decoding))
        block_size = self._block_size
        index = 0
        while index < len(running):
            seq = running[index]
            num_new_tokens = len(seq.token_ids) - seq.num_computed_tokens
            if num_new_tokens > 1:
                num_new_tokens = min(num_new_tokens, budget)
                budget -= num_new_tokens
            capacity = len(seq.block_ids) * block_size
            if seq.num_computed_tokens + num_new_tokens > capacity and not self._grow(seq):
                break
            if num_new_tokens:
                plan.entries.append((seq, num_new_tokens))
            index += 1
        return budget

    def _mixed_chunk(self, num_decoding: int) -> int:
        """Tokens of prompts that a step may compute beside so many sequences that decode."""
        running = self.queues.running
        # Those that wait count as far as there are lanes: where many have yet to start, they need
        # not wait for the few that have.
        starting = self.queues.waiting[: len(self.queues.free_lanes)]
        num_prompt_tokens = sum(len(seq.token_ids) for seq in starting) - num_decoding
        for seq in running:
            num_prompt_tokens += len(seq.token_ids) - seq.num_computed_tokens
        return mixed_chunk(
            len(running) + len(starting),
            num_decoding,
            num_decoding * self._num_drafted,
            num_prompt_tokens,
        )

    def _grow(self, seq: Sequence) -> bool:
        """Give `seq` blocks for its tokens, taking them from those of the last rank if need be.

        False where `seq` itself was the last. Who runs is in order of rank and planned
        from its head, so no victim is in the plan yet.
        """
        count = self._blocks.num_blocks_for(len(seq.token_ids)) - len(seq.block_ids)
        while self._blocks.num_free < count:
            victim = self.queues.running[-1]
            self._preempt(victim)
            if victim is seq:
                return False
        seq.block_ids += self._blocks.allocate(count)
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Put a running sequence back in the queue, to be computed again from its tokens."""
        self._num_preemptions += 1
        self._suspend(seq)

    def _suspend(self, seq: Sequence) -> None:
        self._release(seq)
        self.queues.suspend(seq)
        seq.num_computed_tokens = 0
        if seq.needs_prompt_logprobs:
            seq.prompt_logprobs = [None]

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting sequences while tokens, lanes and blocks last."""
        queues = self.queues
        index = 0
        while budget and index < len(queues.waiting) and queues.free_lanes:
            seq = queues.waiting[index]
            prefix = self._prefixes.usable(seq)
            if prefix is None:
                index += 1
                continue
            num_tokens = len(seq.token_ids)
            count = self._blocks.num_blocks_for(num_tokens) - len(prefix)
            # A block to spare for each running sequence: admitting into the last ones would
            # only preempt somebody a few steps later.
            num_reserved = len(queues.running) + 1 if queues.running else 0
            num_free = self._blocks.num_free - self._blocks.num_free_among(prefix)
            if num_free < count + num_reserved:
                return
            queues.start(index)
            self._give(seq, prefix, count)
            num_new_tokens = min(num_tokens - seq.num_computed_tokens, budget)
            budget -= num_new_tokens
            plan.entries.append((seq, num_new_tokens))
            plan.admitted.append(seq)

    def _give(self, seq: Sequence, prefix: Row[int], num_new_blocks: int) -> None:
        """Give a sequence that starts the blocks of its tokens."""
        self._blocks.share(prefix)
        seq.block_ids = [*prefix, *self._blocks.allocate(num_new_blocks)]
        seq.num_published_blocks = len(prefix)
        seq.num_computed_tokens = seq.first_computed = len(prefix) * self._block_size
        self._prefixes.announce(seq)
        if seq.queued_s is None:
            seq.queued_s = time.monotonic() - seq.arrived_at_s
            seq.num_cached_tokens = seq.num_computed_tokens
            self._prefixes.count(seq)

    def _end(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> TokenEvent:
        self._leave(seq)
        return seq.event(finish_reason=reason, error=error)

    def _leave(self, seq: Sequence) -> None:
        if seq.status is SequenceStatus.RUNNING:
            self._release(seq)
        self.queues.remove(seq)
        seq.status = SequenceStatus.FINISHED

    def _release(self, seq: Sequence) -> None:
        """Take its blocks back from a running sequence."""
        self._prefixes.withdraw(seq)
        self._blocks.release(seq.block_ids)
        seq.block_ids = []
        seq.num_published_blocks = 0
