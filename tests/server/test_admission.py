"""Admission decides from numbers alone: examples, and properties that hold for all numbers."""

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admission import Admit, Load, Reject, admit, num_to_shed
from server.condition import Condition
from server.cost_model import Costs
from server.forecast import Ask, Limits, OpenSequence, Outlook, forecast

LIMITS = Limits(max_sequences=4, max_queue=6)
OK = Condition()
# A step costs 10 ms and 0.1 ms for each token.
COSTS = Costs(step_points=((1.0, 0.0101), (512.0, 0.0612)), mean_output_tokens=100.0)


def waiting(count: int, num_output_tokens: int = 0, **changes: int) -> Load:
    fields = {"num_prompt_tokens": 10, "max_tokens": 100} | changes
    seq = OpenSequence(rank_s=0.0, num_output_tokens=num_output_tokens, ignore_eos=True, **fields)
    return Load(sequences=[seq] * count)


def ask(count: int = 1, **changes: object) -> Ask:
    return Ask(rank_s=1.0, num_sequences=count, **changes)  # type: ignore[arg-type]


def test_the_last_place_is_given_and_none_beyond_it() -> None:
    assert isinstance(admit(ask(1), waiting(9), Costs(), OK, LIMITS), Admit)
    assert isinstance(admit(ask(10), Load(), Costs(), OK, LIMITS), Admit)
    for count, load in ((1, waiting(10)), (2, waiting(9)), (1, Load(num_reserved=10))):
        decision = admit(ask(count), load, Costs(), OK, LIMITS)
        assert isinstance(decision, Reject)
        assert (decision.status, decision.reason) == (429, "queue_full")


def test_what_never_fits_is_not_asked_to_come_again() -> None:
    decision = admit(ask(11), Load(), Costs(), OK, LIMITS)
    assert decision == Reject(400, "too_many_sequences", None)


def test_the_time_to_wait_grows_with_what_must_end_first() -> None:
    waits = []
    for count in (1, 4, 8):
        decision = admit(ask(count), waiting(10), COSTS, OK, LIMITS)
        assert isinstance(decision, Reject)
        assert decision.retry_after_s is not None
        waits.append(decision.retry_after_s)
    assert waits == sorted(waits)
    assert waits[0] > 0


def test_a_first_token_that_would_come_too_late_is_refused() -> None:
    limits = msgspec.structs.replace(LIMITS, max_ttft_s=1.6)
    # Four run and have 100 tokens to go, a little more than 1 s; each in the queue takes as long.
    running = waiting(4, num_output_tokens=1, max_tokens=101)
    assert isinstance(admit(ask(), running, COSTS, OK, limits), Admit)
    queued = Load(sequences=[*running.sequences, *waiting(4).sequences])
    decision = admit(ask(), queued, COSTS, OK, limits)
    assert isinstance(decision, Reject)
    assert decision.reason == "ttft_too_late"
    assert 0.5 < (decision.retry_after_s or 0) < 3
    # With a better rank it overtakes the queue.
    assert isinstance(admit(Ask(rank_s=-1.0), queued, COSTS, OK, limits), Admit)


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    wish = ask(max_tokens=200, ignore_eos=True)
    assert isinstance(admit(wish, Load(), COSTS, OK, LIMITS), Admit)
    hopeless = msgspec.structs.replace(wish, timeout_s=1.0)
    decision = admit(hopeless, Load(), COSTS, OK, LIMITS)
    assert isinstance(decision, Reject)
    assert (decision.reason, decision.retry_after_s) == ("deadline_too_short", None)
    tight = msgspec.structs.replace(wish, timeout_s=2.5)
    assert isinstance(admit(tight, Load(), COSTS, OK, LIMITS), Admit)
    decision = admit(tight, waiting(4, num_output_tokens=1), COSTS, OK, LIMITS)
    assert isinstance(decision, Reject)
    assert decision.retry_after_s  # an emptier server could


def test_a_derated_device_takes_less_and_a_draining_one_nothing() -> None:
    half = Condition(status="derated", factor=0.5, reasons=("hot",))
    assert isinstance(admit(ask(), waiting(4), Costs(), half, LIMITS), Admit)
    assert isinstance(admit(ask(), waiting(5), Costs(), half, LIMITS), Reject)
    assert num_to_shed(waiting(8), half, LIMITS) == 3
    assert num_to_shed(waiting(5), half, LIMITS) == 0
    drained = admit(ask(), Load(), Costs(), Condition(status="draining", factor=0.0), LIMITS)
    assert drained == Reject(503, "device_draining", None)


def test_newcomers_leave_room_for_those_who_were_told_to_come() -> None:
    load = msgspec.structs.replace(waiting(8), num_due=2)
    assert isinstance(admit(ask(), load, Costs(), OK, LIMITS), Reject)
    assert isinstance(admit(ask(is_promised=True), load, Costs(), OK, LIMITS), Admit)
    # Who keeps away must not keep the server idle.
    many = msgspec.structs.replace(waiting(2), num_due=99)
    assert isinstance(admit(ask(), many, Costs(), OK, LIMITS), Admit)


SEQUENCES = st.lists(
    st.builds(
        OpenSequence,
        rank_s=st.floats(0, 100),
        num_prompt_tokens=st.integers(1, 400),
        num_output_tokens=st.sampled_from([0, 0, 1, 50]),
        max_tokens=st.integers(51, 400),
        ignore_eos=st.just(True),
    ),
    max_size=40,
)


def wish_for(prompt_lengths: list[int], num_choices: int, rank_s: float, max_tokens: int) -> Ask:
    return Ask(
        rank_s=rank_s,
        num_sequences=len(prompt_lengths) * num_choices,
        prompt_lengths=tuple(prompt_lengths),
        max_tokens=max_tokens,
        ignore_eos=True,
    )


