"""What steps and drafts cost, as the policy compares them: curves of seconds by size."""

import numpy as np

from engine.speculation.cost_curve import (
    REBUILD_EVERY,
    SOON,
    CostCurve,
    FloatArray,
    Level,
)

# Of a step with as many tokens, for a run of a drafter that was never timed: it is tried, and
# then it is known.
GUESSED_RUN_SHARE = 0.08


class DraftCost:
    """Seconds of a drafter's call by the number of sequences and of drafts.

    Of one sequence these are the tokens that it drafted, since its chain may end early; of several
    the most that one of them was asked for: the call goes on while one of their chains does.
    """

    def __init__(self, step: CostCurve, max_sequences: int, max_drafts: int) -> None:
        self._step = step
        self._max_drafts = max_drafts
        # Most calls ask for one depth: what they show of the machine concerns the others too.
        level = Level()
        self._curves = [CostCurve(max_sequences, level) for _ in range(max_drafts)]
        self._cached: dict[int, FloatArray] = {}
        self._num_observed = 0

    def curve(self, num_drafts: int) -> CostCurve:
        """The curve by number of sequences for this many drafts, to seed or to read."""
        return self._curves[num_drafts - 1]

    def observe(self, num_sequences: int, num_drafts: int, draft_s: float) -> None:
        """Take in the time of one call."""
        self._curves[min(num_drafts, self._max_drafts) - 1].observe(num_sequences, draft_s)
        self._num_observed += 1
        if self._num_observed % REBUILD_EVERY == 0 or self._num_observed <= SOON:
            self._cached.clear()

    def times_s(self, num_sequences: int) -> FloatArray:
        """Return seconds by number of drafts, 0 … max_drafts; do not write to it."""
        times_s = self._cached.get(num_sequences)
        if times_s is None:
            times_s = self._compute(num_sequences)
            if any(curve.is_known for curve in self._curves):  # else the step's curve decides
                self._cached[num_sequences] = times_s
        return times_s

    def _compute(self, num_sequences: int) -> FloatArray:
        times_s = np.zeros(self._max_drafts + 1)
        known = [k for k, curve in enumerate(self._curves, 1) if curve.is_known]
        for k in range(1, self._max_drafts + 1):
            if known:
                nearest = min(known, key=lambda other: abs(other - k))
                measured_s = self._curves[nearest - 1].time_s(num_sequences)
                times_s[k] = measured_s * k / nearest
            else:
                times_s[k] = GUESSED_RUN_SHARE * k * self._step.time_s(num_sequences)
        return times_s


class Costs:
    """The step's curve, and the drafters'."""

    def __init__(self, max_step_tokens: int, max_sequences: int) -> None:
        self.step = CostCurve(max_step_tokens)
        self._max_sequences = max_sequences
        self._drafts: dict[str, DraftCost] = {}

    def drafter(self, name: str, max_drafts: int) -> DraftCost:
        """The costs of a drafter, made at first asking."""
        cost = self._drafts.get(name)
        if cost is None:
            cost = self._drafts[name] = DraftCost(self.step, self._max_sequences, max_drafts)
        return cost
