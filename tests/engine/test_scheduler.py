"""Scheduler and batch on a fake core, stepped by hand: texts are exact, books add up each step."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.batch import Batch, SampledRows
from engine.block_manager import BlockManager
from engine.mixed_steps import MIN_MIXED_CHUNK, mixed_chunk
from engine.scheduler import Scheduler, StepPlan
from engine.sequence import Sequence
from engine.types import SamplingParams, Submit, TokenEvent
from tests.engine.fake_core import VOCAB_SIZE, FakeCore, expected_output, logprob, top_ids

EOS = frozenset({7})
MAX_MODEL_LEN = 40
BLOCK_SIZE = 4


class Bench:
    """What the engine loop does, one step at a call."""

    def __init__(
        self, *, num_blocks: int = 100, max_sequences: int = 8, max_step_tokens: int = 16
    ) -> None:
        self.core = FakeCore(num_blocks, BLOCK_SIZE)
        limits = {
            "max_sequences": max_sequences,
            "max_step_tokens": max_step_tokens,
            "max_model_len": MAX_MODEL_LEN,
        }
        self.scheduler = Scheduler(BlockManager(num_blocks, BLOCK_SIZE), **limits)
        self.batch = Batch(self.core, **limits, eos_token_ids=EOS)
        self.submitted: dict[int, Submit] = {}
        self.events: dict[int, list[TokenEvent]] = {}

    def submit(
        self,
        prompt_ids: Iterable[int],
        *,
        arrived_at_s: float = 0.0,
        priority: int = 0,
        **params: Any,
    ) -> int:
        seq_id = len(self.submitted)
        sampling = SamplingParams(**{"max_tokens": 6, **params})
        message = Submit(seq_id, tuple(prompt_ids), sampling, arrived_at_s, priority)
        self.submitted[seq_id] = message
        self.events[seq_id] = []
        self.scheduler.add(Sequence(message, EOS, seq_id))
        self.scheduler.check_integrity()
        return seq_id

    def step(self) -> StepPlan:
        plan = self.scheduler.schedule()
        for seq in plan.admitted:
            self.batch.open_lane(seq)
        sizes = self.batch.fill(plan.entries)
        error = None
        try:
            self.core.step(*sizes)
        except RuntimeError as failure:
            error = str(failure)
        if error is None:
            self.record(self.scheduler.commit(plan, self.batch.sampled()))
        else:
            self.record(self.scheduler.fail(plan, error))
        self.scheduler.check_integrity()
        return plan

    def abort(self, seq_id: int) -> None:
        event = self.scheduler.abort(seq_id)
        if event is not None:
            self.record([event])
        self.scheduler.check_integrity()

    def record(self, events: list[TokenEvent]) -> None:
        for event in events:
            assert not self.finish_reason(event.seq_id), "an event after the last one"
            self.events[event.seq_id].append(event)

    def run(self) -> None:
        while self.scheduler.has_work:
            self.step()
        load = self.scheduler.load()
        assert load.num_held_blocks == 0
        assert load.num_free_blocks == load.num_total_blocks

    def output(self, seq_id: int) -> list[int]:
        return [token_id for event in self.events[seq_id] for token_id in event.token_ids]

    def finish_reason(self, seq_id: int) -> str | None:
        events = self.events[seq_id]
        return events[-1].finish_reason if events else None

    def expected(self, seq_id: int) -> tuple[list[int], str]:
        message = self.submitted[seq_id]
        return expected_output(
            message.prompt_ids, message.params, max_model_len=MAX_MODEL_LEN, eos_token_ids=[*EOS]
        )

    def assert_texts(self) -> None:
        for seq_id in self.submitted:
            got = self.output(seq_id), self.finish_reason(seq_id)
            assert got == self.expected(seq_id), f"sequence {seq_id}"


token_ids = st.integers(0, VOCAB_SIZE - 2)
# Few distinct beginnings, so that prefixes are shared often.
prompts = st.builds(
    lambda head, tail: [*([3, 1, 4, 1, 5, 9, 2, 6, 5] * 2)[:head], *tail],
    st.integers(0, 18),
    st.lists(token_ids, min_size=1, max_size=12),
)
sampling_params = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 20), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "priority": st.integers(-2, 2),
        "min_tokens": st.integers(0, 8),
        "temperature": st.sampled_from([0.0, 0.5, 1.5]),
        "top_k": st.integers(0, 5),
        "top_p": st.sampled_from([0.5, 0.95]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "frequency_penalty": st.sampled_from([0.0, -0.5]),
        "logit_bias": st.lists(
            st.tuples(token_ids, st.sampled_from([-1.5, 2.0])), max_size=3, unique_by=lambda p: p[0]
        ).map(tuple),
        "stop_token_ids": st.lists(token_ids, max_size=6).map(tuple),
        "ignore_eos": st.booleans(),
        "num_logprobs": st.integers(0, 3),
        "num_prompt_logprobs": st.integers(0, 3),
    },
)


@settings(max_examples=120, deadline=None)
@given(
    requests=st.lists(st.tuples(prompts, sampling_params, st.integers(0, 3)), max_size=10),
    num_blocks=st.integers(10, 40),
    max_sequences=st.integers(1, 5),
    extra_step_tokens=st.integers(0, 20),
    aborted=st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=3),
)
def test_every_text_is_exact_in_any_mix(
    requests: list[tuple[list[int], dict[str, Any], int]],
    num_blocks: int,
    max_sequences: int,
    extra_step_tokens: int,
    aborted: dict[int, int],
) -> None:
    bench = Bench(
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_step_tokens=max_sequences + extra_step_tokens,
    )
    num_steps = 0

    def step() -> None:
        nonlocal num_steps
        if num_steps in aborted:
            bench.abort(aborted[num_steps])
        if bench.scheduler.has_work:
            bench.step()
        num_steps += 1

    for prompt_ids, params, num_steps_before_next in requests:
        bench.submit(prompt_ids, **params)
        for _ in range(num_steps_before_next):
            step()
    while bench.scheduler.has_work:
        step()
    bench.run()
    for seq_id, message in bench.submitted.items():
        text, reason = bench.expected(seq_id)
        if bench.finish_reason(seq_id) == "abort":
            assert bench.output(seq_id) == text[: len(bench.output(seq_id))]
            continue
        assert (bench.output(seq_id), bench.finish_reason(seq_id)) == (text, reason)
        check_logprobs(bench.events[seq_id], message)


def check_logprobs(events: list[TokenEvent], message: Submit) -> None:
    tokens = list(message.prompt_ids)
    for event in events:
        for index, token_id in enumerate(event.token_ids):
            count = message.params.num_logprobs
            if count is None:
                assert event.logprobs is None
            else:
                assert event.logprobs is not None
                entry = event.logprobs[index]
                assert (entry.token_id, entry.logprob) == (token_id, logprob(tokens, token_id))
                assert entry.top_ids == top_ids(tokens, count)
            tokens.append(token_id)
    count = message.params.num_prompt_logprobs
    assert [event.prompt_logprobs is not None for event in events] == [
        count is not None and index == 0 for index in range(len(events))
    ]
    if count is not None:
        check_prompt_logprobs(events[0], message, count)


def check_prompt_logprobs(event: TokenEvent, message: Submit, count: int) -> None:
    assert event.prompt_logprobs is not None
    assert event.prompt_logprobs[0] is None
    assert len(event.prompt_logprobs) == len(message.prompt_ids)
    for index in range(1, len(message.prompt_ids)):
        prefix, token_id = message.prompt_ids[:index], message.prompt_ids[index]
        entry = event.prompt_logprobs[index]
        assert entry is not None
        assert (entry.token_id, entry.logprob) == (token_id, logprob(prefix, token_id))
        assert entry.top_ids == top_ids(prefix, count)


def test_a_decoding_sequence_advances_beside_a_long_prefill() -> None:
    bench = Bench(max_step_tokens=8)
    decoding = bench.submit([1, 2], max_tokens=20, ignore_eos=True)
    bench.step()
    long = bench.submit(range(10, 40), max_tokens=2)
    for num_events in range(2, 5):
        plan = bench.step()
        assert [count for _, count in plan.entries] == [1, 7]
        assert len(bench.events[decoding]) == num_events
        assert bench.events[long] == []
    bench.run()
    bench.assert_texts()


def test_no_step_exceeds_the_token_budget_or_the_sequence_limit() -> None:
    bench = Bench(max_sequences=3, max_step_tokens=7)
    for index in range(9):
        bench.submit(range(index, index + 9), max_tokens=5)
    while bench.scheduler.has_work:
        plan = bench.step()
        assert sum(count for _, count in plan.entries) <= 7
        assert len(plan.entries) <= 3
        assert bench.scheduler.load().num_running <= 3
    bench.assert_texts()


def test_sequences_start_in_order_of_arrival() -> None:
    bench = Bench(max_sequences=2)
    for index in range(8):
        bench.submit([index + 10] * 3, max_tokens=1 + index % 3)
    started = []
    while bench.scheduler.has_work:
        started += [seq.seq_id for seq in bench.step().admitted]
    assert started == list(range(8))


def test_blocks_that_run_out_preempt_the_latest_and_no_text_changes() -> None:
    bench = Bench(num_blocks=12)
    for index in range(6):
        bench.submit(range(index, index + 5), max_tokens=25, ignore_eos=True, temperature=1.0)
    first_done_before_others_ended = []
    while bench.scheduler.has_work:
        bench.step()
        ended = [seq_id for seq_id in bench.submitted if bench.finish_reason(seq_id)]
        first_done_before_others_ended.append(not ended or 0 in ended)
    assert bench.scheduler.load().num_preemptions > 0
    assert all(first_done_before_others_ended), "the earliest arrival was made to wait"
    bench.assert_texts()


def test_preemptions_stay_rare_when_blocks_are_short() -> None:
    bench = Bench(num_blocks=20, max_sequences=8)
    for index in range(16):
        bench.submit(range(index, index + 6), max_tokens=20, ignore_eos=True)
    bench.run()
    assert bench.scheduler.load().num_preemptions <= 16
    bench.assert_texts()


def test_one_sequence_of_the_whole_context_fits_exactly() -> None:
    bench = Bench(num_blocks=MAX_MODEL_LEN // BLOCK_SIZE)
    long = bench.submit([1] * (MAX_MODEL_LEN - 1), max_tokens=5)
    other = bench.submit([2, 3], max_tokens=100, ignore_eos=True)
    bench.run()
    assert len(bench.output(long)) == 1
    assert len(bench.output(other)) == MAX_MODEL_LEN - 2
    bench.assert_texts()


def test_a_repeated_prompt_computes_only_what_follows_its_full_blocks() -> None:
    bench = Bench(max_step_tokens=32)
    prompt_ids = list(range(10, 23))
    bench.submit(prompt_ids, max_tokens=1)
    bench.run()
    again = bench.submit(prompt_ids, max_tokens=4)
    plan = bench.step()
    assert [count for _, count in plan.entries] == [1]
    bench.run()
    assert bench.events[again][0].num_cached_tokens == 12
    assert all(event.num_cached_tokens == 0 for event in bench.events[again][1:])
    load = bench.scheduler.load()
    assert (load.num_prefix_queried_tokens, load.num_prefix_hit_tokens) == (26, 12)
    bench.assert_texts()


def test_the_last_prompt_token_is_computed_even_if_all_its_blocks_are_cached() -> None:
    bench = Bench(max_step_tokens=32)
    prompt_ids = list(range(10, 22))
    for _ in range(2):
        last = bench.submit(prompt_ids, max_tokens=1)
        bench.run()
    assert bench.events[last][0].num_cached_tokens == 8
    bench.assert_texts()


def test_the_output_is_cached_too() -> None:
    bench = Bench(max_step_tokens=32)
    first = bench.submit(range(10, 18), max_tokens=9, ignore_eos=True)
    bench.run()
    turn = bench.submit([*range(10, 18), *bench.output(first), 1, 2], max_tokens=2)
    bench.run()
    assert bench.events[turn][0].num_cached_tokens == 16
    bench.assert_texts()


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    bench = Bench(max_step_tokens=64)
    for seed in range(4):
        bench.submit(range(10, 27), max_tokens=5, seed=seed, temperature=1.0)
    bench.run()
    assert [bench.events[seq_id][0].num_cached_tokens for seq_id in range(4)] == [0, 16, 16, 16]
    bench.assert_texts()


def test_a_sequence_that_awaits_an_aborted_one_computes_for_itself() -> None:
    bench = Bench(max_step_tokens=8)
    leader = bench.submit(range(10, 35), max_tokens=5)
    bench.submit(range(10, 35), max_tokens=5)
    bench.step()
    bench.abort(leader)
    bench.run()
    assert bench.finish_reason(leader) == "abort"
    assert (bench.output(1), bench.finish_reason(1)) == bench.expected(1)


def test_prompt_logprobs_are_computed_in_spite_of_a_cached_prefix() -> None:
    bench = Bench(max_step_tokens=8)
    prompt_ids = list(range(10, 30))
    bench.submit(prompt_ids, max_tokens=1)
    bench.run()
    echo = bench.submit(prompt_ids, max_tokens=3, num_prompt_logprobs=2, num_logprobs=1)
    bench.run()
    assert bench.events[echo][0].num_cached_tokens == 0
    check_logprobs(bench.events[echo], bench.submitted[echo])
    bench.assert_texts()


def test_prompt_logprobs_are_whole_after_a_preemption_within_the_prompt() -> None:
    # One token of the prompt a step, so that the other sequence takes its blocks half-way.
    bench = Bench(num_blocks=12, max_sequences=2, max_step_tokens=2)
    bench.submit(range(8), max_tokens=30, ignore_eos=True)
    echo = bench.submit(range(10, 34), max_tokens=2, num_prompt_logprobs=1)
    while not bench.scheduler.load().num_preemptions:
        bench.step()
    assert bench.events[echo] == []
    bench.run()
    check_logprobs(bench.events[echo], bench.submitted[echo])
    bench.assert_texts()


def test_end_of_sequence_and_stop_ids_wait_for_min_tokens() -> None:
    bench = Bench()
    for seed in range(60):
        stop_token_ids = (5, 6) if seed % 2 else ()
        bench.submit([1, 2], max_tokens=9, min_tokens=8, seed=seed, stop_token_ids=stop_token_ids)
        bench.submit([1, 2], max_tokens=9, seed=seed, stop_token_ids=stop_token_ids)
    bench.run()
    lengths = [len(bench.output(seq_id)) for seq_id in bench.submitted]
    assert min(lengths[1::2]) < 8 <= min(lengths[::2])
    bench.assert_texts()


def test_penalties_see_the_prompt_and_all_of_the_output() -> None:
    bench = Bench(max_step_tokens=9)
    for index, penalty in enumerate(("repetition", "presence", "frequency")):
        bench.submit(range(index, index + 14), max_tokens=12, **{f"{penalty}_penalty": 1.5})
        bench.submit(range(index, index + 14), max_tokens=12)
    bench.run()
    bench.assert_texts()


def test_an_abort_frees_the_blocks_at_once() -> None:
    bench = Bench()
    running = bench.submit(range(10, 30), max_tokens=10)
    bench.step()
    bench.step()
    assert bench.scheduler.load().num_held_blocks == 5
    bench.abort(running)
    assert bench.scheduler.load().num_held_blocks == 0
    bench.abort(running)
    assert [event.finish_reason for event in bench.events[running]] == [None, "abort"]


def test_a_failed_step_ends_its_sequences_and_leaves_nothing_to_find() -> None:
    bench = Bench(max_sequences=2, max_step_tokens=16)
    bench.core.failing_steps = {0}
    failed = bench.submit(range(10, 22), max_tokens=5)
    bench.step()
    assert bench.finish_reason(failed) == "error"
    assert "planted failure" in (bench.events[failed][-1].error or "")
    again = bench.submit(range(10, 22), max_tokens=5)
    bench.run()
    assert bench.events[again][0].num_cached_tokens == 0
    assert (bench.output(again), bench.finish_reason(again)) == bench.expected(again)


def test_logits_that_are_no_numbers_end_their_sequence_alone() -> None:
    bench = Bench()
    poisoned = bench.submit([1, 2, VOCAB_SIZE - 1], max_tokens=5)
    echoed = bench.submit([VOCAB_SIZE - 1, 2, 3], max_tokens=5, num_prompt_logprobs=0)
    healthy = bench.submit([1, 2, 3], max_tokens=5)
    bench.run()
    for seq_id in (poisoned, echoed):
        assert bench.finish_reason(seq_id) == "error"
        assert bench.events[seq_id][-1].error
    assert (bench.output(healthy), bench.finish_reason(healthy)) == bench.expected(healthy)


def test_many_biased_sequences_outgrow_the_bias_buffers() -> None:
    bench = Bench(max_sequences=8, max_step_tokens=64)
    bias = tuple((token_id, -0.5) for token_id in range(VOCAB_SIZE))
    bench.submit([5, 5], max_tokens=30)
    for index in range(60):
        bench.submit([index % 40, 3], max_tokens=4, logit_bias=bias * (1 + index % 2))
    bench.run()
    bench.assert_texts()


def short_and_long(max_tokens: int) -> tuple[Sequence, Sequence]:
    params = SamplingParams(max_tokens=max_tokens)
    short, long = (
        Sequence(Submit(seq_id, tuple(range(1, size)), params, 0.0), EOS, seq_id)
        for seq_id, size in ((0, 4), (1, 1500))
    )
    return short, long


def test_a_long_prompt_is_computed_in_short_steps_only_while_others_decode() -> None:
    scheduler = Scheduler(
        BlockManager(200, 16), max_sequences=8, max_step_tokens=512, max_model_len=2000
    )
    none = np.zeros((1, 20), np.float32)
    short, long = short_and_long(max_tokens=9)
    scheduler.add(short)
    plan = scheduler.schedule()
    scheduler.commit(plan, SampledRows([0, 1], [1], none[0], none.astype(np.int32), none))
    scheduler.add(long)
    for _ in range(3):
        plan = scheduler.schedule()
        sizes = {seq.seq_id: count for seq, count in plan.entries}
        assert sizes == {0: 1, 1: MIN_MIXED_CHUNK}
        scheduler.commit(plan, SampledRows([0, 1, 1], [1], none[0], none.astype(np.int32), none))
    scheduler.abort(0)
    assert [count for _, count in scheduler.schedule().entries] == [512]


def test_prompts_have_a_larger_part_of_steps_that_verify_many_drafts() -> None:
    scheduler = Scheduler(
        BlockManager(200, 16), max_sequences=8, max_step_tokens=512, max_model_len=2000
    )
    none = np.zeros((1, 20), np.float32)
    short, long = short_and_long(max_tokens=300)
    scheduler.add(short)
    num_drafts = 0
    for _ in range(100):
        plan = scheduler.schedule()
        short.draft_ids = [5] * num_drafts  # all of them wrong
        num_rows = 1 + num_drafts
        plan.entries[0] = (short, max(num_rows, plan.entries[0][1]))
        rows = SampledRows([0, num_rows], [1] * num_rows, none[0], none.astype(np.int32), none)
        scheduler.commit(plan, rows)
        num_drafts = 30
    scheduler.add(long)
    chunk = mixed_chunk(2, 1, 30, 1499)
    assert chunk > MIN_MIXED_CHUNK
    assert [count for _, count in scheduler.schedule().entries] == [1, chunk]


def test_chunks_beside_many_streams_grow_with_the_prompts_that_wait_as_far_as_drafts_hide_it() -> (
    None
):
    few, many = (mixed_chunk(32, 24, 96, num_tokens) for num_tokens in (128, 1000))
    assert 2 * few < many
    assert 2 * mixed_chunk(32, 24, 0, 1000) < many


def test_a_prompt_beside_decoding_sequences_is_computed_in_equal_parts() -> None:
    left, parts = 130, []
    while left:
        parts.append(mixed_chunk(8, 7, 0, left))
        left -= parts[-1]
    assert len(parts) == 4
    assert max(parts) - min(parts) <= 1
