"""How deep a drafter that costs a model's run drafts: planned every few steps, with hysteresis.

One planner for each such drafter. It keeps the buckets of recent drafts of full depth, which stand
for those to come; the policy asks it and hands it those drafts.
"""

import numpy as np

from engine.speculation.acceptance import Acceptance
from engine.speculation.candidates import StepDrafts
from engine.speculation.cost_curve import FloatArray
from engine.speculation.costs import Costs
from engine.speculation.drafter import USUAL_CONFIDENCE, Draft
from engine.speculation.plan import keep_or_change, rates_by_depth

NUM_PROFILES = 128
ENOUGH_PROFILES = 32  # for others to plan by
MIN_PROFILES = 8  # fewer say less than the prior by position
PLAN_EVERY = 16  # steps, unless the load changes
LOAD_CHANGE = 0.25  # of the step's tokens: planned anew at once
LEAST_ACCEPTED = 0.25
MARGIN = 0.03  # a depth is left only for one that is better by this much


class DepthPlanner:
    """The depth for one drafter, 0 … max_drafts; 0: it is not asked."""

    def __init__(self, acceptance: Acceptance, costs: Costs, *, ends_early: bool = False) -> None:
        """`ends_early`: the drafter ends a draft that it is not sure of; see `Chain`."""
        self._ends_early = ends_early
        self.name = acceptance.name
        self.max_drafts = acceptance.max_drafts
        self.cost = costs.drafter(acceptance.name, acceptance.max_drafts)
        self.depth = 0
        self.rates: FloatArray = np.zeros(acceptance.max_drafts + 1)
        self.num_changes = 0
        self._acceptance = acceptance
        self._profiles = np.zeros((NUM_PROFILES, acceptance.max_drafts), np.intp)
        self._lengths = np.zeros(NUM_PROFILES, np.intp)  # of these drafts: a chain may end early
        self._num_profiles = 0
        self._new: list[Draft] = []  # not among them yet
        self._draft_times_s: FloatArray | None = None  # of one sequence, since a plan was last due
        self._calls_left = 0
        self._mean_gains: FloatArray = np.zeros(acceptance.max_drafts)
        self._gains_left = 0
        self._planned_tokens = 0

    def is_due(self, base_tokens: int) -> bool:
        """Whether to plan anew, for a step that has base_tokens tokens without drafts."""
        self._calls_left -= 1
        change = abs(base_tokens - self._planned_tokens)
        is_due = self._calls_left <= 0 or change > LOAD_CHANGE * self._planned_tokens
        if is_due:
            self._draft_times_s = None
            self._gains_left = 0
        return is_due

    def plan(
        self, odds: FloatArray, base_emitted: float, step: StepDrafts, num_drafted: int
    ) -> None:
        """Choose the depth for sequences with these odds in a step that else emits base_emitted.

        It has num_drafted tokens that others drafted.
        """
        num_sequences = len(odds)
        self._calls_left = PLAN_EVERY
        self._planned_tokens = step.base_tokens
        # Where to end a single chain is better seen while it is drafted.
        is_free_to_end = self._ends_early and num_sequences == 1
        self.rates = rates_by_depth(
            self._profile_survivals(float(odds.mean())),
            num_sequences,
            base_emitted,
            num_drafted,
            step.times_s,
            self.draft_times_s(num_sequences),
            self.max_drafts if is_free_to_end else 1,
        )
        depth = keep_or_change(self.rates, self.depth, MARGIN)
        self.num_changes += depth != self.depth
        self.depth = depth

    def add_profile(self, draft: Draft) -> None:
        """Take in a draft for which full depth was asked."""
        self._new.append(draft)

    def _take_in_new(self) -> None:
        """Between two steps a few at once take hardly longer than one."""
        if not self._new:
            return
        rows = self._acceptance.bucket_rows(self._new, self.max_drafts)
        for row, draft in zip(rows, self._new, strict=True):
            at = self._num_profiles % NUM_PROFILES
            self._profiles[at], self._lengths[at] = row, len(draft.token_ids)
            self._num_profiles += 1
        self._new.clear()

    def draft_times_s(self, num_sequences: int) -> FloatArray:
        """Seconds of a call by the number of drafts asked for, 0 … max_drafts."""
        if num_sequences > 1:
            return self.cost.times_s(num_sequences)
        if self._draft_times_s is None:
            times_s = self.cost.times_s(1)
            self._take_in_new()
            if self._num_profiles >= MIN_PROFILES:  # a chain that ends early takes less
                lengths = self._lengths[: min(self._num_profiles, NUM_PROFILES)]
                reached = np.minimum(lengths[:, None], np.arange(self.max_drafts + 1))
                times_s = times_s[reached].mean(axis=0)
            self._draft_times_s = times_s
        return self._draft_times_s

    def least_confidence(self, num_sequences: int, rate: float, token_price: float) -> float:
        """How sure of its tokens a chain must be for the next one to pay.

        With several sequences a call goes on for all while one of them does, and its cost is known
        less well: a fixed bound stands for it. With one, the next token costs a part of the call
        and a place in the step; it is accepted with the chain's confidence times its own.
        """
        if num_sequences > 1:
            return USUAL_CONFIDENCE
        times_s = self.cost.times_s(1)
        call_s = float(times_s[-1] - times_s[1]) / max(1, self.max_drafts - 1)
        accepted = self._acceptance.by_position()[-1]
        return (rate * call_s + token_price) / max(accepted, LEAST_ACCEPTED)

    def mean_gains(self, token_price: float) -> FloatArray:
        """Mean of what a draft adds beyond the price of its tokens, by depth 1 … max_drafts."""
        if self._gains_left == 0:
            gains = np.maximum(self._profile_survivals(1.0) - token_price, 0.0)
            self._mean_gains = np.cumsum(gains.mean(axis=0))
            self._gains_left = PLAN_EVERY
        self._gains_left -= 1
        return self._mean_gains

    def profiles(self) -> FloatArray:
        """Survivals of recent drafts of full depth, of a sequence like any: (P, max_drafts)."""
        self._take_in_new()
        rows = self._profiles[: min(self._num_profiles, NUM_PROFILES)]
        return self._acceptance.survivals(rows, np.ones(1))

    def _profile_survivals(self, odds: float) -> FloatArray:
        """Survivals of recent drafts, of a sequence with these odds: (P, max_drafts)."""
        self._take_in_new()
        if self._num_profiles < MIN_PROFILES:
            return self._acceptance.typical_survivals(odds)
        rows = self._profiles[: min(self._num_profiles, NUM_PROFILES)]
        return self._acceptance.survivals(rows, np.array([odds]))
