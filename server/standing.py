"""A refusal for want of room that holds for others, for a moment; the gate keeps the last one.

In an overload most requests are refused for what the one before was refused for, and to play all
that is open forward takes longer than all the rest of refusing.
"""

import msgspec

from server.admission import Reject
from server.condition import Condition
from server.forecast import Ask, Limits

_STANDS_S = 0.1  # so soon no forecast is another one
_SAME_SHARE = 0.9  # of a prompt's length: the first token's time hardly differs


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """The refusal of a newcomer, and what it depended on."""

    refusal: Reject
    rank_s: float
    num_sequences: int
    num_bytes: int  # of a body with such a prompt; 0: the prompt was not known, and did not matter
    condition: Condition
    limits: Limits
    since_s: float

    def covers(self, ask: Ask, num_bytes: int, now_s: float) -> bool:
        """Whether a newcomer asks for about as much or more."""
        return (
            now_s - self.since_s <= _STANDS_S
            and ask.rank_s >= self.rank_s
            and ask.num_sequences == self.num_sequences  # more may never fit
            and num_bytes >= _SAME_SHARE * self.num_bytes
        )

    def outlasts_end(self, num_open: int) -> bool:
        """Whether it holds when a sequence has ended and so many are left."""
        # That one of many ends was foreseen, and so the next one's first token is no sooner.
        return self.refusal.reason != "queue_full" and num_open > self.limits.max_sequences
