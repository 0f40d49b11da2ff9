"""What speculation has done since the start: the counts behind the metrics and the explanation."""

import msgspec

RECENT_STEPS = 256.0  # after which an old step counts 1 / e in what is called recent


class DrafterCounts(msgspec.Struct):
    """Totals of one drafter; lists by position in the draft."""

    num_drafts: int = 0  # with at least one token verified
    num_drafted_tokens: int = 0  # verified
    num_accepted_tokens: int = 0
    drafted_by_position: list[int] = []
    accepted_by_position: list[int] = []


class Tally:
    """Totals by drafter, and recent means over steps."""

    def __init__(self, max_drafts: dict[str, int]) -> None:
        self.drafters = {
            name: DrafterCounts(drafted_by_position=[0] * most, accepted_by_position=[0] * most)
            for name, most in max_drafts.items()
        }
        # Sequences' steps by number of drafted tokens verified, from 0 on.
        self.depth_histogram = [0] * (max(max_drafts.values(), default=0) + 1)
        self.tokens_per_step = 1.0  # emitted for a sequence, recent mean
        self.estimated_speedup = 1.0  # against no drafts, recent mean

    def count_draft(self, name: str, num_verified: int, num_accepted: int) -> None:
        """Count what was verified of one draft."""
        counts = self.drafters[name]
        counts.num_drafts += 1
        counts.num_drafted_tokens += num_verified
        counts.num_accepted_tokens += num_accepted
        for position in range(num_verified):
            counts.drafted_by_position[position] += 1
        for position in range(num_accepted):
            counts.accepted_by_position[position] += 1

    def count_sequence(self, num_verified: int, num_emitted: int) -> None:
        """Count one sequence's part in a step."""
        self.depth_histogram[num_verified] += 1
        self.tokens_per_step += (num_emitted - self.tokens_per_step) / RECENT_STEPS

    def estimate(self, speedup: float) -> None:
        """Take in what the choice for a step promised against no drafts."""
        self.estimated_speedup += (speedup - self.estimated_speedup) / RECENT_STEPS
