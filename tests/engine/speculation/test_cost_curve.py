"""Curves of seconds by size: what they learn from noisy times, and from few."""

import numpy as np
import pytest

from engine.speculation.cost_curve import CostCurve, never_falling
from engine.speculation.costs import Costs


def seeded(time_s: float = 0.004, slope_s: float = 0.0002) -> CostCurve:
    curve = CostCurve(128)
    for size in (1, 4, 16, 64, 128):
        curve.seed(size, time_s + slope_s * size)
    return curve


def test_sizes_between_and_beyond_the_known_ones_are_interpolated() -> None:
    curve = CostCurve(64)
    curve.seed(4, 0.004)
    curve.seed(8, 0.006)
    times_s = curve.times_s()
    assert times_s[1] == times_s[4] == pytest.approx(0.004)
    assert times_s[6] == pytest.approx(0.005)
    assert times_s[64] == pytest.approx(0.006 + 56 * 0.0005)


def test_times_never_fall() -> None:
    assert never_falling([1.0, 3.0, 2.0, 4.0], [1.0] * 4) == [1.0, 2.5, 2.5, 4.0]
    assert never_falling([3.0, 1.0], [3.0, 1.0]) == [2.5, 2.5]
    curve = CostCurve(16)
    for size, time_s in ((1, 0.004), (8, 0.003), (16, 0.009)):
        curve.seed(size, time_s)
    assert (np.diff(curve.times_s()[1:]) >= 0).all()


def test_learns_a_plateau_from_noisy_times_with_stalls() -> None:
    curve = CostCurve(128)
    generator = np.random.default_rng(0)

    def truth(size: int) -> float:
        return 0.003 + 0.002 * -(-size // 8)

    for _ in range(4000):
        size = int(generator.integers(1, 65))
        stall = 20.0 if generator.random() < 0.02 else 1.0
        curve.observe(size, truth(size) * stall * generator.normal(1.0, 0.05))
    times_s = curve.times_s()
    for size in (1, 4, 8, 16, 24, 32, 48, 64):
        assert times_s[size] == pytest.approx(truth(size), rel=0.08), size


def test_one_stall_hardly_moves_the_curve() -> None:
    curve = seeded()
    before_s = curve.times_s()[4]
    for _ in range(8):
        curve.observe(4, 0.0048)
    curve.observe(4, 3.0)
    assert curve.times_s()[4] == pytest.approx(before_s, rel=0.05)


def test_a_slower_machine_is_not_taken_for_a_costlier_size() -> None:
    """Only one size is run while everything becomes 1.5 times as slow."""
    curve = seeded()
    before_s = curve.times_s().copy()
    for _ in range(40):
        curve.observe(4, 1.5 * before_s[4])
    assert curve.times_s()[1] / before_s[1] > 1.1  # at once, though it was seen not long ago
    for _ in range(400):
        curve.observe(4, 1.5 * before_s[4])
    after_s = curve.times_s()
    assert after_s[4] == pytest.approx(1.5 * before_s[4], rel=0.02)
    assert after_s[1] / before_s[1] > 1.15
    assert after_s[1] <= after_s[4]


def test_sizes_that_no_curve_holds_are_ignored() -> None:
    curve = seeded()
    before_s = curve.times_s().copy()
    for size, time_s in ((0, 1.0), (129, 1.0), (4, 0.0)):
        for _ in range(20):
            curve.observe(size, time_s)
    assert (curve.times_s() == before_s).all()


def test_drafts_that_were_never_timed_are_derived_from_those_that_were() -> None:
    costs = Costs(64, 8)
    costs.step.seed(1, 0.005)
    cost = costs.drafter("mtp", 4)
    guessed_s = cost.times_s(1)
    assert guessed_s[0] == 0.0
    assert (np.diff(guessed_s) > 0).all()
    cost = Costs(64, 8).drafter("mtp", 4)
    cost.curve(2).seed(1, 0.002)
    np.testing.assert_allclose(cost.times_s(1), [0.0, 0.001, 0.002, 0.003, 0.004])


@pytest.mark.parametrize("factor", [8.0, 0.25])
def test_a_calibration_that_was_disturbed_is_corrected_within_tens_of_steps(factor: float) -> None:
    curve = CostCurve(128)
    truth_s = 0.004 + 0.0002 * np.arange(129)
    for size in (1, 2, 4, 16, 64, 128):
        curve.seed(size, factor * truth_s[size])
    generator = np.random.default_rng(0)
    for step in range(20):
        size = 1 + step % 2
        curve.observe(size, truth_s[size] * (1.0 + 0.05 * generator.exponential()))
    # Sizes that were not run meanwhile were calibrated at the same bad moment.
    for size in (1, 2, 4, 16, 64, 128):
        assert curve.times_s()[size] == pytest.approx(truth_s[size], rel=0.1), size


def test_a_size_that_was_disturbed_while_the_others_were_not_is_corrected_alone() -> None:
    curve = seeded()
    truth_s = curve.times_s().copy()
    curve.seed(1, truth_s[1])
    curve.seed(2, 3.0 * truth_s[2])
    # A larger one took less: that much is known at once.
    assert curve.times_s()[2] <= truth_s[4]
    curve = seeded()
    curve.seed(4, 0.2 * truth_s[4])
    for step in range(30):
        size = (1, 4, 8)[step % 3]
        curve.observe(size, truth_s[size])
    for size in (1, 4, 8):
        assert curve.times_s()[size] == pytest.approx(truth_s[size], rel=0.1), size


def test_what_calls_of_one_depth_show_of_the_machine_concerns_the_other_depths() -> None:
    cost = Costs(64, 8).drafter("mtp", 4)
    for depth in range(1, 5):
        cost.curve(depth).seed(1, 0.0004 * depth * 10.0)
    for _ in range(6):
        cost.observe(1, 4, 0.0016)
    np.testing.assert_allclose(cost.times_s(1), 0.0004 * np.arange(5), rtol=0.05)


def test_times_that_scatter_widely_do_not_decide_over_a_few_percent() -> None:
    """Two busy sizes that differ by 5 %: noise must not make the larger one look free or dear."""
    errors = []
    for seed in range(8):
        curve = seeded()
        curve.seed(2, curve.times_s()[2])
        truth_s = curve.times_s().copy()
        generator = np.random.default_rng(seed)
        for step in range(400):
            size = 1 + step % 2
            curve.observe(size, truth_s[size] * float(np.exp(0.7 * generator.standard_normal())))
        times_s = curve.times_s()
        errors.append(abs(times_s[2] / times_s[1] - truth_s[2] / truth_s[1]))
    assert np.mean(errors) < 0.05
