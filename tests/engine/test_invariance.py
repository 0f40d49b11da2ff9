"""Batch invariance with the real model: whatever else is computed, and however, the same text.

Every case is compared exactly, log probabilities included, with the sequence computed alone, in
one chunk, on a cold cache.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engine.checkpoint.progress import SilentProgress
from engine.config import EngineConfig
from engine.loader import LoadedModel, load_model
from engine.loop import Engine
from engine.runner import EngineSettings
from engine.speculation.setup import OFF, Speculation
from engine.types import SamplingParams, StepReport, Submit, TokenEvent, TokenLogprobs

MAX_MODEL_LEN = 1024
NUM_NEIGHBOURS = 32
SUBJECT = 1000  # its id; neighbours count from 0

STORY = (
    "The lighthouse keeper wrote one line in the log each night, and never the same line twice. "
    "On the first night of winter the lamp went out. He climbed the stairs with a candle in one "
    "hand and a box of tools in the other, counting the steps as he always did, and at step one "
    "hundred and twelve he heard somebody counting with him. "
)

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, num_logprobs=3)
SAMPLED = SamplingParams(
    max_tokens=24,
    temperature=0.9,
    top_p=0.95,
    top_k=200,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=0.1,
    seed=0xDEADBEEFCAFE,
    ignore_eos=True,
    num_logprobs=3,
)


class Result(msgspec.Struct, frozen=True):
    """What a sequence gave; `num_cached_tokens` may differ between equal results."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: str | None


class RunningEngine:
    """An engine over the loaded core, and the events it has reported so far."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        max_step_tokens: int = MAX_MODEL_LEN,
        max_sequences: int = NUM_NEIGHBOURS + 1,
        num_kv_blocks: int | None = None,
        speculation: Speculation = OFF,
    ) -> None:
        self.events: dict[int, list[TokenEvent]] = {}
        self.num_preemptions = 0
        self._changed = threading.Condition()
        self.engine = Engine(
            model.core,
            EngineSettings(
                max_model_len=MAX_MODEL_LEN,
                num_kv_blocks=num_kv_blocks or model.num_kv_blocks,
                eos_token_ids=model.eos_token_ids,
                max_sequences=max_sequences,
                max_step_tokens=max_step_tokens,
            ),
            self._take,
            speculation,
        )
        self.engine.start()

    def _take(self, report: StepReport) -> None:
        with self._changed:
            for event in report.events:
                self.events.setdefault(event.seq_id, []).append(event)
            self.num_preemptions = report.load.num_preemptions
            self._changed.notify_all()

    def submit(self, seq_id: int, prompt_ids: list[int], params: SamplingParams) -> None:
        self.engine.submit(Submit(seq_id, tuple(prompt_ids), params, time.monotonic()))

    def result(self, seq_id: int) -> Result:
        """Wait for the end of a sequence."""

        def ended() -> bool:
            return (
                bool(self.events.get(seq_id)) and self.events[seq_id][-1].finish_reason is not None
            )

        with self._changed:
            assert self._changed.wait_for(ended, 60), f"sequence {seq_id} does not end"
            events = list(self.events[seq_id])
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        return Result(
            tuple(token_id for event in events for token_id in event.token_ids),
            tuple(entry for event in events for entry in event.logprobs or ()),
            events[-1].finish_reason,
        )

    def stop(self) -> None:
        """End the thread; the engine must be idle, and its books must add up."""
        deadline_s = time.monotonic() + 10
        while not self.engine.is_idle():
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        self.engine.check_integrity()
        assert self.engine.stop(1.0)


@pytest.fixture(scope="module", params=["auto", "none"])
def quantization(request: pytest.FixtureRequest) -> str:
    """The default model as shipped (int4 and int8), and in bf16."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(quantization: str, default_model_path: Path) -> LoadedModel:
    """One core for all engines of this module."""
    return _load(default_model_path, quantization)


def _load(path: Path, quantization: str, num_threads: int | None = None) -> LoadedModel:
    config = EngineConfig(
        model=str(path),
        quantization=quantization,  # type: ignore[arg-type]
        max_model_len=MAX_MODEL_LEN,
        num_threads=num_threads,
    )
    return load_model(config, progress=SilentProgress())


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    return GREEDY if request.param == "greedy" else SAMPLED


@pytest.fixture(scope="module")
def prompt_ids(model: LoadedModel) -> list[int]:
    return _encode(model, STORY * 2)


def _encode(model: LoadedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text, add_bos=True, parse_special=False)


@pytest.fixture(scope="module")
def alone(model: LoadedModel, params: SamplingParams, prompt_ids: list[int]) -> Result:
    """The reference: alone, in one chunk, cold."""
    run = RunningEngine(model, max_sequences=1)
    run.submit(SUBJECT, prompt_ids, params)
    result = run.result(SUBJECT)
    run.stop()
    assert len(result.token_ids) == len(result.logprobs) == params.max_tokens
    return result


@pytest.fixture
def run(model: LoadedModel) -> Iterator[RunningEngine]:
    engine = RunningEngine(model)
    yield engine
    engine.stop()


