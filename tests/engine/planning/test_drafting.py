"""What the preview says of drafts, against the policy itself in a world of planted costs."""

import pytest

from engine.planning.drafting import Drafting, MeasuredDrafts, ModelDrafts, measured_drafts
from engine.speculation.report import report
from tests.engine.speculation.simulation import Clock, PlantedDrafter, World

NOISE = 1.05 * 1.04  # of the world's steps, on the mean: its noise and its stalls


def step_s(num_tokens: float) -> float:
    return 0.004 + 0.0004 * num_tokens


def _world(num_sequences: int) -> World:
    """Half of the texts' steps have looked-up drafts, most of them good; a model has mixed ones."""
    clock = Clock()
    free = PlantedDrafter(
        clock, "ngram", max_drafts=8, truth=(0.2, 0.97), shares=(0.1, 0.9), priors=(0.5, 0.5),
        run_s=lambda m: 1e-5 if m else 0.0, is_free=True, proposes=0.5,
    )  # fmt: skip
    model = PlantedDrafter(clock, truth=(0.1, 0.5, 0.9), run_s=lambda m: 0.0002)
    return World(step_s, clock, [free, model], num_sequences)


def _drafting(known: MeasuredDrafts) -> Drafting:
    assert known.free is not None
    model = ModelDrafts(known.models["mtp"], known.run_share["mtp"])
    return Drafting(free=known.free, models=(model,), deciding_s=known.deciding_s)


@pytest.mark.parametrize("seen_with", [1, 8])
@pytest.mark.parametrize("num_sequences", [1, 8, 24])
def test_the_gain_is_what_the_policy_makes_of_it_at_any_load(
    seen_with: int, num_sequences: int
) -> None:
    world = _world(seen_with)
    world.run(600)
    drafting = _drafting(measured_drafts(report(world.policy), world.policy.profiles()))
    assert drafting.basis == "measured"
    gain = drafting.gain(num_sequences, lambda own, drafted: step_s(own + drafted))
    world.resize(num_sequences)
    world.run(400)
    measured = world.run(600) / (num_sequences / (step_s(num_sequences) * NOISE))
    assert gain == pytest.approx(measured, rel=0.12)
    assert gain > 1.1


def test_few_steps_say_nothing_of_lookup_and_later_ones_replace_what_was_known() -> None:
    world = _world(1)
    world.run(100)
    few = measured_drafts(report(world.policy), world.policy.profiles())
    assert few.free is None
    world.run(500)
    many = measured_drafts(report(world.policy), world.policy.profiles())
    assert many.free is not None
    assert many.renewed(few).free is many.free
    assert few.renewed(many).free is many.free


def test_the_latest_rows_are_kept() -> None:
    world = _world(8)
    world.run(300)
    free = world.policy.profiles().free
    assert free.shape == (512, 8)
    # Half of the sequences had no draft in a step; of the others all eight tokens count.
    assert 0.4 < (free[:, 0] > 0).mean() < 0.6
