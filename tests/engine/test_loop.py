"""The engine thread on a fake core: one report per step, exactly one end per sequence."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.loop import Engine
from engine.runner import EngineSettings
from engine.scheduler import Scheduler
from engine.types import SamplingParams, StepReport, Submit, TokenEvent
from tests.engine.fake_core import FakeCore, expected_output

EOS = (7,)
MAX_MODEL_LEN = 48
WAIT_S = 20.0


class Client:
    """What a server would see of an engine: a callback, and messages in."""

    def __init__(self, *, num_blocks: int = 100, **limits: Any) -> None:
        self.core = FakeCore(num_blocks)
        engine_settings = EngineSettings(
            max_model_len=MAX_MODEL_LEN,
            num_kv_blocks=num_blocks,
            eos_token_ids=EOS,
            **{"max_sequences": 8, "max_step_tokens": 16, **limits},
        )
        self.reports: list[StepReport] = []
        self.before_report: Callable[[StepReport], object] = lambda report: None
        self.changed = threading.Condition()
        self.submitted: dict[int, Submit] = {}
        self.engine = Engine(self.core, engine_settings, self.on_report)

    def on_report(self, report: StepReport) -> None:
        self.before_report(report)
        with self.changed:
            self.reports.append(report)
            self.changed.notify_all()

    def submit(self, *prompt_ids: int, **params: Any) -> int:
        seq_id = len(self.submitted)
        message = Submit(
            seq_id, prompt_ids, SamplingParams(**{"max_tokens": 6, **params}), time.monotonic()
        )
        self.submitted[seq_id] = message
        self.engine.submit(message)
        return seq_id

    def wait_for(self, condition: Callable[[], object]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, WAIT_S), "waited in vain"

    def wait_all(self) -> None:
        self.wait_for(lambda: all(self.reason(seq_id) for seq_id in self.submitted))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, "waited in vain"
            time.sleep(0.001)

    def wait_idle(self) -> None:
        self.wait_until(self.engine.is_idle)

    def events(self, seq_id: int) -> list[TokenEvent]:
        return [e for report in self.reports for e in report.events if e.seq_id == seq_id]

    def output(self, seq_id: int) -> list[int]:
        return [token_id for event in self.events(seq_id) for token_id in event.token_ids]

    def reason(self, seq_id: int) -> str | None:
        reasons = [e.finish_reason for e in self.events(seq_id) if e.finish_reason]
        assert len(reasons) <= 1, "a sequence ended twice"
        return reasons[0] if reasons else None

    def expected(self, seq_id: int) -> tuple[list[int], str]:
        message = self.submitted[seq_id]
        return expected_output(
            message.prompt_ids, message.params, max_model_len=MAX_MODEL_LEN, eos_token_ids=EOS
        )

    def assert_exact(self, seq_id: int) -> None:
        assert (self.output(seq_id), self.reason(seq_id)) == self.expected(seq_id)

    def assert_all_free(self) -> None:
        self.engine.check_integrity()
        load = self.reports[-1].load
        assert (load.num_free_blocks, load.num_held_blocks) == (load.num_total_blocks, 0)
        assert (load.num_running, load.num_waiting) == (0, 0)


@pytest.fixture
def make_client() -> Iterator[Callable[..., Client]]:
    clients: list[Client] = []

    def make(*, start: bool = True, **options: Any) -> Client:
        client = Client(**options)
        clients.append(client)
        if start:
            client.engine.start()
        return client

    yield make
    for client in clients:
        client.core.gate.set()
        assert client.engine.stop(0)


MakeClient = Callable[..., Client]


def test_a_sequence_streams_one_event_a_step_and_ends_once(make_client: MakeClient) -> None:
    client = make_client()
    seq_id = client.submit(1, 2, 3, max_tokens=5, ignore_eos=True)
    client.wait_all()
    client.wait_idle()
    client.assert_exact(seq_id)
    events = client.events(seq_id)
    assert [len(event.token_ids) for event in events] == [1] * 5
    assert events[0].queued_s is not None
    assert events[0].queued_s >= 0
    assert all(event.queued_s is None for event in events[1:])
    client.assert_all_free()


def test_each_step_makes_one_report_with_all_its_events(make_client: MakeClient) -> None:
    client = make_client(start=False)
    for index in range(4):
        client.submit(index + 1, max_tokens=3, ignore_eos=True)
    client.engine.start()
    client.wait_all()
    assert [len(report.events) for report in client.reports] == [4, 4, 4]
    assert [report.num_step_tokens for report in client.reports] == [4, 4, 4]
    assert [report.load.num_steps for report in client.reports] == [1, 2, 3]
    assert all(report.step_s > 0 for report in client.reports)
    assert len(client.core.step_sizes) == 3


def test_reports_tell_prompts_and_next_tokens_apart(make_client: MakeClient) -> None:
    client = make_client(start=False)
    client.submit(*range(1, 10), max_tokens=1, ignore_eos=True)  # ends as its prompt is computed
    client.submit(1, max_tokens=3, ignore_eos=True)
    client.engine.start()
    client.wait_all()
    counts = [(r.num_prompt_tokens, r.num_decoding, r.num_emitted) for r in client.reports]
    assert counts == [(10, 0, 0), (0, 1, 1), (0, 1, 1)]


def test_a_preempted_sequence_that_is_computed_again_does_not_decode(
    make_client: MakeClient,
) -> None:
    client = make_client(num_blocks=14, start=False)
    for index in range(3):
        client.submit(index + 1, 2, 3, max_tokens=30, ignore_eos=True)
    client.engine.start()
    client.wait_all()
    assert client.reports[-1].load.num_preemptions
    for report in client.reports:
        assert report.num_decoding <= report.load.num_running + len(report.events)
        assert report.num_emitted == report.num_decoding
    # What is decoded, plus what ends a computation from the beginning, is every token.
    num_decoded = sum(report.num_decoding for report in client.reports)
    num_restarts = client.reports[-1].load.num_preemptions
    assert 90 - 3 - num_restarts <= num_decoded <= 90 - 3


def test_reports_come_from_the_engine_thread(make_client: MakeClient) -> None:
    client = make_client(start=False)
    threads: set[str] = set()
    client.before_report = lambda report: threads.add(threading.current_thread().name)
    client.submit(1, 2)
    client.engine.start()
    client.wait_all()
    assert threads == {"engine"}


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 3), min_size=1, max_size=30),
        st.integers(1, 25),
        st.integers(0, 1000),
        st.sampled_from([1.0, 1.2]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(
    requests=requests,
    num_blocks=st.integers(12, 30),
    max_sequences=st.integers(1, 6),
    extra_step_tokens=st.integers(0, 30),
    aborted=st.sets(st.integers(0, 11), max_size=3),
)
def test_texts_do_not_depend_on_neighbours_chunks_cache_or_preemption(
    requests: list[tuple[list[int], int, int, float]],
    num_blocks: int,
    max_sequences: int,
    extra_step_tokens: int,
    aborted: set[int],
) -> None:
    client = Client(
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_step_tokens=max_sequences + extra_step_tokens,
    )
    client.engine.start()
    for round_index in range(2):  # the second time with a warm prefix cache
        for index, (prompt_ids, max_tokens, seed, penalty) in enumerate(requests):
            seq_id = client.submit(
                *prompt_ids, max_tokens=max_tokens, seed=seed, repetition_penalty=penalty
            )
            if index in aborted and not round_index:
                client.engine.abort(seq_id)
        client.wait_all()
        client.wait_idle()
        client.assert_all_free()
    for seq_id in client.submitted:
        text, reason = client.expected(seq_id)
        if client.reason(seq_id) == "abort":
            assert client.output(seq_id) == text[: len(client.output(seq_id))]
        else:
            assert (client.output(seq_id), client.reason(seq_id)) == (text, reason)
    assert client.engine.stop(1)


def test_an_abort_frees_the_blocks_within_one_step(make_client: MakeClient) -> None:
    client = make_client()
    seq_id = client.submit(1, 2, 3, max_tokens=40, ignore_eos=True)
    client.core.gate.clear()
    client.core.entered.clear()
    assert client.core.entered.wait(WAIT_S)
    client.engine.abort(seq_id)
    num_steps = len(client.core.step_sizes) + 1
    client.core.gate.set()
    client.wait_all()
    client.wait_idle()
    assert client.reason(seq_id) == "abort"
    assert len(client.core.step_sizes) == num_steps
    client.assert_all_free()


def test_aborts_of_unknown_and_ended_sequences_are_ignored(make_client: MakeClient) -> None:
    client = make_client()
    client.engine.abort(99)
    seq_id = client.submit(1, 2, 3)
    client.wait_all()
    client.engine.abort(seq_id)
    other = client.submit(4, 5)
    client.wait_all()
    client.assert_exact(seq_id)
    client.assert_exact(other)


@pytest.mark.parametrize("num_tokens", [0, MAX_MODEL_LEN, MAX_MODEL_LEN + 1])
def test_a_prompt_that_cannot_fit_ends_with_an_error(
    make_client: MakeClient, num_tokens: int
) -> None:
    client = make_client()
    refused = client.submit(*[1] * num_tokens)
    healthy = client.submit(*[1] * (MAX_MODEL_LEN - 1))
    client.wait_all()
    assert client.reason(refused) == "error"
    assert str(num_tokens) in (client.events(refused)[0].error or "")
    client.assert_exact(healthy)


def test_a_failed_step_ends_its_own_sequences_and_the_engine_goes_on(
    make_client: MakeClient,
) -> None:
    client = make_client(start=False, max_sequences=2)
    client.core.failing_steps = {1}
    for index in range(4):
        client.submit(index + 1, 2, 3, max_tokens=4, ignore_eos=True)
    client.engine.start()
    client.wait_all()
    client.wait_idle()
    assert [client.reason(seq_id) for seq_id in range(4)] == ["error", "error", "length", "length"]
    assert "planted failure" in (client.events(0)[-1].error or "")
    for seq_id in (2, 3):
        client.assert_exact(seq_id)
    assert client.engine.is_alive()
    client.assert_all_free()


def test_three_failed_steps_in_a_row_end_the_engine_and_every_sequence(
    make_client: MakeClient,
) -> None:
    client = make_client(start=False, max_sequences=2)
    client.core.failing_steps = {0, 2, 3, 4}
    for index in range(12):
        client.submit(index + 1, 2, 3, max_tokens=1)
    client.engine.start()
    client.wait_all()
    client.wait_until(lambda: not client.engine.is_alive())
    reasons = [client.reason(seq_id) for seq_id in range(12)]
    assert reasons == ["error"] * 2 + ["length"] * 2 + ["error"] * 8
    assert len(client.core.step_sizes) == 5
    client.assert_all_free()
    late = client.submit(1, 2, 3)
    assert client.reason(late) == "error", "nobody answers after the end"


def test_a_parameter_that_no_buffer_can_hold_ends_only_its_own_step(
    make_client: MakeClient,
) -> None:
    client = make_client()
    broken = client.submit(1, 2, 3, seed=-1)
    client.wait_all()
    healthy = client.submit(1, 2, 3)
    client.wait_all()
    assert client.reason(broken) == "error"
    client.assert_exact(healthy)


def test_a_bug_in_the_books_ends_the_engine_with_errors(
    make_client: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_client(start=False)

    def schedule(scheduler: Scheduler) -> None:
        raise AssertionError("planted bug")

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    seq_ids = [client.submit(1, 2, 3) for _ in range(3)]
    client.engine.start()
    client.wait_all()
    assert [client.reason(seq_id) for seq_id in seq_ids] == ["error"] * 3
    client.wait_until(lambda: not client.engine.is_alive())


def test_a_callback_that_raises_does_not_stop_the_engine(make_client: MakeClient) -> None:
    client = make_client(start=False)

    def fail_once(report: StepReport) -> None:
        client.before_report = lambda report: None
        raise RuntimeError("planted failure")

    client.before_report = fail_once
    seq_id = client.submit(1, 2, 3, max_tokens=4, ignore_eos=True)
    client.engine.start()
    client.wait_all()
    assert client.output(seq_id) == client.expected(seq_id)[0][1:]


def test_stop_lets_sequences_finish_within_the_grace_time(make_client: MakeClient) -> None:
    client = make_client(start=False, max_sequences=2)
    for index in range(6):
        client.submit(index + 1, 2, 3, max_tokens=5)
    client.engine.start()
    assert client.engine.stop(WAIT_S)
    assert not client.engine.is_alive()
    for seq_id in range(6):
        client.assert_exact(seq_id)
    late = client.submit(1, 2)
    assert client.reason(late) == "abort"
    client.assert_all_free()


def test_stop_aborts_what_the_grace_time_does_not_suffice_for(make_client: MakeClient) -> None:
    client = make_client(start=False, max_sequences=2)
    client.core.gate.clear()
    for index in range(6):
        client.submit(index + 1, 2, 3, max_tokens=5, ignore_eos=True)
    client.engine.start()
    assert client.core.entered.wait(WAIT_S)
    opener = threading.Timer(0.1, client.core.gate.set)
    opener.start()
    assert client.engine.stop(0)
    opener.join()
    assert [client.reason(seq_id) for seq_id in range(6)] == ["abort"] * 6
    assert len(client.core.step_sizes) == 1
    client.assert_all_free()


def test_every_sequence_submitted_while_stopping_ends_exactly_once(
    make_client: MakeClient,
) -> None:
    client = make_client()
    stopper = threading.Timer(0.005, client.engine.stop, (WAIT_S,))
    stopper.start()
    for index in range(300):
        client.submit(index % 40, max_tokens=2)
    client.wait_all()
    stopper.join(WAIT_S)
    assert not client.engine.is_alive()
    client.engine.check_integrity()


def test_stop_before_start_and_twice_returns(make_client: MakeClient) -> None:
    client = make_client(start=False)
    assert client.engine.stop(0)
    assert client.engine.stop(0)


def test_a_hanging_step_makes_the_heartbeat_stale_and_idling_does_not(
    make_client: MakeClient,
) -> None:
    client = make_client()
    time.sleep(0.8)
    assert client.engine.heartbeat_age_s() < 0.7
    client.core.gate.clear()
    client.submit(1, 2)
    assert client.core.entered.wait(WAIT_S)
    time.sleep(0.8)
    assert client.engine.heartbeat_age_s() > 0.7
    assert client.engine.is_alive()
    client.core.gate.set()
    client.wait_all()
    assert client.engine.heartbeat_age_s() < 0.7


def test_an_idle_engine_computes_and_reports_nothing(make_client: MakeClient) -> None:
    client = make_client()
    client.submit(1, 2)
    client.wait_all()
    client.wait_idle()
    num_reports, num_steps = len(client.reports), len(client.core.step_sizes)
    time.sleep(0.6)
    assert (len(client.reports), len(client.core.step_sizes)) == (num_reports, num_steps)


def test_a_cache_too_small_for_one_sequence_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="11 KV blocks of 4 tokens cannot hold"):
        Client(num_blocks=11)
