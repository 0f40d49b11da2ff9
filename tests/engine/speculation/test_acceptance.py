"""What is learned of a drafter's acceptance from the tokens that the target emits."""

import numpy as np
import pytest

from engine.speculation.acceptance import Acceptance
from engine.speculation.drafter import Draft
from tests.engine.speculation.simulation import Clock, PlantedDrafter

ONES = np.ones(1)


def acceptance(priors: tuple[float, ...] = (0.5, 0.5), max_drafts: int = 3) -> Acceptance:
    drafter = PlantedDrafter(Clock(), max_drafts=max_drafts, truth=priors, priors=priors)
    return Acceptance(drafter)


def survivals(learned: Acceptance, *buckets: int) -> list[float]:
    draft = Draft("mtp", [1] * len(buckets), list(buckets))
    return learned.survivals(learned.bucket_rows([draft], 3), ONES)[0].tolist()


def test_starts_from_the_prior_and_forgets_it() -> None:
    learned = acceptance(priors=(0.9, 0.5))
    assert survivals(learned, 0, 1) == pytest.approx([0.9, 0.45, 0.0])
    generator = np.random.default_rng(0)
    for i in range(3000):
        learned.observe(i % 50, Draft("mtp", [1], [0]), int(generator.random() < 0.2), 1)
    assert survivals(learned, 0)[0] == pytest.approx(0.2, abs=0.1)
    assert survivals(learned, 1)[0] == 0.5


def test_only_positions_that_were_reached_are_counted() -> None:
    learned = acceptance(priors=(0.5, 0.5, 0.5))
    draft = Draft("mtp", [7, 8, 9], [0, 1, 2])
    for _ in range(40):
        learned.observe(1, draft, 1, 2)  # accepted, rejected, not reached
    first, second, third = learned.by_position()
    assert first > 0.8
    assert second < 0.2
    assert third == 0.5
    # Emitted ids end before the second token: nothing is known of it.
    learned = acceptance(priors=(0.5, 0.5, 0.5))
    for _ in range(40):
        learned.observe(1, draft, 1, 1)
    assert learned.by_position()[1] == 0.5


def test_a_sequence_that_does_better_is_credited_alone() -> None:
    learned = acceptance()
    draft = Draft("mtp", [1], [0])
    for _ in range(60):
        learned.observe(1, draft, 1, 1)
        learned.observe(2, draft, 0, 1)
    easy, hard, new = learned.odds([1, 2, 3])
    assert easy > 2.0
    assert hard < 0.5
    assert new == 1.0
    learned.keep_only({2})
    assert learned.odds([1])[0] == 1.0
    assert learned.odds([2])[0] == hard
