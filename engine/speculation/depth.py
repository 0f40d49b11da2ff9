"""How deep a drafter that costs a model's run drafts: planned every few steps, with hysteresis.

One planner for each such drafter. It keeps the buckets of recent drafts of full depth, which stand
for those to come; the policy asks it and hands it those drafts.
"""

import numpy as np

from engine.speculation.acceptance import Acceptance
from engine.speculation.candidates import StepDrafts
from engine.speculation.cost_curve import FloatArray
from engine.speculation.costs import Costs
from engine.speculation.drafter import Draft
from engine.speculation.plan import keep_or_change, rates_by_depth

NUM_PROFILES = 32
MIN_PROFILES = 8  # fewer say less than the prior by position
PLAN_EVERY = 8  # steps, unless the load changes
LOAD_CHANGE = 0.25  # of the step's tokens: planned anew at once
MARGIN = 0.03  # a depth is left only for one that is better by this much


class DepthPlanner:
    """The depth for one drafter, 0 … max_drafts; 0: it is not asked."""

    def __init__(self, acceptance: Acceptance, costs: Costs) -> None:
        self.name = acceptance.name
        self.max_drafts = acceptance.max_drafts
        self.cost = costs.drafter(acceptance.name, acceptance.max_drafts)
        self.depth = 0
        self.rates: FloatArray = np.zeros(acceptance.max_drafts + 1)
        self.num_changes = 0
        self._acceptance = acceptance
        self._profiles = np.zeros((NUM_PROFILES, acceptance.max_drafts), np.intp)
        self._num_profiles = 0
        self._calls_left = 0
        self._mean_gains: FloatArray = np.zeros(acceptance.max_drafts)
        self._gains_left = 0
        self._planned_tokens = 0

    def is_due(self, base_tokens: int) -> bool:
        """Whether to plan anew, for a step that has base_tokens tokens without drafts."""
        self._calls_left -= 1
        change = abs(base_tokens - self._planned_tokens)
        return self._calls_left <= 0 or change > LOAD_CHANGE * self._planned_tokens

    def plan(
        self, odds: FloatArray, base_emitted: float, step: StepDrafts, num_drafted: int
    ) -> None:
        """Choose the depth for sequences with these odds in a step that else emits base_emitted.

        It has num_drafted tokens that others drafted.
        """
        num_sequences = len(odds)
        self._calls_left = PLAN_EVERY
        self._planned_tokens = step.base_tokens
        self.rates = rates_by_depth(
            self._profile_survivals(float(odds.mean())),
            num_sequences,
            base_emitted,
            num_drafted,
            step.times_s,
            self.cost.times_s(num_sequences),
        )
        depth = keep_or_change(self.rates, self.depth, MARGIN)
        self.num_changes += depth != self.depth
        self.depth = depth

    def add_profile(self, draft: Draft) -> None:
        """Take in a draft for which full depth was asked."""
        row = self._acceptance.bucket_rows([draft], self.max_drafts)[0]
        self._profiles[self._num_profiles % NUM_PROFILES] = row
        self._num_profiles += 1

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
        rows = self._profiles[: min(self._num_profiles, NUM_PROFILES)]
        return self._acceptance.survivals(rows, np.ones(1))

    def _profile_survivals(self, odds: float) -> FloatArray:
        """Survivals of recent drafts, of a sequence with these odds: (P, max_drafts)."""
        if self._num_profiles < MIN_PROFILES:
            return self._acceptance.typical_survivals(odds)
        rows = self._profiles[: min(self._num_profiles, NUM_PROFILES)]
        return self._acceptance.survivals(rows, np.array([odds]))
