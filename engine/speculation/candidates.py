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
        """`times_s` is the time of a step by its number of tokens."""
        count = len(candidates)
        self.candidates = candidates
        self.open = [
            index
            for index, candidate in enumerate(candidates)
            if candidate.max_drafts > 0 and candidate.drafter != "off"
        ]
        self.seq_ids = [candidate.sequence.seq_id for candidate in candidates]
        self.base_tokens = count + num_other_tokens  # of the step without drafts
        self.times_s = decoding_times_s(times_s, count, num_other_tokens)
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
        """Seconds of decoding with this many drafted tokens in the step."""
        return float(self.times_s[min(num_drafted, len(self.times_s) - 1)])

    @property
    def is_decoding_only(self) -> bool:
        """Whether no prompt is computed in the step."""
        return self.base_tokens == len(self.candidates)

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


def decoding_times_s(times_s: FloatArray, num_sequences: int, num_other_tokens: int) -> FloatArray:
    """Seconds that a step spends on decoding, by its number of drafted tokens from 0 on.

    The tokens of prompts have to be computed whatever is drafted. Their time is left out: beside
    it, any draft would look cheap against the few tokens that such a step emits.
    """
    base_tokens = num_sequences + num_other_tokens
    alone_s = times_s[min(num_sequences, len(times_s) - 1) :]
    if not num_other_tokens or base_tokens >= len(times_s):
        return alone_s[: max(1, len(times_s) - base_tokens)]
    beside_s = times_s[base_tokens:]
    # Of two measured slopes the steeper one: in a step of 100 ms, noise is as large as a draft.
    added_s: FloatArray = np.maximum(alone_s[: len(beside_s)] - alone_s[0], beside_s - beside_s[0])
    return added_s + float(alone_s[0])
