"""One stream: what is verified for it, and how long a chain goes on."""

from collections.abc import Sequence as Row

import numpy as np
import pytest

from engine.sequence import Sequence
from engine.speculation.acceptance import Acceptance
from engine.speculation.candidates import Candidate, StepDrafts
from engine.speculation.costs import Costs
from engine.speculation.depth import MIN_PROFILES, DepthPlanner
from engine.speculation.drafter import Draft
from engine.speculation.single_stream import LongRunRate, SingleStep
from tests.engine.speculation.simulation import (
    RIGHT,
    Clock,
    PlantedDrafter,
    World,
    best_fixed_rate,
    sequence,
)

SECONDS = [0.0, *(0.002 + 0.0002 * rows for rows in range(9))]  # by tokens of a step
DRAFT = Draft("ngram", [1, 2, 3, 4], [0, 0, 0, 0])


def single_step(rate: float) -> SingleStep:
    return SingleStep(Candidate(sequence(1), 8), SECONDS, rate)


def test_a_token_is_verified_where_its_time_would_bring_less_elsewhere() -> None:
    # A row takes 0.2 ms: at 1,000 tokens a second it has to bring 0.2 tokens. The step's own rate
    # rises up to 1,700, at which the last one would not pay.
    step = single_step(1000.0)
    step.consider(DRAFT, [0.95, 0.9, 0.85, 0.25])
    assert step.count == 4
    assert step.value == pytest.approx(2.95 - 0.8)
    # Its own rate is that of no drafts, 500, at which a row would pay with 0.1.
    step = single_step(1000.0)
    step.consider(DRAFT, [0.15, 0.1, 0.05, 0.02])
    assert step.count == 0
    # A token that does not pay is passed for one that does.
    step = single_step(1000.0)
    step.consider(DRAFT, [0.19, 0.19, 0.19, 0.19])
    assert step.count == 0


def test_of_two_drafts_the_one_worth_more_is_verified() -> None:
    step = single_step(1000.0)
    step.consider(DRAFT, [0.5, 0.3])
    step.consider(Draft("mtp", [7], [0]), [0.6])
    assert (step.draft.drafter, step.count) == ("mtp", 1)
    step.consider(DRAFT, [0.5, 0.3])
    assert step.draft.drafter == "mtp"


def test_the_long_run_rate_is_that_of_all_steps_together() -> None:
    rate = LongRunRate()
    assert rate.per_s(0.002) == 500.0
    for _ in range(400):
        rate.observe(1.0, 0.002)
        rate.observe(5.0, 0.003)
    assert rate.per_s(0.002) == pytest.approx(6.0 / 0.005, rel=0.02)
    assert rate.per_s(0.0001) == 10000.0, "no drafts can always be had"


class EndingDrafter(PlantedDrafter):
    """Ends a chain where it is not sure enough: each token is right as often as the truth says."""

    def __init__(self, clock: Clock, truth: float, call_s: float) -> None:
        super().__init__(clock, truth=(truth,), shares=(1.0,), priors=(0.5,))
        self.min_confidence = 0.1
        self.draft_s = 0.0
        self.catch_up_s = 0.0
        self.call_s = call_s
        self.run_s = lambda m: 0.0

    def propose(self, sequences: Row[Sequence], max_drafts: Row[int]) -> list[Draft]:
        (draft,) = super().propose(sequences, max_drafts)
        confidence, length = 1.0, 0
        while length < len(draft.token_ids):
            length += 1
            confidence *= self.truth[0]
            if confidence < self.min_confidence:
                break
        self.draft_s = length * self.call_s
        self._clock.now_s += self.draft_s + self.catch_up_s
        return [draft.truncated(length)]


@pytest.mark.parametrize(("call_s", "lengths"), [(0.00001, {4}), (0.0015, {1, 2})])
def test_a_chain_ends_sooner_where_a_call_costs_more(call_s: float, lengths: set[int]) -> None:
    clock = Clock()
    drafter = EndingDrafter(clock, 0.6, call_s)
    world = World(lambda n: 0.004 + 0.0001 * n, clock, [drafter])
    world.run(300)
    (draft,) = drafter.propose([sequence(1)], [4])
    assert len(draft.token_ids) in lengths
    assert world.run(300) > 0.95 * best_fixed_rate(world, priced(drafter))


def priced(drafter: EndingDrafter) -> PlantedDrafter:
    """The same without ends, as the best constant depth is computed from."""
    return PlantedDrafter(
        Clock(), truth=drafter.truth, shares=(1.0,), run_s=lambda m: drafter.call_s
    )


def test_a_depth_is_planned_with_the_calls_that_chains_take_and_not_with_those_they_might() -> None:
    drafter = PlantedDrafter(Clock(), truth=(0.9,), shares=(1.0,), priors=(0.9,))
    costs = Costs(64, 8)
    planner = DepthPlanner(Acceptance(drafter), costs, ends_early=True)
    for depth in range(1, 5):
        planner.cost.curve(depth).seed(1, 0.001 * depth)
    np.testing.assert_allclose(planner.draft_times_s(1), [0.0, 0.001, 0.002, 0.003, 0.004])
    step = StepDrafts([Candidate(sequence(1), 8)], 0, np.full(65, 0.004), 4)
    for number in range(MIN_PROFILES):
        length = 1 if number % 2 else 3
        planner.add_profile(Draft("mtp", [RIGHT] * length, [0] * length))
    assert planner.is_due(1)
    planner.plan(np.ones(1), 1.0, step, 0)
    np.testing.assert_allclose(planner.draft_times_s(1), [0.0, 0.001, 0.0015, 0.002, 0.002])


def test_a_drafter_that_is_behind_when_it_is_probed_is_not_taken_for_a_dear_one() -> None:
    clock = Clock()
    drafter = EndingDrafter(clock, 0.01, 0.0001)
    world = World(lambda n: 0.004 + 0.0001 * n, clock, [drafter])
    world.run(600)
    drafter.catch_up_s = 0.005  # in each probe, since it is hardly asked
    calls = drafter.num_calls
    world.run(8000)
    assert 4 < drafter.num_calls - calls < 200
    call_s = world.policy.models.planners["mtp"].cost.times_s(1)[1]
    assert call_s == pytest.approx(0.0001, rel=0.5)
