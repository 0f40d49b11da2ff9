"""Refused requests that come again when they were told to are let in, whatever else is offered."""

import heapq
import itertools
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
        self.gate.costs.renew([(1, STEP_S), (512, STEP_S)])
        for _ in range(20):
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
            self.gate.decide(arrival, ask, self.load, is_final=True)
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


@pytest.mark.parametrize(
    ("come_again", "is_same", "is_retry"),
    [
        (1.0, False, (None, None)),
        (0.5, False, (None, None)),
        (0.2, False, (None, None)),
        (0.0, False, (None, None)),
        (1.0, False, (False, False)),  # a call of its own to an SDK for each attempt
        (1.0, True, (False, True)),  # all the same to an SDK, which tries again by itself
    ],
)
def test_at_four_times_the_capacity_coming_again_succeeds_and_no_lane_is_idle(
    come_again: float, is_same: bool, is_retry: tuple[bool | None, bool | None]
) -> None:
    draw = random.Random(7)
    machine = Machine()
    began_s = machine.now_s
    # What comes, by time: a new request, or one that was told to come then.
    coming: list[tuple[float, int, bytes | None]] = [(began_s, 0, None)]
    outcomes: list[bool] = []
    number = 0
    while machine.now_s < began_s + 60:
        step_s = machine.now_s
        while coming[0][0] <= step_s:
            machine.now_s, _, body = heapq.heappop(coming)
            if body is not None:
                outcomes.append(machine.offer(body, is_retry[1]) is None)
                continue
            number += 1
            next_s = machine.now_s + draw.expovariate(4 * CAPACITY_PER_S)
            heapq.heappush(coming, (next_s, number, None))
            body = b"same" if is_same else b"request %d" % number
            wait_s = machine.offer(body, is_retry[0])
            if wait_s is not None and draw.random() < come_again:
                heapq.heappush(coming, (machine.now_s + wait_s, number, body))
        machine.now_s = step_s
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
    promises.come(b"0", 100.0 + waits[1])
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
    promises.come(b"same", first)
    assert not promises.is_due(b"same", first)
    assert promises.is_due(b"same", second)


@pytest.mark.parametrize("pause_s", [0.0, 0.5])
def test_who_asks_again_early_keeps_its_place_and_takes_no_other(pause_s: float) -> None:
    """An SDK says that it tries again; of others nobody asks again at once."""
    promises = Promises()
    promises.make(b"other", 20.0, 1, 0.0, now_s=0.0)
    due_s = promises.make(b"hasty", 1.0, 1, 0.0, now_s=0.0)
    for attempt in range(1, 20):
        now_s = attempt * pause_s
        wait_s = promises.make(b"hasty", 1.0, 1, 0.0, now_s=now_s, is_retry=not pause_s)
        assert now_s + wait_s == pytest.approx(due_s)
    assert promises.num_open == 2
    assert promises.make(b"late", 1.0, 1, 0.0, now_s=10.0) < due_s + 2.0 / 0.7


def test_who_gets_in_before_its_turn_gives_its_place_back() -> None:
    promises = Promises()
    promises.make(b"lucky", 20.0, 1, 0.0, now_s=0.0)
    promises.come(b"lucky", 5.0)
    assert promises.num_open == 0
    assert promises.make(b"next", 1.0, 1, 0.0, now_s=5.0) < 2.0


def test_a_flood_that_never_returns_leaves_newcomers_a_sensible_time() -> None:
    """As soon as it is seen to keep away the schedule is overbooked."""
    promises = Promises()
    waits = []
    for number in range(100 * 120):  # two minutes of 100 a second, of which 25 could be computed
        waits.append(promises.make(b"%d" % number, 0.04, 1, 0.5, now_s=number / 100))
    assert max(waits) <= 110
    assert promises.kept_share < 0.1
    assert waits[-1] < 5
    assert promises.num_open < 4096


def test_who_came_in_time_and_was_refused_is_next() -> None:
    promises = Promises()
    wait_s = promises.make(b"first", 1.0, 1, 0.0, now_s=0.0)
    for number in range(20):
        promises.make(b"%d" % number, 1.0, 1, 0.0, now_s=0.0)
    assert promises.make(b"first", 1.0, 1, 0.5, now_s=wait_s) == pytest.approx(0.5)


def test_one_client_that_never_waits_leaves_others_their_promises() -> None:
    promises = Promises()
    for attempt in range(5000):
        promises.make(b"hasty", 0.001, 1, 0.0, now_s=attempt / 1e4)
    promises.make(b"other", 0.001, 1, 0.0, now_s=0.5)
    assert promises.is_due(b"other", 2.0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.floats(0, 30), st.floats(0.01, 20), st.booleans()),
        max_size=60,
    )
)
def test_whatever_comes_no_time_is_beyond_the_longest_and_all_places_are_given_back(
    asks: list[tuple[int, float, float, bool]],
) -> None:
    promises = Promises()
    now_s = 0.0
    for number, pause_s, work_s, gets_in in asks:
        now_s += pause_s
        key = b"%d" % number
        if gets_in:
            promises.come(key, now_s)
        else:
            assert 0 <= promises.make(key, work_s, 1, 0.1, now_s) <= 110
        assert promises.num_due(now_s, 5.0) <= promises.num_open
    assert promises.num_due(now_s + 1000, 5.0) == promises.num_open == 0
    share = max(0.05, promises.kept_share)
    assert promises.make(b"new", 0.7, 1, 0.0, now_s + 1000) == pytest.approx(share)


@pytest.mark.parametrize("says_so", [True, False])
def test_who_honours_a_time_is_known_again_whatever_it_says_of_itself(says_so: bool) -> None:
    machine = Machine()
    while (wait_s := machine.offer(b"same")) is None:
        pass
    seen = machine.gate.decisions()[0]
    assert (seen.admitted, seen.reason) == (False, "ttft_too_late")
    machine.now_s += wait_s
    machine.offer(b"same", is_retry=says_so)
    assert machine.gate.decisions()[0].was_promised
    assert msgspec.json.encode(machine.gate.decisions())


def test_who_gives_up_after_coming_in_vain_is_no_reason_to_overbook() -> None:
    promises = Promises()
    for number in range(20):
        now_s = 100.0 * number
        wait_s = promises.make(b"client", 1.0, 1, 0.0, now_s)
        promises.make(b"client", 1.0, 1, 0.5, now_s + wait_s)
    assert promises.num_due(1e5, 0.0) == 0
    assert promises.kept_share == 1.0
