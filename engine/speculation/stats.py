"""What speculation did for one request, counted where the request asked for it."""

from engine.types import DraftSummary


class DraftStats:
    """Counts of one sequence: the speculator announces drafts, the verifier says what they gave."""

    __slots__ = ("_accepted_by_position", "_announced", "_drafters", "_num_drafted", "_num_steps")

    def __init__(self) -> None:
        self._num_steps = 0
        self._num_drafted = 0
        self._accepted_by_position: list[int] = []
        self._drafters: dict[str, int] = {}
        self._announced: tuple[str, int] | None = None

    def announce(self, drafter: str, num_drafts: int) -> None:
        """Note who drafted how many tokens of the coming step."""
        self._announced = (drafter, num_drafts)

    def count_step(self, num_accepted: int) -> None:
        """Count a step that sampled tokens, and how many of its drafts they repeated."""
        self._num_steps += 1
        if self._announced is None:
            return
        (drafter, num_drafts), self._announced = self._announced, None
        self._num_drafted += num_drafts
        self._drafters[drafter] = self._drafters.get(drafter, 0) + num_accepted
        missing = num_accepted - len(self._accepted_by_position)
        self._accepted_by_position += [0] * max(0, missing)
        for position in range(num_accepted):
            self._accepted_by_position[position] += 1

    def summary(self) -> DraftSummary:
        """The counts so far."""
        return DraftSummary(
            self._num_steps,
            self._num_drafted,
            sum(self._accepted_by_position),
            tuple(self._accepted_by_position),
            dict(self._drafters),
        )
