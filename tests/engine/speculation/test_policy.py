"""The policy in a world of planted costs and acceptance, against the best constant depth."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from engine.speculation.candidates import Candidate, StepDrafts, decoding_times_s
from engine.speculation.costs import Costs
from engine.speculation.drafter import Draft
from engine.speculation.plan import choose_counts
from engine.speculation.policy import SpeculationPolicy
from engine.speculation.report import report
from tests.engine.speculation.simulation import (
    RIGHT,
    WRONG,
    Clock,
    PlantedDrafter,
    World,
    best_fixed_rate,
    sequence,
)

Cost = Callable[[int], float]


def linear(num_tokens: int) -> float:
    return 0.004 + 0.0002 * num_tokens


def compute_bound(num_tokens: int) -> float:
    return 0.001 + 0.002 * num_tokens


def plateaus(num_tokens: int) -> float:
    """Rows are computed in tiles of eight."""
    return 0.004 + 0.0015 * -(-num_tokens // 8)


POOR, MIXED, GOOD = (0.02, 0.02, 0.02), (0.1, 0.4, 0.8), (0.9, 0.95, 0.98)


def make_world(
    step_s: Cost, truth: tuple[float, ...], num_sequences: int
) -> tuple[World, PlantedDrafter]:
    clock = Clock()
    drafter = PlantedDrafter(clock, truth=truth, run_s=lambda m: 0.0003 + 0.00003 * m)
    return World(step_s, clock, [drafter], num_sequences), drafter


def changes(values: list[int]) -> int:
    return sum(before != after for before, after in itertools.pairwise(values))


@pytest.mark.parametrize("num_sequences", [1, 8, 32])
@pytest.mark.parametrize("truth", [POOR, MIXED, GOOD])
@pytest.mark.parametrize("step_s", [linear, compute_bound, plateaus])
def test_yields_what_the_best_depth_would_and_does_not_oscillate(
    step_s: Cost, truth: tuple[float, ...], num_sequences: int
) -> None:
    world, drafter = make_world(step_s, truth, num_sequences)
    world.run(400)
    rate = world.run(400)
    assert rate > 0.95 * best_fixed_rate(world, drafter)
    assert changes(world.depths[400:]) <= 6


@pytest.mark.parametrize(("before", "after"), [(POOR, GOOD), (GOOD, POOR)])
@pytest.mark.parametrize("num_sequences", [1, 8])
def test_recovers_when_acceptance_changes(
    before: tuple[float, ...], after: tuple[float, ...], num_sequences: int
) -> None:
    world, drafter = make_world(linear, before, num_sequences)
    world.run(600)
    drafter.truth = list(after)
    world.run(2500)
    assert world.run(300) > 0.95 * best_fixed_rate(world, drafter)


def test_drafts_less_as_the_load_grows_and_more_when_it_is_gone() -> None:
    world, drafter = make_world(linear, MIXED, 1)
    world.run(300)
    assert np.mean(world.num_verified[-100:]) > 0.8
    world.resize(48)
    world.run(300)
    # Of 48 sequences hardly a token is drafted, and hardly any time goes into probes.
    assert world.run(300) > 0.98 * best_fixed_rate(world, drafter)
    assert np.mean(world.num_verified[-300:]) < 4.0
    world.resize(1)
    world.run(100)
    assert np.mean(world.num_verified[-50:]) > 0.8


def test_a_machine_that_lost_a_core_is_noticed_and_one_that_got_it_back_as_well() -> None:
    world, drafter = make_world(linear, MIXED, 4)
    world.run(300)
    world.step_s = lambda num_tokens: 0.005 + 0.0009 * num_tokens
    world.run(1500)
    assert world.run(300) > 0.95 * best_fixed_rate(world, drafter)
    world.step_s = linear
    world.run(1500)
    assert world.run(300) > 0.95 * best_fixed_rate(world, drafter)


def test_a_free_draft_is_preferred_where_it_promises_more() -> None:
    clock = Clock()
    free = PlantedDrafter(
        clock, "ngram", max_drafts=8, truth=(0.2, 0.95), shares=(0.0, 1.0), priors=(0.2, 0.9),
        run_s=lambda m: 1e-6, is_free=True, proposes=0.5,
    )  # fmt: skip
    model = PlantedDrafter(clock, truth=MIXED, run_s=lambda m: 0.0003)
    world = World(linear, clock, [free, model])
    world.run(300)
    calls = model.num_calls
    world.run(400)
    # The model is asked for about the half without a free draft.
    assert 120 < model.num_calls - calls < 280
    tally = world.policy.tally.drafters
    assert tally["ngram"].num_accepted_tokens > tally["mtp"].num_accepted_tokens > 0


def test_of_two_drafts_the_one_that_promises_more_stays() -> None:
    step = StepDrafts([Candidate(sequence(i), 9) for i in range(2)], 0, np.ones(9), 3)
    long, short = Draft("a", [1, 2, 3], [0, 0, 0]), Draft("b", [4], [0])
    step.put([0, 1], [long, long], np.array([[0.9, 0.8, 0.7], [0.3, 0.2, 0.1]]), set())
    step.put([0, 1], [short, short], np.array([[0.9], [0.9]]), set())
    assert step.drafts == [long, short]
    assert step.survivals.tolist() == [[0.9, 0.8, 0.7], [0.9, 0.0, 0.0]]
    step.put([0], [short], np.array([[0.9]]), {0})
    assert step.drafts[0] == short
    assert step.forced == {0: 1}


def named(drafter: str, num_drafts: int | None = None, max_drafts: int = 9) -> list[Candidate]:
    return [Candidate(sequence(1), max_drafts, drafter, num_drafts)]


def test_a_request_may_opt_out_choose_and_insist() -> None:
    world, drafter = make_world(compute_bound, POOR, 1)
    policy = world.policy
    world.run(400)
    calls = drafter.num_calls
    assert policy.draft(named("off"))[0].token_ids == []
    assert policy.draft(named("ngram"))[0].token_ids == []
    assert policy.draft(named("auto", max_drafts=0))[0].token_ids == []
    assert drafter.num_calls == calls
    for num_drafts in (1, 3):
        assert len(policy.draft(named("mtp", num_drafts))[0].token_ids) == num_drafts
    assert len(policy.draft(named("mtp", 4, max_drafts=2))[0].token_ids) == 2


def test_drafts_that_were_not_verified_are_judged_by_what_was_emitted() -> None:
    """At K = 0 a drafter that has become right is seen to be right."""
    world, drafter = make_world(linear, POOR, 1)
    world.run(500)
    low = world.policy.acceptance["mtp"].by_position()[0]
    drafter.truth = list(GOOD)
    for _ in range(40):
        (draft,) = world.policy.draft(named("mtp", 2))
        expected = int(draft.token_ids[0] == RIGHT)
        # The scheduler had no block for them: none was verified.
        assert world.policy.observe(1, 0, [RIGHT]) == 0
        assert expected in (0, 1)
    assert world.policy.acceptance["mtp"].by_position()[0] > low + 0.2


def test_accepted_tokens_are_those_that_match_and_were_verified() -> None:
    world, _ = make_world(linear, GOOD, 1)
    policy = world.policy
    (draft,) = policy.draft(named("mtp", 3))
    ids = draft.token_ids
    wrong = [RIGHT + WRONG - ids[0], RIGHT]
    assert policy.observe(1, 3, wrong[:1]) == 0
    (draft,) = policy.draft(named("mtp", 3))
    assert policy.observe(1, 2, [*draft.token_ids[:2], 9]) == 2
    # The end of the sequence cuts the emitted tokens short.
    (draft,) = policy.draft(named("mtp", 3))
    assert policy.observe(1, 3, draft.token_ids[:1]) == 1
    counts = policy.tally.drafters["mtp"]
    assert counts.drafted_by_position == [3, 3, 2, 0]
    assert counts.accepted_by_position == [2, 1, 0, 0]
    assert policy.tally.depth_histogram[3] == 2


@pytest.mark.parametrize("is_free", [False, True])
def test_a_drafter_that_fails_is_not_asked_again_and_the_others_are(is_free: bool) -> None:
    clock = Clock()
    broken = PlantedDrafter(clock, "broken", truth=GOOD, is_free=is_free)
    other = PlantedDrafter(clock, "other", truth=GOOD, is_free=not is_free, proposes=0.9)
    world = World(linear, clock, [broken, other])
    world.run(50)

    def fail(sequences: object, max_drafts: object) -> list[Draft]:
        raise RuntimeError("out of range")

    broken.propose = fail  # type: ignore[method-assign]
    before = other.num_calls
    world.run(100)
    assert other.num_calls > before
    assert np.mean(world.num_verified[-50:]) > 2
    state = {drafter.name: drafter for drafter in report(world.policy).drafters}
    assert not state["broken"].qualifies
    assert "out of range" in state["broken"].status
    assert state["other"].qualifies


def test_says_what_it_does_and_why() -> None:
    clock = Clock()
    drafter = PlantedDrafter(clock, truth=GOOD)
    policy = SpeculationPolicy(
        [drafter], Costs(64, 8), clock=clock, unavailable={"draft": "no --draft-model was given"}
    )
    assert policy.draft(named("auto"))[0].token_ids == []
    assert "before the time of a step is known" in report(policy).choice
    world, _ = make_world(linear, GOOD, 2)
    world.run(300)
    state = report(world.policy)
    assert state.drafters[0].depth == 4
    assert "asked for 4" in state.drafters[0].status
    assert "drafted tokens verified for 2 sequences" in state.choice
    assert state.estimated_speedup > 1.5
    assert state.tokens_per_step > 2.0
    assert [unavailable.status for unavailable in report(policy).drafters[1:]] == [
        "no --draft-model was given"
    ]
    world, _ = make_world(compute_bound, POOR, 8)
    world.run(300)
    assert "not asked" in report(world.policy).drafters[0].status
    assert "no draft was worth verifying" in report(world.policy).choice


def test_beside_a_prompt_a_draft_is_no_cheaper_than_alone() -> None:
    # A row costs as much as it emits at best. In a step of a long prompt a draft would look cheap
    # against the few tokens that such a step emits, and yet it would hold everybody up.
    times_s = 0.003 + 0.001 * np.arange(513)
    alone, beside = (decoding_times_s(times_s, 4, others) for others in (0, 124))
    np.testing.assert_allclose(alone[:100], beside[:100])
    assert len(beside) == 513 - 128
    assert choose_counts(np.full((4, 4), 0.5), 4.0, beside).num_verified == 0
    assert choose_counts(np.full((4, 4), 0.99), 4.0, beside).num_verified == 16
    assert len(decoding_times_s(times_s, 4, 600)) == 1, "such a step has no room"


def test_who_names_a_drafter_that_lost_its_trust_is_probed_too() -> None:
    drafter = PlantedDrafter(Clock(), truth=(0.0,), shares=(1.0,), priors=(0.9,))
    world = World(lambda n: 0.003 + 0.0002 * n, drafter._clock, [drafter])
    world.candidates = [Candidate(sequence(1), 9, "mtp")]
    world.run(400)
    assert world.policy.models.planners["mtp"].depth == 0
    drafter.truth = [0.95]
    world.run(2000)
    assert world.policy.models.planners["mtp"].depth > 0


@pytest.mark.parametrize(("steps", "calls"), [(8.0, 1.0), (1.0, 12.0), (8.0, 8.0)])
def test_a_disturbed_calibration_costs_little_and_not_for_long(steps: float, calls: float) -> None:
    clock = Clock()
    drafter = PlantedDrafter(clock, truth=GOOD)
    world = World(linear, clock, [drafter], seed_factor=steps, call_seed_factor=calls)
    world.run(60)
    assert world.run(200) > 0.9 * best_fixed_rate(world, drafter)


@pytest.mark.parametrize("truth", [POOR, MIXED, GOOD])
def test_the_measured_speedup_is_that_of_the_clock_whatever_was_calibrated(
    truth: tuple[float, ...],
) -> None:
    clock = Clock()
    drafter = PlantedDrafter(clock, truth=truth)
    world = World(linear, clock, [drafter], seed_factor=20.0)
    world.run(300)
    rate = world.run(400)
    plain = World(linear, clock, [])
    expected = rate / plain.run(400)
    assert report(world.policy).measured_speedup == pytest.approx(expected, rel=0.12)
