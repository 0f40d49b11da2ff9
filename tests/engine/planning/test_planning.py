"""Proposals, previews, qualification, calibration and quality of a tiny model."""

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine.checkpoint.cache import cache_folder
from engine.config import QUANTIZATIONS, ConfigError, EngineConfig
from engine.loader import load_model, read_headers
from engine.planning import calibration
from engine.planning.calibration import SHORT_PROMPT, Calibration, Timing, calibrate
from engine.planning.core_probe import self_check
from engine.planning.cost_model import CostModel
from engine.planning.drafting import Drafting, ModelDrafts, Survivals, alike
from engine.planning.observer import Observer
from engine.planning.preview import Planner
from engine.planning.proposal import Proposal, parse_size
from engine.planning.qualification import qualify
from engine.planning.quality import compare, measure, quality_of
from engine.types import EngineLoad, StepReport, TokenEvent
from tests.engine.tiny_model import make_tiny_model


@pytest.fixture
def planner(config: EngineConfig) -> Planner:
    return Planner(read_headers(config))


def test_a_proposal_changes_what_it_names_and_nothing_else(config: EngineConfig) -> None:
    changed = Proposal(kv_memory="2MiB", quantization="int4").changed(config)
    assert changed == msgspec.structs.replace(config, kv_memory_bytes=2 << 20, quantization="int4")
    assert Proposal().changed(config) == config
    with pytest.raises(ConfigError, match="choose auto"):
        Proposal(kv_dtype="fp8").changed(config)
    with pytest.raises(ConfigError, match="is no size"):
        Proposal(kv_memory="much").changed(config)
    with pytest.raises(ConfigError, match="concurrency"):
        Proposal(concurrency=0)
    assert (parse_size("1.5kb"), parse_size("2GiB"), parse_size("7")) == (1500, 2 << 30, 7)


def test_what_is_short_comes_with_what_would_free_it(
    planner: Planner, config: EngineConfig
) -> None:
    preview = planner.preview(
        config, Proposal(kv_memory=100 << 20), available_bytes=90 << 20, measure=False
    )
    memory = preview.memory
    assert not memory.fits
    assert memory.short_bytes == memory.total_bytes - (90 << 20)
    for remedy in memory.remedies:
        healed = planner.preview(
            config,
            Proposal(**{"kv_memory": 100 << 20, **remedy.setting}),
            available_bytes=90 << 20,
            measure=False,
        )
        freed = memory.total_bytes - healed.memory.total_bytes
        assert freed == pytest.approx(remedy.frees_bytes, rel=0.02, abs=1 << 15), remedy.text
    assert any("KV int8" in remedy.text for remedy in memory.remedies)
    assert planner.preview(config, Proposal(), available_bytes=200 << 20, measure=False).memory.fits


def test_levels_stand_side_by_side(planner: Planner, config: EngineConfig) -> None:
    fp16, int8, int4 = planner.levels(config)
    assert fp16.memory["weights"] > int8.memory["weights"] > int4.memory["weights"]
    assert fp16.memory["kv"] == int4.memory["kv"]
    assert fp16.total_bytes == sum(fp16.memory.values())


def test_routes_are_what_blocks_and_lanes_hold(planner: Planner, config: EngineConfig) -> None:
    preview = planner.preview(
        config,
        Proposal(kv_memory=1 << 20, prompt_tokens=200, output_tokens=200, max_sequences=100),
        available_bytes=1 << 40,
        measure=False,
    )
    assert preview.routes.limited_by == "kv"
    assert preview.routes.count == preview.kv_tokens // 400
    few = planner.preview(
        config,
        Proposal(prompt_tokens=8, output_tokens=8),
        available_bytes=1 << 40,
        measure=False,
    )
    assert (few.routes.count, few.routes.limited_by) == (8, "max_sequences")


def test_each_technique_has_evidence_or_says_what_it_needs(
    planner: Planner, config: EngineConfig
) -> None:
    rows = {row.name: row for row in qualify(planner.headers, config, "int8")}
    assert all(row.evidence for row in rows.values())
    assert all(row.needs for row in rows.values() if not row.qualified)
    assert [n for n, row in rows.items() if row.enabled and row.kind == "weights"] == [
        "weights auto"
    ]
    assert rows["KV int8"].enabled
    assert not rows["KV bf16"].enabled
    assert "no head was trained" in rows["speculation mtp"].evidence
    assert rows["speculation ngram"].setting == {"speculation": "ngram"}
    levels = [row.setting for row in rows.values() if row.kind == "weights" and row.qualified]
    assert levels == [{"quantization": level} for level in QUANTIZATIONS]


