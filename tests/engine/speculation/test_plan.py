"""The pure decisions of speculation, against exhaustive search."""

import itertools

import numpy as np
import pytest

from engine.speculation.plan import choose_counts, keep_or_change, rates_by_depth


def linear(slope_s: float, num_sizes: int = 64) -> np.ndarray:
    return 0.004 + slope_s * np.arange(num_sizes + 1)


def plateaus(tile: int, num_sizes: int = 64) -> np.ndarray:
    return 0.003 + 0.002 * -(-np.arange(num_sizes + 1) // tile)


@pytest.mark.parametrize("times_s", [linear(1e-5), linear(1e-3), plateaus(4), plateaus(8)])
@pytest.mark.parametrize("seed", range(4))
def test_counts_are_the_best_of_all(times_s: np.ndarray, seed: int) -> None:
    generator = np.random.default_rng(seed)
    survivals = np.multiply.accumulate(generator.random((3, 3)), axis=1)
    choice = choose_counts(survivals, 3.0, times_s[3:], sunk_s=0.0005)
    best = max(
        (3.0 + sum(survivals[i, :count].sum() for i, count in enumerate(counts)))
        / (times_s[3 + sum(counts)] + 0.0005)
        for counts in itertools.product(range(4), repeat=3)
    )
    plain = 3.0 / (times_s[3] + 0.0005)
    assert choice.expected_rate == pytest.approx(best if best > 1.01 * plain else plain)
    expected = 3.0 + sum(survivals[i, :count].sum() for i, count in enumerate(choice.counts))
    assert choice.expected_emitted == pytest.approx(expected)
    assert choice.num_verified == sum(choice.counts)


def test_most_likely_tokens_of_all_sequences_go_first() -> None:
    survivals = np.array([[0.9, 0.8, 0.1], [0.5, 0.1, 0.0]])
    times_s = np.array([0.0, 1.0, 1.0, 1.2, 1.4, 2.0, 9.0, 9.0, 9.0])
    assert choose_counts(survivals, 2.0, times_s[2:]).counts == [2, 0]
    assert choose_counts(survivals, 2.0, np.ones(7)).counts == [3, 2]


def test_a_plateau_is_filled_though_its_first_token_does_not_pay() -> None:
    times_s = np.array([0.0, 1.0, 1.9, 1.9, 1.9, 1.9])
    assert choose_counts(np.array([[0.8, 0.7, 0.6, 0.5]]), 1.0, times_s[1:]).counts == [4]
    assert choose_counts(np.array([[0.8, 0.0, 0.0, 0.0]]), 1.0, times_s[1:]).counts == [0]


def test_nothing_is_verified_past_the_largest_step() -> None:
    choice = choose_counts(np.full((4, 8), 0.9), 4.0, linear(1e-5, 6))
    assert choice.num_verified == 6
    assert choose_counts(np.full((4, 8), 0.9), 4.0, linear(1e-5, 6)[:1]).num_verified == 0


def test_no_drafts_and_no_candidates_are_no_choice() -> None:
    assert choose_counts(np.zeros((3, 8)), 3.0, linear(1e-5)).counts == [0, 0, 0]
    assert choose_counts(np.zeros((2, 0)), 2.0, linear(1e-5)).counts == [0, 0]


def test_depth_counts_drafting_and_lets_poor_drafts_be_dropped() -> None:
    profiles = np.array([[0.9, 0.8], [0.01, 0.0]])
    times_s = linear(2e-4)
    free = rates_by_depth(profiles, 1, 1.0, 0, times_s[1:], np.zeros(3))
    assert free[0] == pytest.approx(1.0 / times_s[1])
    # The good one is verified in full, of the poor one nothing.
    assert free[2] == pytest.approx((2.7 + 1.0) / (times_s[3] + times_s[1]))
    costly = rates_by_depth(profiles, 1, 1.0, 0, times_s[1:], np.array([0.0, 0.01, 0.02]))
    assert costly.argmax() == 0
    # More sequences than profiles: these are repeated.
    assert rates_by_depth(profiles, 5, 5.0, 0, times_s[5:], np.zeros(3)).argmax() == 2


def test_a_depth_is_kept_unless_another_is_clearly_better() -> None:
    assert keep_or_change(np.array([1.0, 1.2, 1.22]), 1, 0.03) == 1
    assert keep_or_change(np.array([1.0, 1.2, 1.25]), 1, 0.03) == 2
    assert keep_or_change(np.array([1.0, 1.2]), 4, 0.03) == 1
    # Not drafting is left only for a clear gain, and returned to at once.
    assert keep_or_change(np.array([1.0, 1.02]), 0, 0.03) == 0
    assert keep_or_change(np.array([1.0, 1.07]), 0, 0.03) == 1
    assert keep_or_change(np.array([1.0, 0.99]), 1, 0.03) == 0


def test_one_draft_is_chosen_from_as_if_it_were_among_others() -> None:
    generator = np.random.default_rng(3)
    for _ in range(200):
        row = np.cumprod(generator.uniform(0.2, 1.0, 6))
        row[int(generator.integers(1, 7)) :] = 0.0
        times_s = np.cumsum(generator.uniform(0.0, 0.002, int(generator.integers(2, 12)))) + 0.004
        settings = {"num_forced": int(generator.integers(0, 2)), "sunk_s": 0.0005}
        alone = choose_counts(row[None], 1.0, times_s, **settings)
        beside = choose_counts(np.vstack((row, np.zeros(6))), 1.0, times_s, **settings)
        assert alone.counts == beside.counts[:1]
        assert alone.num_verified == beside.num_verified
        assert alone.expected_emitted == pytest.approx(beside.expected_emitted)
        assert alone.expected_rate == pytest.approx(beside.expected_rate)
        assert alone.plain_rate == beside.plain_rate
