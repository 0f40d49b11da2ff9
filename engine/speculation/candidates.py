"""The sequences of a coming step that may draft, and what was drafted for them so far.

The scheduler makes the candidates; the policy fills a `StepDrafts` for each step.
"""

import msgspec
import numpy as np

from engine.sequence import Sequence
from engine.speculation.cost_curve import FloatArray
from engine.speculation.drafter import NO_DRAFT, Draft

PRICE_SPAN = 8  # tokens over which the price of one more is averaged: single steps are plateaus


class Candidate(msgspec.Struct, gc=False):
    """A sequence that lacks exactly one token in the coming step, and what it may draft."""

    sequence: Sequence
    max_drafts: int  # room for drafted tokens in its limits and blocks; 0: none
    drafter: str = "auto"  # or "off", or the name of the only one that may be asked
    # With a name: exactly so many where there are, paying or not; at least 1.
    num_drafts: int | None = None


class StepDrafts:
    """The coming step while it is decided on; lists and rows are by candidate."""

    __slots__ = (
        "base_tokens",
        "candidates",
        "drafts",
        "forced",
        "has_drafts",
        "open",
        "seq_ids",
        "sunk_s",
        "survivals",
        "times_s",
    )

    def __init__(
        self,
        candidates: list[Candidate],
        num_other_tokens: int,
        times_s: FloatArray,
        max_drafts: int,
    ) -> None:
        count = len(candidates)
        self.candidates = candidates
        self.open = [
            index
            for index, candidate in enumerate(candidates)
            if candidate.max_drafts > 0 and candidate.drafter != "off"
        ]
        self.seq_ids = [candidate.sequence.seq_id for candidate in candidates]
        self.base_tokens = count + num_other_tokens  # of the step without drafts
        self.times_s = times_s
        self.drafts: list[Draft] = [NO_DRAFT] * count
        self.survivals = np.zeros((count, max_drafts))
        self.forced: dict[int, int] = {}  # drafted tokens to verify whatever they promise
        self.has_drafts = False
        self.sunk_s = 0.0  # spent on drafting

    def with_drafter(self, name: str) -> list[int]:
        """Indices of the open candidates that asked for this drafter, or for "auto"."""
        candidates = self.candidates
        return [index for index in self.open if candidates[index].drafter == name]

    def limits(self, indices: list[int], most: int) -> list[int]:
        """How many tokens each may draft, at most `most`."""
        limits = []
        for index in indices:
            candidate = self.candidates[index]
            limit = most if most < candidate.max_drafts else candidate.max_drafts
            if candidate.num_drafts is not None:
                limit = min(limit, candidate.num_drafts)
            limits.append(limit)
        return limits

    def seconds(self, num_drafted: int) -> float:
        """Seconds of the step with this many drafted tokens in it."""
        return float(self.times_s[min(self.base_tokens + num_drafted, len(self.times_s) - 1)])

    @property
    def plain_rate(self) -> float:
        """Emitted tokens per second without drafts."""
        return len(self.candidates) / self.seconds(0)

    def token_price(self, rate: float) -> float:
        """What one more token in the step costs, in tokens emitted in that time at `rate`."""
        return rate * (self.seconds(PRICE_SPAN) - self.seconds(0)) / PRICE_SPAN

    def put(
        self, indices: list[int], drafts: list[Draft], survivals: FloatArray, forced: set[int]
    ) -> None:
        """Take drafts, each unless the one that is there promises more."""
        promised = self.survivals[indices].sum(axis=1).tolist()
        promises = survivals.sum(axis=1).tolist()
        width = survivals.shape[1]
        for row, (index, draft) in enumerate(zip(indices, drafts, strict=True)):
            if not draft.token_ids:
                continue
            is_forced = index in forced or self.candidates[index].num_drafts is not None
            if promises[row] > promised[row] or is_forced:
                self.has_drafts = True
                self.drafts[index] = draft
                own = self.survivals[index]
                own[:width] = survivals[row]
                own[width:] = 0.0
                if is_forced:
                    self.forced[index] = len(draft.token_ids)