ASKS = st.builds(
    wish_for,
    prompt_lengths=st.lists(st.integers(1, 400), min_size=1, max_size=3),
    num_choices=st.integers(1, 2),
    rank_s=st.floats(0, 100),
    max_tokens=st.integers(1, 400),
)


def blocks(num_tokens: int) -> int:
    return math.ceil(num_tokens / 16)


def machine(num_blocks: int, **changes: float) -> Limits:
    return Limits(
        max_sequences=8,
        max_queue=64,
        num_blocks=num_blocks,
        block_size=16,
        **changes,  # type: ignore[arg-type]
    )


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, ASKS, st.integers(50, 400))
def test_what_starts_now_fits_the_memory_beside_all_that_goes_before(
    sequences: list[OpenSequence], wish: Ask, num_blocks: int
) -> None:
    seen = forecast(wish, sequences, COSTS, machine(num_blocks))
    before = [seq for seq in sequences if seq.num_output_tokens or seq.rank_s <= wish.rank_s]
    assert wish.max_tokens is not None
    choices = wish.num_sequences // len(wish.prompt_lengths)
    own = choices * sum(blocks(length + wish.max_tokens) for length in wish.prompt_lengths)
    total = own + sum(blocks(seq.num_prompt_tokens + seq.max_tokens) for seq in before)
    assert seen.num_blocks == own
    assert seen.starts_now == (total <= num_blocks and len(before) + wish.num_sequences <= 8)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, ASKS, st.integers(50, 400), st.integers(0, 400))
def test_more_free_blocks_never_make_it_later_or_refused(
    sequences: list[OpenSequence], wish: Ask, num_blocks: int, num_more: int
) -> None:
    few = machine(num_blocks, max_ttft_s=3.0)
    many = machine(num_blocks + num_more, max_ttft_s=3.0)
    ttft_s = [forecast(wish, sequences, COSTS, limits).ttft_s for limits in (few, many)]
    assert ttft_s[1] <= ttft_s[0] + 1e-9
    load = Load(sequences=sequences)
    if isinstance(admit(wish, load, COSTS, OK, few), Admit):
        assert isinstance(admit(wish, load, COSTS, OK, many), Admit)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, ASKS, st.sampled_from([0.25, 0.5, 0.75, 1.0]))
def test_a_worse_device_never_admits_what_a_better_one_refuses(
    sequences: list[OpenSequence], wish: Ask, factor: float
) -> None:
    limits = machine(400, max_ttft_s=3.0)
    load = Load(sequences=sequences)
    condition = Condition(status="derated" if factor < 1 else "ok", factor=factor)
    if isinstance(admit(wish, load, COSTS, condition, limits), Admit):
        assert isinstance(admit(wish, load, COSTS, OK, limits), Admit)


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, SEQUENCES, ASKS)
def test_who_waits_is_never_put_back_by_those_of_a_later_rank(
    sequences: list[OpenSequence], others: list[OpenSequence], wish: Ask
) -> None:
    """With ranks that are fixed at arrival this is why nobody starves: see `rank_s`."""
    later = [
        msgspec.structs.replace(seq, rank_s=wish.rank_s + 1 + seq.rank_s, num_output_tokens=0)
        for seq in others
    ]
    limits = machine(400, max_ttft_s=3.0)
    seen = forecast(wish, sequences, COSTS, limits)
    assert forecast(wish, [*later, *sequences], COSTS, limits) == seen
    load = Load(sequences=[*sequences, *later])
    if load.num_open + wish.num_sequences <= limits.capacity:
        alone = admit(wish, Load(sequences=sequences), COSTS, OK, limits)
        if sequences:
            assert admit(wish, load, COSTS, OK, limits) == alone


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, ASKS, st.integers(0, 20))
def test_who_is_put_ahead_counts_like_the_last_of_those_who_wait(
    sequences: list[OpenSequence], wish: Ask, count: int
) -> None:
    limits = machine(400)
    outlook = Outlook(wish.rank_s, sequences, COSTS, limits)
    assert (
        outlook.forecast(wish) == outlook.forecast(wish) == forecast(wish, sequences, COSTS, limits)
    )
    coming = OpenSequence(wish.rank_s, 60, 0, 40)
    outlook.put_ahead(coming, count)
    seen = outlook.forecast(wish)
    expected = forecast(wish, [*sequences, *[coming] * count], COSTS, limits)
    assert msgspec.structs.astuple(seen) == pytest.approx(msgspec.structs.astuple(expected))


@settings(max_examples=200, deadline=None)
@given(SEQUENCES, ASKS)
def test_every_refusal_says_when_to_come_again(sequences: list[OpenSequence], wish: Ask) -> None:
    decision = admit(wish, Load(sequences=sequences), COSTS, OK, machine(400, max_ttft_s=0.5))
    if isinstance(decision, Reject):
        assert decision.status == 429
        assert decision.retry_after_s is not None
        assert 0 <= decision.retry_after_s <= 600
    # An idle server takes whatever it can take at all: nobody waits for ever.
    assert isinstance(admit(wish, Load(), COSTS, OK, machine(400, max_ttft_s=0.5)), Admit)


@pytest.mark.parametrize("num_tokens", [1, 7, 100, 600])
def test_nothing_known_of_steps_predicts_nothing(num_tokens: int) -> None:
    seen = forecast(ask(prompt_lengths=(num_tokens,)), waiting(30).sequences, Costs(), LIMITS)
    assert (seen.ttft_s, seen.end_s) == (0.0, 0.0)
