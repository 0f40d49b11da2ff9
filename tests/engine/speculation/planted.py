"""A way to draft that always drafts, planted in an engine: no measured cost decides what is
verified."""

from collections.abc import Callable
from collections.abc import Sequence as Row
from typing import Any

from engine.batch import Batch
from engine.lanes import Float32Array
from engine.speculation.candidates import Candidate
from engine.speculation.costs import Costs
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.policy import SpeculationPolicy
from engine.speculation.setup import Speculation

NUM_DRAFTS = 4


class AlwaysDraft(SpeculationPolicy):
    """Verifies all that one way of drafting proposes, whatever it costs."""

    def __init__(self, propose: Callable[[Row[Candidate]], list[Draft]], costs: Costs) -> None:
        super().__init__([], costs)
        self.drafters: dict[str, Any] = {"planted": PlantedDrafter()}
        self.num_accepted = 0
        self.num_verified = 0
        self._propose = propose
        self._drafts: dict[int, Draft] = {}

    def draft(self, candidates: list[Candidate], num_other_tokens: int = 0) -> list[Draft]:
        drafts = [
            draft.truncated(candidate.max_drafts)
            for candidate, draft in zip(candidates, self._propose(candidates), strict=True)
        ]
        self._drafts = {c.sequence.seq_id: d for c, d in zip(candidates, drafts, strict=True)}
        return drafts

    def observe(self, seq_id: int, num_verified: int, emitted_ids: Row[int]) -> int:
        self.num_accepted += len(emitted_ids) - 1
        self.num_verified += num_verified
        return len(emitted_ids) - 1

    def observe_step(self, num_step_tokens: int, step_s: float) -> None:
        pass


class PlantedDrafter:
    max_drafts = NUM_DRAFTS


class Planted(Speculation, frozen=True, kw_only=True):
    """Speculation whose policy is made by the test and kept for it to look at."""

    propose: Callable[[Row[Candidate]], list[Draft]] | None = None
    made: list[AlwaysDraft]

    def policy(
        self, batch: Batch, hidden: Float32Array | None, *, max_step_tokens: int
    ) -> SpeculationPolicy:
        propose = self.propose
        if propose is None:
            whole = Speculation.policy(self, batch, hidden, max_step_tokens=max_step_tokens)
            (drafter,) = whole.drafters.values()
            propose = _all_of(drafter)
        policy = AlwaysDraft(propose, Costs(max_step_tokens, len(batch.lanes.tokens)))
        self.made.append(policy)
        return policy


def _all_of(drafter: Drafter) -> Callable[[Row[Candidate]], list[Draft]]:
    def propose(candidates: Row[Candidate]) -> list[Draft]:
        rooms = [min(candidate.max_drafts, drafter.max_drafts) for candidate in candidates]
        return drafter.propose([candidate.sequence for candidate in candidates], rooms)

    return propose
