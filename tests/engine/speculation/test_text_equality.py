"""Drafts never change a text: whoever drafts, and however well, with the real model.

Drafters are planted that always draft, so that no measured cost decides what is verified.
"""

import random
from collections.abc import Sequence as Row
from pathlib import Path

import pytest
from msgspec.structs import replace

from engine.checkpoint.progress import SilentProgress
from engine.config import EngineConfig
from engine.loader import LoadedModel, load_model
from engine.speculation.candidates import Candidate
from engine.speculation.drafter import Draft
from engine.speculation.setup import Speculation
from engine.types import SamplingParams, StepReport
from tests.engine.speculation.planted import NUM_DRAFTS, AlwaysDraft, Planted
from tests.engine.test_invariance import (
    GREEDY,
    MAX_MODEL_LEN,
    SAMPLED,
    STORY,
    Result,
    RunningEngine,
)

NUM_SEQUENCES = 6


@pytest.fixture(scope="module")
def model(default_model_path: Path) -> LoadedModel:
    config = EngineConfig(
        model=str(default_model_path), max_model_len=MAX_MODEL_LEN, speculation="auto"
    )
    return load_model(config, progress=SilentProgress())


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def params(request: pytest.FixtureRequest) -> SamplingParams:
    return GREEDY if request.param == "greedy" else SAMPLED


@pytest.fixture(scope="module")
def plain(model: LoadedModel, params: SamplingParams) -> list[Result]:
    return _run(model, params, Speculation())


def _run(model: LoadedModel, params: SamplingParams, speculation: Speculation) -> list[Result]:
    """Texts of several lengths together, most of them repeating themselves."""
    run = RunningEngine(model, max_sequences=NUM_SEQUENCES, speculation=speculation)
    ids = model.tokenizer.encode(STORY * 2, add_bos=True, parse_special=False)
    for index in range(NUM_SEQUENCES):
        run.submit(index, ids[: len(ids) - 11 * index], replace(params, seed=params.seed + index))
    results = [run.result(index) for index in range(NUM_SEQUENCES)]
    run.stop()
    return results


@pytest.mark.parametrize("mode", ["ngram", "mtp"])
def test_a_drafter_does_not_change_the_text(
    model: LoadedModel, params: SamplingParams, plain: list[Result], mode: str
) -> None:
    made: list[AlwaysDraft] = []
    mtp = model.speculation.mtp if mode == "mtp" else None
    speculation = Planted(
        mode=mode,  # type: ignore[arg-type]
        hidden_size=model.speculation.hidden_size,
        mtp=mtp,
        made=made,
    )
    assert _run(model, params, speculation) == plain
    assert made[0].num_accepted > 0


def test_garbage_does_not_change_the_text(
    model: LoadedModel, params: SamplingParams, plain: list[Result]
) -> None:
    rng = random.Random(1)

    def propose(candidates: Row[Candidate]) -> list[Draft]:
        return [
            Draft("planted", [rng.randrange(model.spec.vocab_size) for _ in range(NUM_DRAFTS)], [])
            for _ in candidates
        ]

    assert _run(model, params, Planted(propose=propose, made=[])) == plain


def test_drafts_that_are_always_right_are_all_accepted(
    model: LoadedModel, params: SamplingParams, plain: list[Result]
) -> None:
    def propose(candidates: Row[Candidate]) -> list[Draft]:
        drafts = []
        for candidate in candidates:
            seq = candidate.sequence
            begin = seq.num_output_tokens
            ids = list(plain[seq.seq_id].token_ids[begin : begin + NUM_DRAFTS])
            drafts.append(Draft("planted", ids, []))
        return drafts

    made: list[AlwaysDraft] = []
    assert _run(model, params, Planted(propose=propose, made=made)) == plain
    # The first token comes with the prompt; then every step gives the drafts and one more.
    num_steps = -(-(params.max_tokens - 1) // (NUM_DRAFTS + 1))
    assert made[0].num_accepted == NUM_SEQUENCES * (params.max_tokens - 1 - num_steps)


def test_a_drafter_that_fails_in_the_middle_does_not_change_the_text(
    model: LoadedModel, params: SamplingParams, plain: list[Result]
) -> None:
    num_calls = 0

    def propose(candidates: Row[Candidate]) -> list[Draft]:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 5:
            raise RuntimeError("planted: the drafter broke")
        return [Draft("planted", [1, 2, 3], []) for _ in candidates]

    assert _run(model, params, Planted(propose=propose, made=[])) == plain
    assert num_calls == 6  # and was not asked again


def test_an_engine_without_drafts_may_follow_on_the_same_core(
    model: LoadedModel, params: SamplingParams, plain: list[Result]
) -> None:
    _run(model, params, model.speculation)
    assert _run(model, params, Speculation()) == plain


def test_drafters_may_change_between_steps(
    model: LoadedModel, params: SamplingParams, plain: list[Result]
) -> None:
    """From none to lookup, the module and none again, while six texts are written."""
    lookup: list[AlwaysDraft] = []
    module: list[AlwaysDraft] = []
    coming: dict[int, Speculation] = {
        3: Planted(mode="ngram", made=lookup),
        6: Planted(
            mode="mtp",
            hidden_size=model.speculation.hidden_size,
            mtp=model.speculation.mtp,
            made=module,
        ),
        26: Speculation(),
    }
    run = RunningEngine(model, max_sequences=NUM_SEQUENCES)
    take, num_reports, changes = run._take, 0, []

    def change_now_and_then(report: StepReport) -> None:
        nonlocal num_reports
        num_reports += 1
        if num_reports in coming:
            changes.append(run.engine.redraft(coming[num_reports]))
        take(report)

    run.engine._on_report = change_now_and_then
    ids = model.tokenizer.encode(STORY * 2, add_bos=True, parse_special=False)
    long = replace(params, max_tokens=2 * params.max_tokens)
    for index in range(NUM_SEQUENCES):
        run.submit(index, ids[: len(ids) - 11 * index], replace(long, seed=params.seed + index))
    results = [run.result(index) for index in range(NUM_SEQUENCES)]
    run.stop()
    assert [change.result(0) for change in changes] == [None] * 3
    begun = [replace(r, token_ids=r.token_ids[: params.max_tokens]) for r in results]
    assert [r.token_ids for r in begun] == [r.token_ids for r in plain]
    assert lookup[0].num_accepted > 0
    assert module[0].num_accepted > 0