def submit_neighbours(run: RunningEngine, model: LoadedModel, indices: range) -> None:
    """Prompts of 1 to about 90 tokens, each sampled in a way of its own."""
    for index in indices:
        ids = _encode(model, f"{index}. {STORY}")[: 1 + 3 * index]
        params = SamplingParams(
            max_tokens=2 + index,
            temperature=0.1 * index,
            top_k=index,
            seed=index,
            ignore_eos=True,
            presence_penalty=0.01 * index,
        )
        run.submit(index, ids, params)


def test_the_same_among_32_others(
    run: RunningEngine,
    model: LoadedModel,
    params: SamplingParams,
    prompt_ids: list[int],
    alone: Result,
) -> None:
    submit_neighbours(run, model, range(20))
    run.submit(SUBJECT, prompt_ids, params)
    submit_neighbours(run, model, range(20, NUM_NEIGHBOURS))
    assert run.result(SUBJECT) == alone
    for index in range(NUM_NEIGHBOURS):
        assert len(run.result(index).token_ids) == 2 + index


@pytest.mark.parametrize("max_step_tokens", [5, 33, 100])
def test_the_same_with_any_chunk_size(
    model: LoadedModel,
    params: SamplingParams,
    prompt_ids: list[int],
    alone: Result,
    max_step_tokens: int,
) -> None:
    run = RunningEngine(model, max_sequences=3, max_step_tokens=max_step_tokens)
    submit_neighbours(run, model, range(6, 8))
    run.submit(SUBJECT, prompt_ids, params)
    assert run.result(SUBJECT) == alone
    for index in range(6, 8):
        run.result(index)
    run.stop()


def test_the_same_with_a_warm_prefix_cache(
    run: RunningEngine, params: SamplingParams, prompt_ids: list[int], alone: Result
) -> None:
    for seq_id in range(3):
        run.submit(seq_id, prompt_ids, params)
        assert run.result(seq_id) == alone
    assert run.events[0][0].num_cached_tokens == 0
    assert run.events[2][0].num_cached_tokens > len(prompt_ids) // 2
    # A hit over a part of the prompt only, which ends inside a chunk.
    run.submit(SUBJECT, prompt_ids[: len(prompt_ids) // 2], params)
    run.result(SUBJECT)
    assert run.events[SUBJECT][0].num_cached_tokens > 0


def test_equal_prompts_that_arrive_together_are_the_same(
    run: RunningEngine, params: SamplingParams, prompt_ids: list[int], alone: Result
) -> None:
    for seq_id in range(8):
        run.submit(seq_id, prompt_ids, params)
    assert [run.result(seq_id) for seq_id in range(8)] == [alone] * 8


def test_the_same_when_preempted(
    model: LoadedModel, params: SamplingParams, prompt_ids: list[int], alone: Result
) -> None:
    num_blocks = -(-MAX_MODEL_LEN // model.core.block_size)
    run = RunningEngine(model, max_sequences=8, num_kv_blocks=num_blocks)
    # Different beginnings, or they would share their blocks.
    for seq_id in range(5):
        ids = _encode(model, f"{seq_id}. {STORY}")
        run.submit(seq_id, ids, msgspec.structs.replace(params, max_tokens=150))
    run.submit(SUBJECT, prompt_ids, params)
    assert run.result(SUBJECT) == alone
    for seq_id in range(5):
        assert len(run.result(seq_id).token_ids) == 150
    assert run.num_preemptions > 0
    run.stop()


def test_the_same_after_neighbours_were_aborted(
    run: RunningEngine,
    model: LoadedModel,
    params: SamplingParams,
    prompt_ids: list[int],
    alone: Result,
) -> None:
    submit_neighbours(run, model, range(8, NUM_NEIGHBOURS))
    run.submit(SUBJECT, prompt_ids, params)
    for index in range(8, NUM_NEIGHBOURS, 2):
        run.engine.abort(index)
    assert run.result(SUBJECT) == alone
    for index in range(8, NUM_NEIGHBOURS):
        assert run.result(index).finish_reason in (
            ("abort", "length") if index % 2 == 0 else ("length",)
        )


def test_a_long_text_is_the_same_alone_and_among_others(model: LoadedModel) -> None:
    """Alone, threads share the segments of its attention; in company, whole sequences."""
    long_prompt_ids = _encode(model, STORY * 9)
    assert len(long_prompt_ids) > 600
    results = []
    for num_neighbours in (0, NUM_NEIGHBOURS):
        run = RunningEngine(model)
        submit_neighbours(run, model, range(num_neighbours))
        run.submit(SUBJECT, long_prompt_ids, GREEDY)
        results.append(run.result(SUBJECT))
        for index in range(num_neighbours):
            run.result(index)
        run.stop()
    assert results[0] == results[1]


def test_the_same_with_one_thread(
    default_model_path: Path,
    quantization: str,
    params: SamplingParams,
    prompt_ids: list[int],
    alone: Result,
) -> None:
    run = RunningEngine(_load(default_model_path, quantization, num_threads=1))
    run.submit(SUBJECT, prompt_ids, params)
    assert run.result(SUBJECT) == alone
    run.stop()
