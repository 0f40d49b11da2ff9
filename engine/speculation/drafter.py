"""What a drafter is: token ids that a sequence may go on with, and how likely each is to be right.

The policy asks drafters between two steps; the verifier sees the ids alone.
"""

from collections.abc import Sequence as Row
from typing import Protocol, runtime_checkable

import msgspec

from engine.sequence import Sequence


class Draft(msgspec.Struct, frozen=True, gc=False):
    """What one drafter proposes for one sequence; empty where it has nothing to say."""

    drafter: str
    token_ids: list[int]
    # Per token, what its acceptance depends on: an index into the drafter's `priors`.
    buckets: list[int]

    def truncated(self, num_drafts: int) -> "Draft":
        """The first `num_drafts` tokens of the draft."""
        if num_drafts >= len(self.token_ids):
            return self
        return Draft(self.drafter, self.token_ids[:num_drafts], self.buckets[:num_drafts])


NO_DRAFT = Draft("none", [], [])


class Drafter(Protocol):
    """Maps sequences to drafts. What a rejected draft left behind in it is its own affair."""

    @property
    def name(self) -> str: ...

    @property
    def max_drafts(self) -> int:
        """K at most."""

    @property
    def priors(self) -> Row[float]:
        """Acceptance of a token, given that those before it were accepted, by bucket: as known
        before serving."""

    @property
    def position_priors(self) -> Row[float]:
        """The same by position in the draft, at least max_drafts of them."""

    @property
    def is_free(self) -> bool:
        """Whether a draft costs no run of a model: such a drafter is asked in every step."""

    def propose(self, sequences: Row[Sequence], max_drafts: Row[int]) -> list[Draft]:
        """Draft at most max_drafts[i] tokens that follow the tokens of sequences[i]."""
        ...


# A chain whose tokens together are less likely than this ends, where it is not known better.
USUAL_CONFIDENCE = 0.1


@runtime_checkable
class Chain(Protocol):
    """What the policy sets and reads of a drafter that goes on token by token."""

    min_confidence: float
    """A draft ends once its tokens together are less likely than this."""
    draft_s: float
    """Seconds of the last call, without those of catching up with texts that it had left alone."""
