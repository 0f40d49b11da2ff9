"""Times steps and drafts of several sizes between steps that serve, and seeds the cost curves.

Machines are shared: whatever else runs makes single times too long. So sizes take turns, the least
time of each counts, and those that contradict themselves or others are timed again. The runner
calls it.
"""

import time
from collections.abc import Callable, Generator, Iterator
from collections.abc import Sequence as Row
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

from engine.batch import Batch
from engine.speculation.chain import ChainDrafter
from engine.speculation.cost_curve import CostCurve
from engine.speculation.costs import Costs
from engine.speculation.policy import SpeculationPolicy

# What most steps are, and where a few tokens more decide. Among these drafts are timed, so that
# they find the caches as they do when serving.
_SMALL_STEPS = (1, 2, 4, 8, 3, 6, 5)
_SMALL_CALLS = (1, 4)  # sequences, with every number of drafts
_ROUND_SHARES = (1.0, 0.6, 0.6)  # of the time, until which each round may last
# Beyond the largest, and so where prompts share the step, a row would look free: it has to reach
# what such a step holds. The most telling first.
_LARGE_STEPS = (16, 32, 128, 64, 192, 12, 24, 48)
_LARGE_CALLS = (16, 64)  # with one draft, and with as many as there can be
MOST_CALIBRATED_TOKENS = max(_LARGE_STEPS)
_SUSPICIOUS = 1.1  # a time by another one that it should not exceed


@dataclass
class _Probe:
    """One size of a curve, and how to time it."""

    curve: CostCurve
    size: int
    run: Callable[[], float]
    times_s: list[float] = field(default_factory=list)


class _Budget:
    """Time for probes; what others do between them does not count."""

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self._spent_s = 0.0

    def time(self, probe: _Probe) -> None:
        began_s = time.monotonic()
        probe.times_s.append(probe.run())
        self._spent_s += time.monotonic() - began_s

    def fits(self, probe: _Probe, probes: Row[_Probe], share: float = 1.0) -> bool:
        """Whether the share has time for it: one of twice the size takes twice the time at most."""
        most_s = max(
            (
                (other.size, min(other.times_s) * probe.size / other.size)
                for other in probes
                if other.curve is probe.curve and other.times_s and other.size <= probe.size
            ),
            default=(0, 0.0),
        )[1]
        return self._spent_s + most_s < self.time_s * share


def calibration(
    batch: Batch, policy: SpeculationPolicy, most_tokens: int, blocks: Row[int], time_s: float
) -> Generator[None]:
    """Time steps and drafts of several sizes and seed what they cost; yields after each of them.

    It goes on only between two steps. `blocks` of the caches are written to and hold
    `most_tokens`; it takes about `time_s` at most, and on a core that has not run yet the first
    runs besides.
    """
    if not most_tokens:
        return

    def step_probe(size: int) -> _Probe:
        run = partial(batch.time_probe, size, block_ids=blocks)
        return _Probe(policy.costs.step, size, run)

    steps = [step_probe(size) for size in _SMALL_STEPS if size <= most_tokens]
    most_sequences = min(len(batch.lanes.tokens), len(blocks))
    chains = [drafter for drafter in policy.drafters.values() if isinstance(drafter, ChainDrafter)]
    calls_of = [
        list(_call_probes(drafter, policy.costs, most_sequences, blocks)) for drafter in chains
    ]
    calls = list(chain.from_iterable(calls_of))
    small_calls = [call for call in calls if call.size in _SMALL_CALLS]
    small = list(_in_turns(steps, small_calls))
    large = [step_probe(size) for size in _LARGE_STEPS if size <= most_tokens]
    large_calls = [call for call in calls if call.size in _LARGE_CALLS]
    # Whose first run it is meets memory that was never touched, a quarter of a second's worth; the
    # first request would else.
    for probe in (steps[0], *(of_one[0] for of_one in calls_of if of_one)):
        probe.run()
        yield
    budget = _Budget(time_s)
    for share in _ROUND_SHARES:
        for probe in small:
            if budget.fits(probe, small, share):
                budget.time(probe)
                yield
        _seed(small)
    for probe in large + large_calls:
        if budget.fits(probe, [*small, *large, *large_calls]):
            budget.time(probe)
            yield
    probes = [probe for probe in steps + calls + large if probe.times_s]
    while probes:
        worst = max(probes, key=partial(_suspicion, probes=probes))
        if _suspicion(worst, probes) < _SUSPICIOUS or not budget.fits(worst, probes):
            break
        budget.time(worst)
        yield
    _seed(probes)


def _seed(probes: Row[_Probe]) -> None:
    for probe in probes:
        if probe.times_s:
            probe.curve.seed(probe.size, min(probe.times_s))


def _call_probes(
    drafter: ChainDrafter, costs: Costs, most_sequences: int, blocks: Row[int]
) -> Iterator[_Probe]:
    cost = costs.drafter(drafter.name, drafter.max_drafts)
    for num_drafts in range(1, drafter.max_drafts + 1):
        is_end = num_drafts in (1, drafter.max_drafts)
        for count in (*_SMALL_CALLS, *(_LARGE_CALLS if is_end else ())):
            if count <= most_sequences:
                run = partial(drafter.time_probe, count, num_drafts=num_drafts, blocks=blocks)
                yield _Probe(cost.curve(num_drafts), count, run)


def _in_turns(steps: list[_Probe], calls: list[_Probe]) -> Iterator[_Probe]:
    """All probes, a step before each call as far as there are steps."""
    for index in range(max(len(steps), len(calls))):
        yield steps[index % len(steps)]
        if index < len(calls):
            yield calls[index]


def _suspicion(probe: _Probe, probes: Row[_Probe]) -> float:
    """By how much its least time exceeds one that it should not: its own others say how far to
    trust it, and a larger size takes no less time."""
    times_s = sorted(probe.times_s)
    own = times_s[1] / times_s[0] if len(times_s) > 1 else 1.0
    larger_s = [
        min(other.times_s)
        for other in probes
        if other.curve is probe.curve and other.size > probe.size
    ]
    return max(own, times_s[0] / min(larger_s, default=times_s[0]))
