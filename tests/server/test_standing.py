"""A refusal that holds for those who come right after it, and for whom it does not."""

from collections.abc import Callable

import msgspec
import pytest

from engine.types import EngineLoad
from server.admission import Load
from server.condition import Condition
from server.errors import ApiError
from server.forecast import Limits, OpenSequence
from server.gate import Arrival, Gate
from server.metrics import Metrics

LONG, SHORT = b"x" * 1000, b"x" * 100
BUSY = Load(sequences=[OpenSequence(0.0, 10, 0, 100, True)] * 8)  # 0.5 s of work for one lane
FULL = Load(sequences=[OpenSequence(0.0, 10, 0, 1, True)] * 12)


class Desk:
    """A gate with a clock of its own; it counts how often the load was looked at."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.num_looks = 0
        limits = Limits(max_sequences=1, max_queue=11, max_ttft_s=0.5)
        self.gate = Gate(limits, Metrics("m", EngineLoad), clock=lambda: self.now_s)
        self.gate.costs.renew(((1, 0.01), (512, 0.01)))

    def ask(
        self,
        load: Load,
        body: bytes = SHORT,
        *,
        count: int = 1,
        priority: int = 0,
        prompt: tuple[int, ...] | None = None,
    ) -> str:
        """The error's code, or "admitted"; with a prompt the decision is the final one."""

        def look() -> Load:
            self.num_looks += 1
            return load

        arrival = Arrival(body=body, arrived_at_s=self.now_s, priority=priority)
        ask = arrival.ask(count)
        if prompt is not None:
            ask = msgspec.structs.replace(ask, prompt_lengths=prompt)
        try:
            self.gate.decide(arrival, ask, look, is_final=prompt is not None)
        except ApiError as error:
            return error.code or "invalid"
        return "admitted"


def test_a_refusal_holds_for_a_moment_and_each_has_its_decision_and_its_place() -> None:
    desk = Desk()
    for _ in range(5):
        desk.now_s += 0.01
        assert desk.ask(BUSY) == "ttft_too_late"
    assert desk.num_looks == 1
    seen = desk.gate.decisions()
    assert [one.reason for one in seen] == ["ttft_too_late"] * 5
    assert all(one.retry_after_s for one in seen)
    assert desk.gate.num_promised == 5
    desk.now_s += 0.2
    assert desk.ask(Load()) == "admitted"
    assert desk.num_looks == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda desk: desk.ask(Load(), priority=-1),
        lambda desk: desk.ask(Load(), count=2),
        lambda desk: setattr(desk.gate, "condition", Condition()) or desk.ask(Load()),
        lambda desk: desk.gate.note_end(1) or desk.ask(Load()),
    ],
    ids=["higher priority", "other number", "condition", "nobody waits any more"],
)
def test_who_is_no_such_newcomer_is_decided_anew(change: Callable[[Desk], str]) -> None:
    desk = Desk()
    assert desk.ask(BUSY) == "ttft_too_late"
    assert change(desk) == "admitted"


def test_more_sequences_than_ever_fit_are_a_400_all_the_same() -> None:
    desk = Desk()
    assert desk.ask(BUSY) == "ttft_too_late"
    assert desk.ask(BUSY, count=13) == "invalid"


def test_one_of_many_ends_lets_nobody_in_but_where_places_were_wanting() -> None:
    desk = Desk()
    assert desk.ask(BUSY) == "ttft_too_late"
    desk.gate.note_end(7)
    assert desk.ask(BUSY) == "ttft_too_late"
    assert desk.num_looks == 1
    desk = Desk()
    assert desk.ask(FULL) == "queue_full"
    desk.gate.note_end(11)
    assert desk.ask(Load()) == "admitted"


def test_a_long_prompt_that_was_refused_keeps_no_shorter_one_out() -> None:
    desk = Desk()
    load = Load(sequences=BUSY.sequences[:2])
    assert desk.ask(load, LONG, prompt=(20_000,)) == "ttft_too_late"
    assert desk.ask(Load(), SHORT) == "admitted"
    assert desk.ask(Load(), LONG) == "ttft_too_late"
    assert desk.num_looks == 2


def test_who_comes_as_told_is_decided_anew() -> None:
    desk = Desk()
    assert desk.ask(BUSY, b"mine") == "ttft_too_late"
    (mine,) = desk.gate.decisions()
    assert mine.retry_after_s is not None
    desk.now_s += mine.retry_after_s
    assert desk.ask(BUSY, b"other") == "ttft_too_late"
    assert desk.ask(Load(), b"mine") == "admitted"
