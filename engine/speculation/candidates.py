"""The sequences of a coming step that may draft, and what was drafted for them so far.

The scheduler makes the candidates; the policy fills a `StepDrafts` for each step.
"""

import msgspec

from engine.sequence import Sequence
from engine.speculation.cost_curve import FloatArray
from engine.speculation.drafter import NO_DRAFT, Draft

PRICE_SPAN = 8  # tokens over which the price of one more is averaged: single steps are plateaus


class Candidate(msgspec.Struct, gc=False):
    """A sequence that lacks exactly one token in the coming step, and what it may draft."""

    sequence: Sequence
    max_drafts: int  # room for drafted tokens in its limits and blocks; 0: none
    drafter: str = "auto"  # or "off", or the name of the only one that may be asked
    num_drafts: int | None = None  # with a name: exactly so many if there are, paying or not


class StepDrafts:
    """The coming step while it is decided on; lists are by candidate."""

    __slots__ = (
        "base_tokens",
        "candidates",
        "drafts",
        "forced",
        "open",
        "sunk_s",
        "survivals",
        "times_s",
    )

    def __init__(
        self, candidates: list[Candidate], num_other_tokens: int, times_s: FloatArray
    ) -> None:
        self.candidates = candidates
        self.open = [
            index
            for index, candidate in enumerate(candidates)
            if candidate.max_drafts > 0 and candidate.drafter != "off"
        ]
        self.base_tokens = len(candidates) + num_other_tokens  # of the step without drafts
        self.times_s = times_s
        self.drafts: list[Draft] = [NO_DRAFT] * len(candidates)
        self.survivals: list[FloatArray | None] = [None] * len(candidates)
        self.forced = [0] * len(candidates)  # drafted tokens to verify whatever they promise
        self.sunk_s = 0.0  # spent on drafting

    def with_drafter(self, name: str) -> list[int]:
        """Indices of the open candidates that asked for this drafter, or for "auto"."""
        return [index for index in self.open if self.candidates[index].drafter == name]

    def seq_ids(self, indices: list[int]) -> list[int]:
        return [self.candidates[index].sequence.seq_id for index in indices]

    def limits(self, indices: list[int], most: int) -> list[int]:
        """How many tokens each may draft, at most `most`."""
        limits = []
        for index in indices:
            candidate = self.candidates[index]
            wanted = most if candidate.num_drafts is None else candidate.num_drafts
            limits.append(min(candidate.max_drafts, wanted))
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

    def put(self, index: int, draft: Draft, survivals: FloatArray, is_forced: bool) -> None:
        """Take a draft, unless the one that is there promises more."""
        before = self.survivals[index]
        if before is not None and not is_forced and before.sum() > survivals.sum():
            return
        self.drafts[index] = draft
        self.survivals[index] = survivals
        self.forced[index] = len(draft.token_ids) if is_forced else 0