def test_a_model_in_the_cache_that_could_draft_is_found(
    planner: Planner, config: EngineConfig, tiny: Path
) -> None:
    def draft_row() -> tuple[bool, bool, str]:
        rows = {row.name: row for row in qualify(planner.headers, config, "int8")}
        row = rows["speculation draft"]
        assert "--draft-model" in (row.needs or "")
        return row.qualified, row.enabled, row.evidence

    assert draft_row()[:2] == (False, False)
    snapshot = cache_folder() / "hub" / "some--smaller" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (snapshot / "model.safetensors").write_bytes(bytes(100))
    vocabulary = json.loads((tiny / "tokenizer.json").read_bytes())
    vocabulary["model"]["vocab"]["another"] = 300
    (snapshot / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert draft_row()[0] is False
    del vocabulary["model"]["vocab"]["another"]
    (snapshot / "tokenizer.json").write_text(json.dumps(vocabulary))
    qualified, enabled, evidence = draft_row()
    assert (qualified, enabled) == (True, False)
    assert "some--smaller" in evidence


def test_a_calibration_is_made_once_and_predicts_its_own_steps(
    planner: Planner, config: EngineConfig
) -> None:
    plan = planner.plan(config)
    assert planner.calibration(plan, measure=False) is None
    first = planner.calibration(plan, measure=True)
    assert first is not None
    assert first.seconds < 6
    assert {1, 8} <= set(first.decode)
    assert planner.calibration(plan, measure=True) == first, "measured again"
    other = planner.plan(msgspec.structs.replace(config, kv_dtype="int8"))
    assert planner.calibration(other, measure=False) is None, "kept under another setting's name"
    model = CostModel(first)
    assert model.decode_step_s(1, SHORT_PROMPT) == pytest.approx(first.decode[1].seconds)
    speed = planner.preview(config, Proposal(), available_bytes=1 << 40, measure=False).speed
    assert speed is not None
    for interval in (speed.decode_tokens_per_s, speed.total_tokens_per_s, speed.ttft_ms):
        assert 0.79 * interval.value < interval.low < interval.value < interval.high
        assert interval.high < 1.21 * interval.value


class PlantedCore:
    """A core that takes a while for its layers, and for logits."""

    def __init__(self, core: Any, *, head_s: float, layers_s: float) -> None:
        self._core, self._head_s, self._layers_s = core, head_s, layers_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        time.sleep(self._layers_s + (self._head_s if num_rows else 0.0))
        self._core.step(num_tokens, num_sequences, num_rows)


CALIBRATION = Calibration(
    decode={1: Timing(0.010, 0.0), 8: Timing(0.024, 0.0)},
    prefill={128: Timing(0.1, 0.0), 512: Timing(0.4, 0.0)},
    context_s_per_token=1e-6,
    prefill_context_s=1e-9,
    python_s=1e-4,
    load_average=0.0,
    seconds=1.0,
)


def test_a_prediction_is_at_the_pace_of_recent_steps(
    planner: Planner, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer, model = Observer(), CostModel(CALIBRATION)
    began_s = time.monotonic()

    def observe(seq_id: int, step_s: float, num_drafted: int = 0) -> None:
        events = (TokenEvent(seq_id, (1,) * (1 + num_drafted)),)
        load = EngineLoad(num_running=1, num_held_blocks=1)
        observer.observe(StepReport(events, load, step_s, 1 + num_drafted, num_drafted))

    for _ in range(24):
        observe(1, 3.0, num_drafted=2)  # of another size: it says nothing of the pace
    assert observer.pace(began_s, model) is None
    for _ in range(12):
        observe(1, 2 * (model.decode_step_s(1, 8) + model.streaming_s(1)))
        observe(-1, 2 * model.decode_step_s(1, 8))  # nobody is sent these
    pace = observer.pace(began_s, model)
    assert pace is not None
    assert pace.ratio == pytest.approx(2.0)
    assert observer.pace(time.monotonic(), model) is None

    def speed(at_s: float) -> float:
        calibration = msgspec.structs.replace(CALIBRATION, at_s=at_s)
        monkeypatch.setattr(planner, "calibration", lambda plan, measure: calibration)
        preview = planner.preview(config, Proposal(), available_bytes=1 << 40, pace=pace)
        assert preview.speed is not None
        assert ("steps of late" in preview.speed_basis) == (at_s == 0.0)
        return preview.speed.decode_tokens_per_s.value

    assert speed(at_s=0.0) == pytest.approx(speed(at_s=time.time()) / 2)


def test_the_cost_model_interpolates_and_adds_context() -> None:
    model = CostModel(CALIBRATION)
    assert model.decode_step_s(4.5, 0) == pytest.approx(0.017)
    assert model.decode_step_s(16, 0) == pytest.approx(0.040)
    assert model.decode_step_s(1, 1000 + SHORT_PROMPT) == pytest.approx(0.011)
    # Seven drafts read the same context as their sequence's own token.
    verified_s = model.verify_step_s(1, 1000 + SHORT_PROMPT, 7)
    assert verified_s == pytest.approx(0.024 + 1000 * 1e-6 + 7 * 1000 * 1e-9)
    assert model.prefill_s(128) == pytest.approx(0.1)
    assert model.prefill_s(640) == pytest.approx(0.5 + 128 * 512 * 1e-9)
    assert 0.010 <= model.prefill_s(1) <= model.prefill_s(64) <= 0.1


def test_quality_is_measured_against_bf16_or_said_to_be_unknown(
    planner: Planner, config: EngineConfig, tmp_path: Path
) -> None:
    reference = load_model(msgspec.structs.replace(config, quantization="none", kv_dtype="bf16"))
    same = compare(reference, load_model(msgspec.structs.replace(config, quantization="none")))
    assert (same.kl_divergence, same.top1_agreement) == (0.0, 1.0)
    int4 = msgspec.structs.replace(config, quantization="int4", kv_dtype="bf16")
    plan = planner.plan(int4)
    assert planner.quality(int4, plan).basis == "unknown"
    key = planner.quality_key(plan)
    measured = measure(int4, key.path)
    assert measured.kl_divergence is not None
    assert measured.kl_divergence > 1e-4
    assert planner.quality(int4, plan) == measured
    both = msgspec.structs.replace(int4, kv_dtype="int8")
    assert planner.quality(both, planner.plan(both)).basis == "unknown"
    cache = msgspec.structs.replace(config, quantization="none", kv_dtype="int8")
    cache_quality = measure(cache, planner.quality_key(planner.plan(cache)).path)
    estimated = planner.quality(both, planner.plan(both))
    assert estimated.basis == "estimated"
    assert estimated.kl_divergence == pytest.approx(
        measured.kl_divergence + (cache_quality.kl_divergence or 0.0)
    )
    assert quality_of(key, "other").basis == "measured"


def test_a_core_checks_itself(config: EngineConfig) -> None:
    loaded = load_model(config)
    assert self_check(loaded.core, loaded.spec.vocab_size) is None

    class Forgetful:
        """Loses what it wrote into the first block."""

        block_size = loaded.core.block_size

        def bind(self, **buffers: object) -> None:
            self.buffers = buffers
            loaded.core.bind(**buffers)  # type: ignore[arg-type]

        def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
            if num_tokens == 1:
                self.buffers["token_ids"][0] = 3  # type: ignore[index]
            loaded.core.step(num_tokens, num_sequences, num_rows)

    fault = self_check(Forgetful(), loaded.spec.vocab_size)
    assert fault is not None
    assert "differs" in fault


def test_the_calibration_does_not_read_the_weights(
    planner: Planner, config: EngineConfig, tiny: Path, tmp_path: Path
) -> None:
    """A file whose weights are holes calibrates like any other."""
    holes = tmp_path / "holes"
    holes.mkdir()
    for file in tiny.iterdir():
        content = file.read_bytes()
        if file.suffix == ".safetensors":
            size = 8 + int.from_bytes(content[:8], "little")
            content = content[:size] + bytes(len(content) - size)
        (holes / file.name).write_bytes(content)
    hollow = Planner(read_headers(msgspec.structs.replace(config, model=str(holes))))
    headers = hollow.headers
    result = calibrate(headers.checkpoint.spec, hollow.plan(config), headers.isa, 1, keep=False)
    assert result.decode[1].seconds > 0


def test_layers_that_there_is_no_time_for_are_reckoned_from_those_that_are_timed(
    config: EngineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_model(
        tmp_path / "deep", seed=1, num_hidden_layers=6, head_dim=32, tie_word_embeddings=False
    )
    deep = Planner(read_headers(msgspec.structs.replace(config, model=str(folder))))
    made: list[int] = []
    make = calibration.synthetic_core

    def planted(*args: Any, num_layers: int, **options: Any) -> Any:
        made.append(num_layers)
        core = make(*args, num_layers=num_layers, **options)
        return PlantedCore(core, head_s=0.006, layers_s=0.001 * num_layers)

    monkeypatch.setattr(calibration, "synthetic_core", planted)
    monkeypatch.setattr(calibration, "_MAX_VALUES", 0)
    monkeypatch.setattr(calibration, "_MAX_TURNS", 0)
    headers = deep.headers
    result = calibrate(headers.checkpoint.spec, deep.plan(config), headers.isa, 1, keep=False)
    assert made == [1]
    for timing in (result.decode[1], result.decode[8]):
        assert 0.012 <= timing.seconds < 0.016


def test_drafts_gain_what_their_acceptance_and_their_cost_leave() -> None:
    def flat(num_sequences: float, num_drafted: float) -> float:
        return 0.01

    def steep(num_sequences: float, num_drafted: float) -> float:
        return 0.01 * (num_sequences + num_drafted)

    certain = alike((1.0, 1.0), "measured")
    free = Drafting(models=(ModelDrafts(certain, 0.0),))
    assert free.gain(1, flat) == pytest.approx(3.0)
    assert free.gain(8, steep) == pytest.approx(1.0), "where a row costs a step nothing is gained"
    dear = Drafting(models=(ModelDrafts(certain, 0.5),))
    assert dear.gain(1, flat) == pytest.approx(3.0 / 2.0)
    hopeless = Drafting(models=(ModelDrafts(alike((0.0,), "measured"), 0.5),))
    assert hopeless.gain(1, flat) == 1.0, "the policy does not draft then"
    half = Drafting(free=Survivals(np.array([[1.0], [0.0]]), "estimated"))
    assert half.gain(4, flat) == pytest.approx(1.5)
    slow = msgspec.structs.replace(half, deciding_s=((4, 0.005),))
    assert slow.gain(4, flat) == pytest.approx(1.0), "deciding takes as long as drafts save"
    assert (free.basis, half.basis) == ("measured", "estimated")


def test_a_gain_is_of_the_drafts_that_are_worth_verifying_not_of_the_mean_draft() -> None:
    def steep(num_sequences: float, num_drafted: float) -> float:
        return 0.01 * num_sequences + 0.005 * num_drafted

    sure, poor = [1.0] * 4, [0.1] * 4
    mixed = Drafting(free=Survivals(np.array([sure, poor] * 50), "measured"))
    assert mixed.gain(1, steep) == pytest.approx((5 + 1) / (3 + 1))
    assert mixed.gain(2, steep) > 1.4
    # All at their mean, no draft would pay at all.
    mean = Drafting(free=Survivals(np.array([[0.49] * 4]), "measured"))
    assert mean.gain(1, steep) == 1.0


def test_a_model_is_asked_where_nothing_was_looked_up() -> None:
    def flat(num_sequences: float, num_drafted: float) -> float:
        return 0.01

    found = Survivals(np.array([[1.0, 1.0], [0.0, 0.0]]), "measured")
    both = Drafting(free=found, models=(ModelDrafts(alike((1.0, 1.0), "measured"), 0.25),))
    # Half of the steps emit three tokens at once, the other half after two runs of the model.
    assert both.gain(1, flat) == pytest.approx(3.0 / 1.25)


def test_steps_with_drafts_count_what_they_emit() -> None:
    def step(events: int, tokens: int, num_step_tokens: int, num_drafted: int) -> StepReport:
        emitted = tuple(TokenEvent(i, tuple(range(tokens))) for i in range(events))
        load = EngineLoad(num_running=events, num_held_blocks=events)
        return StepReport(emitted, load, 0.01, num_step_tokens, num_drafted)

    observer = Observer()
    observer.observe(step(2, 3, 6, 4))  # both texts verified two drafts, all of them accepted
    observer.observe(step(2, 1, 2, 0))
    observer.observe(step(2, 1, 34, 0))  # beside a prompt of 32
    window = observer.window(0.0, None)
    assert window is not None
    assert window.num_steps == 2
    assert window.mean_sequences == 2
    assert window.mean_emitted == pytest.approx(2.0)
    assert window.tokens_per_s == pytest.approx(8 / 0.02)
