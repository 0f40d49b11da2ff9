"""What speculation did for one request, counted where the request asked for it."""

from engine.types import DraftSummary


class DraftStats:
    """Counts of one sequence; the scheduler's commit adds to it, its last event reports it."""

    __slots__ = ("_accepted_by_position", "_drafters", "_num_drafted", "_num_steps")

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_drafted = 0
        self._accepted_by_position: list[int] = []
        self._drafters: dict[str, int] = {}

    def count_step(self) -> None:
        """Count a step that sampled at least one token."""
        self._num_steps += 1

    def count_draft(self, drafter: str, num_verified: int, num_accepted: int) -> None:
        self._num_drafted += num_verified
        self._drafters[drafter] = self._drafters.get(drafter, 0) + num_accepted
        missing = num_accepted - len(self._accepted_by_position)
        self._accepted_by_position += [0] * max(0, missing)
        for position in range(num_accepted):
            self._accepted_by_position[position] += 1

    def summary(self) -> DraftSummary:
        return DraftSummary(
            self._num_steps,
            self._num_drafted,
            sum(self._accepted_by_position),
            tuple(self._accepted_by_position),
            dict(self._drafters),
        )
