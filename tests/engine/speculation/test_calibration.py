"""The calibration on a machine that others use too: what it seeds, and what it takes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.speculation.calibration import calibration
from engine.speculation.costs import Costs
from engine.speculation.policy import SpeculationPolicy


class Machine:
    """Times steps without running them; what else it does makes some of them longer."""

    def __init__(self, disturbed: float, seed: int) -> None:
        self.lanes = SimpleNamespace(tokens=np.zeros((64, 1)))
        self.sizes: list[int] = []
        self._disturbed = disturbed
        self._generator = np.random.default_rng(seed)

    @staticmethod
    def truth_s(size: int) -> float:
        return 0.003 + 0.0008 * size

    def time_probe(self, size: int, block_ids: Any) -> float:
        self.sizes.append(size)
        is_disturbed = self._generator.random() < self._disturbed
        return self.truth_s(size) * (self._generator.uniform(2.0, 8.0) if is_disturbed else 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_small_sizes_are_right_where_a_third_of_the_times_is_disturbed(seed: int) -> None:
    machine, policy = Machine(1 / 3, seed), SpeculationPolicy([], Costs(512, 64))
    for _ in calibration(machine, policy, 192, list(range(12)), 1.0):  # type: ignore[arg-type]
        pass
    times_s = policy.costs.step.times_s()
    for size in (1, 2, 3, 4, 5, 6, 8):
        assert times_s[size] == pytest.approx(machine.truth_s(size), rel=0.15), size


def test_times_that_agree_are_not_taken_again() -> None:
    machine, policy = Machine(0.0, 0), SpeculationPolicy([], Costs(512, 64))
    for _ in calibration(machine, policy, 192, list(range(12)), 1.0):  # type: ignore[arg-type]
        pass
    assert len(machine.sizes) < 40
    assert {1, 2, 4, 8, 32, 128, 192} <= set(machine.sizes)
