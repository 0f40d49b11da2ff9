"""A smaller model as the drafter: the text stays, its cache follows, vocabularies are compared."""

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.config import ConfigError, EngineConfig
from engine.deployment import deploy
from engine.loader import LoadedModel, load_model, plan_headers, read_headers
from engine.loop import Engine
from engine.planning.qualification import qualify
from engine.speculation.setup import OFF
from engine.types import SamplingParams
from tests.engine.speculation.planted import Planted
from tests.engine.test_invariance import (
    GREEDY,
    MAX_MODEL_LEN,
    SAMPLED,
    Result,
    RunningEngine,
)
from tests.engine.tiny_model import VOCAB_SIZE, make_tiny_model
from tests.server_process import ServerProcess

NUM_SEQUENCES = 6
LONG = 400  # tokens of a prompt that the drafter needs several calls to catch up with


def make_model(folder: Path, seed: int, **options: Any) -> Path:
    return make_tiny_model(folder, seed, **{"max_position_embeddings": MAX_MODEL_LEN, **options})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("target"), seed=1)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same vocabulary, with more rows in its embedding."""
    folder = tmp_path_factory.mktemp("stranger")
    return make_model(folder, seed=2, num_hidden_layers=1, vocab_size=VOCAB_SIZE + 64)


def config(target: Path, draft: Path, **options: Any) -> EngineConfig:
    settings: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "speculation": "draft", **options}
    return EngineConfig(model=str(target), draft_model=str(draft), num_threads=1, **settings)


@pytest.fixture(scope="module", params=["itself", "stranger"])
def model(request: pytest.FixtureRequest, target: Path, stranger: Path) -> LoadedModel:
    """The target with itself as its drafter, or with a model that knows nothing of it."""
    return load_model(config(target, target if request.param == "itself" else stranger))


def planted(model: LoadedModel) -> Any:
    return Planted(
        mode="draft", draft=model.speculation.draft, num_kv_blocks=model.num_kv_blocks, made=[]
    )


def prompts() -> list[list[int]]:
    """Of several lengths; two share a prefix of several blocks, two are long."""
    text = [(7 * i * i + i) % VOCAB_SIZE for i in range(LONG)]
    return [text[:20], text[:90], [*text[:95], 1, 2], text, text[3 : LONG - 50], text[5:40]]


def run(model: LoadedModel, params: SamplingParams, speculation: Any, **options: Any) -> Any:
    """Results and preemptions of all prompts at once, each followed by one of the same start."""
    engine = RunningEngine(model, speculation=speculation, **options)
    for index, ids in enumerate(prompts()):
        engine.submit(index, ids, replace(params, seed=params.seed + index))
    results = [engine.result(index) for index in range(NUM_SEQUENCES)]
    engine.submit(100, prompts()[3], params)  # its prefix is cached by now
    results.append(engine.result(100))
    engine.stop()
    return results, engine.num_preemptions


PARAMS = {
    "greedy": replace(GREEDY, max_tokens=60),
    "sampled": replace(SAMPLED, max_tokens=60),
    "plainly sampled": SamplingParams(
        max_tokens=60, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True
    ),
}


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("num_kv_blocks", [None, 66], ids=["roomy", "preempting"])
def test_the_text_is_that_without_drafts(
    model: LoadedModel, name: str, num_kv_blocks: int | None
) -> None:
    params = PARAMS[name]
    options = {"num_kv_blocks": num_kv_blocks, "max_sequences": NUM_SEQUENCES}
    plain, _ = run(model, params, OFF, **options)
    speculation = planted(model)
    drafted, num_preemptions = run(model, params, speculation, **options)
    assert drafted == plain
    assert num_kv_blocks is None or num_preemptions > 0
    if model.speculation.draft is not None and "target" in model.speculation.draft.name:
        # It is the target: with its noise it agrees always, unless penalties change the target.
        policy = speculation.made[0]
        least = 0.5 if name == "sampled" else 1.0
        assert policy.num_accepted >= least * policy.num_verified > 100


def test_a_preempted_text_is_caught_up_with_again(target: Path) -> None:
    """Two sequences take turns with too few blocks, so each is given its own lane again."""
    model = load_model(config(target, target))
    params = replace(GREEDY, max_tokens=120)
    texts = [prompts()[3] + prompts()[0] * 4, prompts()[4] + prompts()[5] * 4]

    def results(speculation: Any) -> list[Result]:
        engine = RunningEngine(model, max_sequences=2, num_kv_blocks=64, speculation=speculation)
        for index, ids in enumerate(texts):
            engine.submit(index, ids, params)
        answers = [engine.result(index) for index in range(2)]
        assert engine.num_preemptions > 0
        engine.stop()
        return answers

    speculation = planted(model)
    assert results(speculation) == results(OFF)
    assert speculation.made[0].num_accepted == speculation.made[0].num_verified > 50


def test_a_request_that_goes_away_leaves_nothing_behind(target: Path) -> None:
    model = load_model(config(target, target))
    params = replace(GREEDY, max_tokens=400)
    expected: Result = _answer(model, OFF)
    engine = RunningEngine(model, max_sequences=1, speculation=planted(model))
    engine.submit(0, prompts()[3], params)
    while not engine.events.get(0):
        time.sleep(0.001)
    engine.engine.abort(0)
    engine.submit(1, prompts()[4], GREEDY)
    assert engine.result(1) == expected
    engine.stop()


def _answer(model: LoadedModel, speculation: Any) -> Result:
    engine = RunningEngine(model, max_sequences=1, speculation=speculation)
    engine.submit(1, prompts()[4], GREEDY)
    result = engine.result(1)
    engine.stop()
    return result


def test_its_memory_is_planned_and_it_qualifies(target: Path, stranger: Path) -> None:
    settings = config(target, stranger, kv_memory_bytes=2 << 20, max_sequences=8)
    headers = read_headers(settings)
    planned = plan_headers(settings, headers).ledger.draft_bytes
    deployment = deploy(settings)
    loaded = deployment.loaded
    engine = Engine(loaded.core, deployment.engine_settings, lambda _: None, loaded.speculation)
    assert planned == deployment.measured().draft_bytes > 0
    engine.stop(0.0)
    row = {row.name: row for row in qualify(headers, settings, "bf16")}["speculation draft"]
    assert row.qualified
    assert row.enabled
    assert "has the same vocabulary" in row.evidence


def test_a_server_drafts_with_it(target: Path, tmp_path: Path) -> None:
    options = ["--model", str(target), "--served-model-name", "tiny", "--speculation", "draft"]
    server = ServerProcess([*options, "--draft-model", str(target)], tmp_path / "server.log")
    try:
        server.wait_ready()
        body = {"model": "tiny", "prompt": "abc", "max_tokens": 200, "temperature": 0}
        texts, usages = [], []
        for drafter in ("off", "draft"):
            choice = {"fulcrum": {"usage": True, "speculation": drafter}}
            answer = httpx.post(f"{server.url}/v1/completions", json=body | choice, timeout=30)
            texts.append(answer.json()["choices"][0]["text"])
            usages.append(answer.json()["usage"]["fulcrum"])
        assert texts[0] == texts[1]
        assert usages[0]["drafted_tokens"] == 0
        report = httpx.get(f"{server.url}/v1/speculation", timeout=10).json()
        drafters = {entry["name"]: entry for entry in report["drafters"]}
        assert [name for name, entry in drafters.items() if entry["qualifies"]] == ["draft"]
        assert drafters["draft"]["num_drafted_tokens"] == usages[1]["drafted_tokens"]
        assert "speculation draft: draft" in server.log
    finally:
        server.kill()


def test_another_vocabulary_is_refused_with_its_overlap(target: Path, tmp_path: Path) -> None:
    other = make_model(tmp_path / "other", seed=3)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"--draft-model other: .*254 of 256 ids \(99.2%\).*"):
        load_model(config(target, other))


def test_what_cannot_work_says_so(target: Path, tmp_path: Path) -> None:
    short = make_model(tmp_path / "short", seed=3, max_position_embeddings=512)
    with pytest.raises(ConfigError, match=r"--draft-model .*: was made for 512 tokens; set --max"):
        load_model(config(target, short))
    with pytest.raises(ConfigError, match="--draft-model nowhere: no such file or folder"):
        load_model(config(target, Path("nowhere")))
    with pytest.raises(ConfigError, match="--speculation draft: needs --draft-model"):
        EngineConfig(speculation="draft")
