"""Refused requests that come again when they were told to are let in, whatever else is offered."""

import heapq
import itertools
import random

import msgspec
import pytest

from engine.types import EngineLoad
from server.admission import Load
from server.errors import ApiError
from server.forecast import Ask, Limits, OpenSequence
from server.gate import Arrival, Gate
from server.metrics import Metrics
from server.promises import Promises

STEP_S = 0.01
NUM_LANES = 8
NUM_OUTPUT = 50
LIMITS = Limits(max_sequences=NUM_LANES, max_queue=64, max_ttft_s=2.0)
CAPACITY_PER_S = NUM_LANES / (NUM_OUTPUT * STEP_S)


class Machine:
    """A server in a time of its own: lanes that take a step each 10 ms, and a queue."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        metrics = Metrics("m", EngineLoad)
        self.gate = Gate(LIMITS, metrics, clock=lambda: self.now_s)
        for _ in range(20):
            self.gate.costs.observe_step(NUM_LANES, STEP_S)
            self.gate.costs.observe_step(512, STEP_S)
            self.gate.costs.observe_end(NUM_OUTPUT)
        self.running: list[list[float]] = []  # arrival, tokens
        self.waiting: list[float] = []
        self.ttft_s: list[float] = []
        self.num_done = 0

    def load(self) -> Load:
        running = [OpenSequence(at, 1, int(n), NUM_OUTPUT, True) for at, n in self.running]
        waiting = [OpenSequence(at, 1, 0, NUM_OUTPUT, True) for at in self.waiting]
        return Load(sequences=[*running, *waiting])

    def offer(self, body: bytes, is_retry: bool | None = None) -> float | None:
        """None if it was let in, else the seconds after which to come again."""
        arrival = Arrival(body=body, arrived_at_s=self.now_s, is_retry=is_retry)
        ask = Ask(rank_s=self.now_s, max_tokens=NUM_OUTPUT, ignore_eos=True)
        try:
            self.gate.decide(arrival, ask, self.load(), is_final=True)
        except ApiError as error:
            return error.retry_after_s
        self.waiting.append(self.now_s)
        return None

    def step(self) -> None:
        self.now_s += STEP_S
        while self.waiting and len(self.running) < NUM_LANES:
            self.running.append([self.waiting.pop(0), 0])
        for entry in self.running:
            if entry[1] == 0:
                self.ttft_s.append(self.now_s - entry[0])
            entry[1] += 1
        self.num_done += sum(entry[1] >= NUM_OUTPUT for entry in self.running)
        self.running = [entry for entry in self.running if entry[1] < NUM_OUTPUT]


@pytest.mark.parametrize("come_again", [1.0, 0.5, 0.0])
def test_at_four_times_the_capacity_coming_again_succeeds_and_no_lane_is_idle(
    come_again: float,
) -> None:
    draw = random.Random(7)
    machine = Machine()
    next_s, number = machine.now_s, 0
    returning: list[tuple[float, bytes]] = []
    outcomes: list[bool] = []
    began_s = machine.now_s
    while machine.now_s < began_s + 60:
        while next_s <= machine.now_s:
            next_s += draw.expovariate(4 * CAPACITY_PER_S)
            number += 1
            body = b"request %d" % number
            wait_s = machine.offer(body)
            if wait_s is not None and draw.random() < come_again:
                heapq.heappush(returning, (machine.now_s + wait_s, body))
        while returning and returning[0][0] <= machine.now_s:
            outcomes.append(machine.offer(heapq.heappop(returning)[1]) is None)
        machine.step()
    assert machine.num_done >= 0.95 * 60 * CAPACITY_PER_S * 0.98  # the last ones are not done
    assert max(machine.ttft_s) <= LIMITS.max_ttft_s * 1.1
    if come_again:
        assert len(outcomes) > 200
        assert sum(outcomes) >= 0.9 * len(outcomes)


def test_promises_lie_one_after_the_other_and_are_forgotten_when_nobody_comes() -> None:
    promises = Promises()
    waits = [promises.make(b"%d" % i, 1.0, 1, 0.0, now_s=100.0) for i in range(10)]
    assert all(later - before >= 1.0 for before, later in itertools.pairwise(waits))
    assert promises.num_open == 10
    assert not promises.is_due(b"3", 100.0)
    assert promises.is_due(b"3", 100.0 + waits[3])
    assert promises.num_due(100.0 + waits[1], 0.0) == 2
    promises.keep(b"0")
    assert promises.num_due(100.0 + waits[1], 0.0) == 1
    assert promises.num_due(1e6, 0.0) == 0
    assert promises.num_open == 0
    assert promises.kept_share < 1.0
    # The schedule is not held by those who stayed away.
    assert promises.make(b"late", 1.0, 1, 0.0, now_s=1e6) < 2.0


def test_equal_requests_have_a_promise_each() -> None:
    promises = Promises()
    first, second = (promises.make(b"same", 1.0, 1, 0.0, now_s=0.0) for _ in range(2))
    assert second > first
    assert promises.is_due(b"same", first)
    promises.keep(b"same")
    assert not promises.is_due(b"same", first)
    assert promises.is_due(b"same", second)


def test_far_beyond_the_horizon_nothing_is_promised_but_a_time_is_given() -> None:
    promises = Promises()
    waits = [promises.make(b"%d" % i, 100.0, 1, 0.0, now_s=0.0) for i in range(50)]
    assert max(waits) == 600.0
    assert promises.num_open < 10


def test_who_says_it_is_no_retry_takes_nobodys_promise() -> None:
    machine = Machine()
    while (wait_s := machine.offer(b"same")) is None:
        pass
    machine.now_s += wait_s
    seen = machine.gate.decisions()[0]
    assert (seen.admitted, seen.reason) == (False, "ttft_too_late")
    machine.offer(b"same", is_retry=False)
    assert not machine.gate.decisions()[0].was_promised
    machine.offer(b"same", is_retry=True)
    assert machine.gate.decisions()[0].was_promised
    assert msgspec.json.encode(machine.gate.decisions())
