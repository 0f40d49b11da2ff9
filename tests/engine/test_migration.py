"""A change of the core under running sequences: no token is lost, repeated or different."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine import runner, scheduler
from engine.migration import SwitchError
from engine.runner import EngineSettings
from engine.speculation.setup import Speculation
from tests.engine.fake_core import FakeCore
from tests.engine.test_loop import EOS, MAX_MODEL_LEN, WAIT_S, Client


@pytest.fixture
def client() -> Iterator[Client]:
    made = Client()
    made.engine.start()
    yield made
    made.core.gate.set()
    made.engine.stop(0.0)


def _settings(num_blocks: int = 100, **changes: Any) -> EngineSettings:
    values: dict[str, Any] = {
        "max_model_len": MAX_MODEL_LEN,
        "num_kv_blocks": num_blocks,
        "eos_token_ids": EOS,
        "max_sequences": 8,
        "max_step_tokens": 16,
    }
    return EngineSettings(**(values | changes))


def _run_some(client: Client, count: int = 8, max_tokens: int = 30) -> list[int]:
    """Start sequences and wait until each has a token."""
    seq_ids = [
        client.submit(*range(1, 3 + i), max_tokens=max_tokens, ignore_eos=True, seed=i)
        for i in range(count)
    ]
    client.wait_for(lambda: all(client.output(seq_id) for seq_id in seq_ids))
    return seq_ids


def _slow(client: Client) -> Callable[[], None]:
    """Let the engine go on only report by report, so that a test can act in between."""
    turn = threading.Semaphore(0)
    is_free = threading.Event()

    def before_report(_: object) -> None:
        if not is_free.is_set():
            turn.acquire(timeout=0.02)

    client.before_report = before_report
    return is_free.set


@pytest.mark.parametrize("num_blocks", [100, 14])  # 14: hardly more than one sequence
def test_running_sequences_go_on_with_another_core(client: Client, num_blocks: int) -> None:
    free = _slow(client)
    seq_ids = _run_some(client)
    core = FakeCore(num_blocks)
    done = client.engine.switch(core, _settings(num_blocks))
    late = client.submit(9, 8, 7, max_tokens=10, ignore_eos=True)
    free()
    done.result(WAIT_S)
    num_steps = len(client.core.step_sizes)
    client.wait_all()
    for seq_id in (*seq_ids, late):
        client.assert_exact(seq_id)
    assert len(client.core.step_sizes) == num_steps, "the former core was stepped on"
    assert core.step_sizes
    client.wait_idle()
    client.assert_all_free()


def test_one_sequence_moves_at_a_time_while_the_others_decode(client: Client) -> None:
    free = _slow(client)
    seq_ids = _run_some(client, count=4)
    before = len(client.core.step_sizes)
    core = FakeCore(100)
    done = client.engine.switch(core, _settings())
    free()
    done.result(WAIT_S)
    shrinking = client.core.step_sizes[before:]
    assert sorted(shrinking, reverse=True) == shrinking
    assert {1, 2, 3} <= set(shrinking)
    client.wait_all()
    for seq_id in seq_ids:
        client.assert_exact(seq_id)


def test_a_sequence_decodes_on_while_the_new_core_warms_up_for_it(client: Client) -> None:
    free = _slow(client)
    seq_ids = [
        client.submit(*range(1 + i, 25 + i), max_tokens=20, ignore_eos=True, seed=i)
        for i in range(4)
    ]
    client.wait_for(lambda: all(client.output(seq_id) for seq_id in seq_ids))
    core = FakeCore(100)
    done = client.engine.switch(core, _settings())
    free()
    done.result(WAIT_S)
    client.wait_all()
    for seq_id in seq_ids:
        client.assert_exact(seq_id)
        steps = [
            index
            for index, report in enumerate(client.reports)
            for event in report.events
            if event.seq_id == seq_id and event.token_ids
        ]
        # Two steps of 16 tokens would compute its text again; nobody misses one.
        assert steps == list(range(steps[0], steps[0] + 20))
    told = {event.seq_id for report in client.reports for event in report.events}
    assert told == set(seq_ids)
    client.wait_idle()
    client.assert_all_free()


def test_the_new_core_computes_texts_in_small_chunks_while_others_decode(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scheduler, "mixed_chunk", lambda num_open, num_decoding, *_: 8 - num_decoding
    )
    free = _slow(client)
    for i in range(3):
        client.submit(*range(1 + i, 25 + i), max_tokens=20, ignore_eos=True, seed=i)
    client.wait_for(lambda: all(client.output(seq_id) for seq_id in range(3)))
    core = FakeCore(100)
    done = client.engine.switch(core, _settings(max_step_tokens=64))
    free()
    done.result(WAIT_S)
    assert max(core.step_sizes) <= 8
    client.wait_all()
    client.submit(*range(39, 0, -1), max_tokens=2, ignore_eos=True)
    client.wait_all()
    assert max(core.step_sizes) == 39, "nobody decodes beside it any more"


def test_what_steps_cost_is_timed_between_the_steps_that_follow(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "CALIBRATION_S", WAIT_S)  # enough for every size
    free = _slow(client)
    seq_ids = _run_some(client, count=4)
    core = FakeCore(100)
    done = client.engine.switch(core, _settings(), speculation=Speculation(mode="ngram"))
    free()
    done.result(WAIT_S)
    free = _slow(client)
    seq_ids.append(client.submit(1, 2, max_tokens=45, ignore_eos=True))
    client.wait_for(lambda: len(client.output(seq_ids[-1])) > 35)
    known = [size for size, _ in client.engine.speculation().result(WAIT_S).step_s]
    assert client.reason(seq_ids[-1]) is None, "asked too late: an idle engine times the rest"
    assert {1, 2, 3, 4, 5, 6, 8} <= set(known), "a size was left out"
    free()
    client.wait_all()
    for seq_id in seq_ids:
        client.assert_exact(seq_id)
    client.wait_idle()
    client.assert_all_free()


def test_a_core_whose_steps_fail_gives_all_sequences_back(client: Client) -> None:
    free = _slow(client)
    seq_ids = _run_some(client)
    broken = FakeCore(100)
    broken.failing_steps = {3}
    done = client.engine.switch(broken, _settings())
    free()
    with pytest.raises(SwitchError, match="planted failure"):
        done.result(WAIT_S)
    client.wait_all()
    for seq_id in seq_ids:
        client.assert_exact(seq_id)
    client.wait_idle()
    client.assert_all_free()


def test_a_shorter_length_waits_for_those_that_may_outgrow_it(client: Client) -> None:
    free = _slow(client)
    seq_id = client.submit(1, 2, max_tokens=30, ignore_eos=True)
    client.wait_for(lambda: client.output(seq_id))
    done = client.engine.switch(FakeCore(100), _settings(max_model_len=20), timeout_s=WAIT_S)
    assert not done.done()
    free()
    done.result(WAIT_S)
    client.assert_exact(seq_id)
    client.before_report = lambda report: time.sleep(0.02)
    impatient = client.submit(1, 2, max_tokens=15, ignore_eos=True)
    client.wait_for(lambda: client.output(impatient))
    refused = client.engine.switch(FakeCore(100), _settings(max_model_len=8), timeout_s=0.0)
    with pytest.raises(SwitchError, match="may grow to 17 tokens"):
        refused.result(WAIT_S)
    client.wait_all()
    client.assert_exact(impatient)


def test_parked_sequences_wait_for_the_next_core(client: Client) -> None:
    free = _slow(client)
    seq_ids = _run_some(client)
    done = client.engine.park(0.0)
    free()
    done.result(WAIT_S)
    late = client.submit(5, 6, max_tokens=5, ignore_eos=True)
    gone = client.submit(5, 6, 7, max_tokens=5, ignore_eos=True)
    client.engine.abort(gone)
    client.wait_for(lambda: client.reason(gone) == "abort")
    num_steps = len(client.core.step_sizes)
    core = FakeCore(100)
    client.engine.switch(core, _settings()).result(WAIT_S)
    client.wait_all()
    for seq_id in (*seq_ids, late):
        client.assert_exact(seq_id)
    assert len(client.core.step_sizes) == num_steps
    client.wait_idle()
    client.assert_all_free()


def test_a_parked_engine_stops_and_ends_everything(client: Client) -> None:
    free = _slow(client)
    seq_ids = _run_some(client, count=3, max_tokens=40)
    done = client.engine.park(0.0)
    free()
    done.result(WAIT_S)
    assert client.engine.stop(5.0)
    assert [client.reason(seq_id) for seq_id in seq_ids] == ["abort"] * 3
    with pytest.raises(SwitchError, match="stopping"):
        client.engine.switch(FakeCore(100), _settings()).result(WAIT_S)


def test_only_one_change_at_a_time(client: Client) -> None:
    free = _slow(client)
    _run_some(client)
    first = client.engine.switch(FakeCore(100), _settings())
    second = client.engine.switch(FakeCore(100), _settings())
    free()
    first.result(WAIT_S)
    with pytest.raises(SwitchError, match="under way"):
        second.result(WAIT_S)
    client.wait_all()
