"""Applying a setting: streams go on, a failure leaves the old state, a broken promise goes back."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from engine.config import ConfigError, EngineConfig
from engine.deployment import Deployment, deploy
from engine.migration import SwitchError
from engine.planning import apply_run
from engine.planning.apply_types import ApplyBusy, ApplyRequest
from engine.planning.proposal import settings_of
from engine.speculation.ngram import NgramDrafter
from tests.engine.planning.conftest import WAIT_S, Bench, slowed

MakeBench = Callable[..., Bench]


def _assert_complete(bench: Bench, counts: dict[int, int]) -> None:
    bench.wait_for(lambda: all(seq_id in bench.reasons for seq_id in counts))
    for seq_id, count in counts.items():
        assert (len(bench.tokens[seq_id]), bench.reasons[seq_id]) == (count, "length")


def _occupy(bench: Bench, count: int = 4, max_tokens: int = 400) -> dict[int, int]:
    for seq_id in range(1, count + 1):
        bench.submit(seq_id, max_tokens)
    bench.wait_for(lambda: len(bench.tokens) == count)
    return dict.fromkeys(range(1, count + 1), max_tokens)


def test_streams_go_on_through_levels_and_cache_dtypes(make_bench: MakeBench) -> None:
    bench = make_bench()
    counts = _occupy(bench)
    for setting in (
        {"quantization": "int8", "kv_dtype": "int8"},
        {"quantization": "none", "kv_memory": "2MiB"},
        {"max_sequences": 2},
    ):
        status = bench.apply(**setting)
        assert (status.state, status.mode) == ("done", "beside"), status.detail
        receipt = status.receipt
        assert receipt is not None
        assert receipt.memory is not None
        assert receipt.memory.predicted == receipt.memory.measured
    _assert_complete(bench, counts)
    config = bench.applier.deployment.config
    assert settings_of(config) == {
        "quantization": "none",
        "kv_dtype": "int8",
        "kv_memory": config.kv_memory_bytes,
        "max_model_len": 512,
        "max_sequences": 2,
        "speculation": "off",
    }
    assert bench.applier.deployment.loaded.core.kv_dtype == "int8"


def test_receipts_are_kept_as_json_lines(make_bench: MakeBench, tmp_path: Path) -> None:
    bench = make_bench()
    bench.apply(quantization="int4")
    (line,) = (tmp_path / "receipts.jsonl").read_text().splitlines()
    receipt = json.loads(line)
    assert receipt["outcome"] == "kept"
    assert receipt["after"]["quantization"] == "int4"
    assert receipt["speed"]["measured"] > 0
    assert receipt["speed"]["num_steps"] >= 24, "an idle engine must be probed"


def test_a_full_disk_costs_the_file_of_receipts_alone(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.applier.receipts.path = Path("/dev/full")
    assert bench.apply(max_sequences=4).state == "done"
    (receipt,) = bench.applier.latest_receipts()
    assert receipt.outcome == "kept"


def _fail(*_: Any, **__: Any) -> Deployment:
    raise ConfigError("planted: the file is gone")


@pytest.mark.parametrize("fault", ["build", "self-check", "first step"])
def test_whatever_fails_the_old_state_serves_on(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def broken(*args: Any, **options: Any) -> Deployment:
        made = slowed(deploy(*args, **options), 0.0)
        if fault == "first step":
            step = made.loaded.core.step

            def failing(*sizes: int) -> None:
                if is_checked:
                    raise RuntimeError("planted: the kernel broke")
                step(*sizes)

            made.loaded.core.step = failing  # type: ignore[method-assign]
        return made

    is_checked: list[bool] = []
    self_check = apply_run.self_check

    def checked(*args: Any) -> str | None:
        verdict = self_check(*args)
        is_checked.append(True)
        return verdict

    bench = make_bench(slow_s=0.004, build=_fail if fault == "build" else broken)
    monkeypatch.setattr(apply_run, "self_check", checked)
    if fault == "self-check":
        monkeypatch.setattr(apply_run, "self_check", lambda *args: "its logits are not finite")
    counts = _occupy(bench)
    before = bench.applier.deployment
    status = bench.apply(quantization="int8")
    assert status.state == "failed"
    assert status.receipt is not None
    assert ("planted" in status.detail) != (fault == "self-check")
    assert bench.applier.deployment is before
    assert bench.announced[-1:] in ([], [512])
    _assert_complete(bench, counts)


def test_a_slow_kernel_is_rolled_back(make_bench: MakeBench) -> None:
    def slow(*args: Any, **options: Any) -> Deployment:
        return slowed(deploy(*args, **options), 0.03)

    bench = make_bench(build=slow)
    counts = _occupy(bench, count=2, max_tokens=450)
    before = bench.applier.deployment
    status = bench.apply(measure=True, quantization="int8", auto_rollback=True)
    assert status.state == "rolled_back", status.detail
    receipt = status.receipt
    assert receipt is not None
    assert receipt.speed is not None
    assert receipt.speed.predicted is not None
    assert receipt.speed.measured is not None
    assert receipt.speed.measured < receipt.speed.predicted.low
    assert bench.applier.deployment is before
    _assert_complete(bench, counts)


def test_a_slow_kernel_stays_where_nobody_asked_to_roll_back(make_bench: MakeBench) -> None:
    def slow(*args: Any, **options: Any) -> Deployment:
        return slowed(deploy(*args, **options), 0.03)

    bench = make_bench(build=slow)
    status = bench.apply(measure=True, quantization="int8")
    assert status.state == "done"
    assert status.detail == "measured speed is below the promise"


@pytest.mark.parametrize("turns_slow", [False, True])
def test_what_is_applied_under_load_is_held_to_what_its_core_showed_beforehand(
    make_bench: MakeBench, turns_slow: bool
) -> None:
    serves: list[bool] = []

    def build(*args: Any, **options: Any) -> Deployment:
        made = slowed(deploy(*args, **options), 0.004)
        step = made.loaded.core.step

        def slower(*sizes: int) -> None:
            time.sleep(0.03 if serves and turns_slow else 0.0)
            step(*sizes)

        made.loaded.core.step = slower  # type: ignore[method-assign]
        return made

    bench = make_bench(slow_s=0.004, build=build)
    switch = bench.engine.switch

    def switched(*args: Any, **options: Any) -> Future[None]:
        serves.append(True)
        return switch(*args, **options)

    bench.engine.switch = switched  # type: ignore[method-assign]
    counts = _occupy(bench, max_tokens=450)
    bench.wait_for(lambda: bench.observer.num_steps(0.0) >= 30)
    status = bench.apply(quantization="int8", auto_rollback=turns_slow)
    assert status.state == ("rolled_back" if turns_slow else "done"), status.detail
    assert status.receipt is not None
    speed = status.receipt.speed
    assert speed is not None
    assert speed.basis == "estimated", "nothing was calibrated"
    assert speed.predicted is not None
    assert speed.before is not None
    assert 0.5 < speed.predicted.value / speed.before < 2.0, "both cores take about as long"
    _assert_complete(bench, counts)


@pytest.mark.parametrize("fails", [False, True])
def test_without_room_for_both_the_old_state_goes_first(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    def build(config: EngineConfig, **options: Any) -> Deployment:
        if fails and config.quantization == "int8":
            raise ConfigError("planted: no memory after all")
        return deploy(config, **options)

    _drain_always(monkeypatch)
    bench = make_bench(build=build)
    counts = _occupy(bench)
    status = bench.apply(quantization="int8")
    assert status.mode == "drain"
    assert status.state == ("failed" if fails else "done")
    quantization = bench.applier.deployment.config.quantization
    assert quantization == ("auto" if fails else "int8")
    _assert_complete(bench, counts)


def _drain_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply_run, "available_memory_bytes", lambda: 1)
    monkeypatch.setattr(apply_run, "_DRAIN_S", 0.0)


def test_a_release_that_is_refused_leaves_the_old_state_and_its_length(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(grace_s: float) -> Future[None]:
        refused: Future[None] = Future()
        refused.set_exception(SwitchError("planted: the engine is dead"))
        return refused

    _drain_always(monkeypatch)
    bench = make_bench()
    counts = _occupy(bench)
    before = bench.applier.deployment
    monkeypatch.setattr(bench.engine, "park", refuse)
    status = bench.apply(quantization="int8", max_model_len=128)
    assert (status.state, status.mode) == ("failed", "drain")
    assert "planted" in status.detail
    assert bench.applier.deployment is before
    assert bench.announced == [128, 512]
    assert status.receipt is not None
    assert status.receipt.longest_pause_s is not None
    _assert_complete(bench, counts)


def test_a_release_that_a_stuck_step_holds_up_is_withdrawn(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _drain_always(monkeypatch)
    monkeypatch.setattr(apply_run, "_PARK_TIMEOUT_S", 0.2)
    bench = make_bench(slow_s=0.001)
    counts = _occupy(bench, max_tokens=50)
    may_step = threading.Event()
    core = bench.applier.deployment.loaded.core
    step = core.step
    monkeypatch.setattr(core, "step", lambda *sizes: (may_step.wait(WAIT_S), step(*sizes)))
    time.sleep(0.1)
    status = bench.apply(quantization="int8")
    assert status.state == "failed"
    assert "busy with a step" in status.detail
    may_step.set()
    _assert_complete(bench, counts)  # nobody waits for a core that never comes
    monkeypatch.setattr(apply_run, "_PARK_TIMEOUT_S", 60.0)
    assert bench.apply(quantization="int8").state == "done"


@pytest.mark.parametrize("rolls_back", [False, True])
def test_where_nothing_can_be_built_any_more_everybody_is_told(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, rolls_back: bool
) -> None:
    def build(config: EngineConfig, **options: Any) -> Deployment:
        if rolls_back and config.quantization == "int8":
            return slowed(deploy(config, **options), 0.03)
        raise ConfigError("planted: no memory after all")

    _drain_always(monkeypatch)
    bench = make_bench(build=build)
    counts = _occupy(bench, count=2, max_tokens=450)
    status = bench.apply(measure=rolls_back, quantization="int8", auto_rollback=True)
    assert (status.state, status.mode) == ("failed", "drain"), status.detail
    bench.wait_for(lambda: all(seq_id in bench.reasons for seq_id in counts))
    assert rolls_back or {bench.reasons[seq_id] for seq_id in counts} == {"abort"}
    assert not bench.engine.is_alive()
    assert bench.applier.deployment.measured().components()  # GET /v1/optimizations still answers


def test_drafters_change_at_the_next_step_and_stay_through_other_applies(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(slow_s=0.004)
    counts = _occupy(bench)
    core = bench.applier.deployment.loaded.core
    status = bench.apply(speculation="ngram")
    assert (status.state, status.mode) == ("done", "next_step"), status.detail
    deployment = bench.applier.deployment
    assert deployment.loaded.core is core
    assert deployment.config.speculation == "ngram"
    assert _drafters(bench) == {"ngram"}
    assert status.receipt is not None
    assert status.receipt.speed is not None
    assert status.receipt.speed.num_steps >= 24
    status = bench.apply(quantization="int8")
    assert (status.state, status.mode) == ("done", "beside"), status.detail
    assert _drafters(bench) == {"ngram"}
    status = bench.apply(speculation="off")
    assert (status.state, status.mode) == ("done", "next_step")
    assert _drafters(bench) == set()
    with pytest.raises(ConfigError, match="no multi-token-prediction head"):
        bench.apply(speculation="mtp")
    assert bench.applier.deployment.config.speculation == "off"
    _assert_complete(bench, counts)


def _drafters(bench: Bench) -> set[str]:
    report = bench.engine.speculation().result(10)
    return {drafter.name for drafter in report.drafters if drafter.qualifies}


def test_drafters_that_slow_it_down_are_taken_back(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = make_bench()
    bench.applier.planner.calibration(
        bench.applier.planner.plan(bench.applier.deployment.config), measure=True
    )
    propose = NgramDrafter.propose

    def slow(self: NgramDrafter, *args: Any) -> Any:
        time.sleep(0.03)
        return propose(self, *args)

    monkeypatch.setattr(NgramDrafter, "propose", slow)
    counts = _occupy(bench, count=2, max_tokens=450)
    status = bench.apply(speculation="ngram", auto_rollback=True)
    assert status.state == "rolled_back", status.detail
    assert status.receipt is not None
    assert status.receipt.after["speculation"] == status.receipt.before["speculation"] == "off"
    assert _drafters(bench) == set()
    _assert_complete(bench, counts)


def test_only_one_apply_at_a_time(make_bench: MakeBench) -> None:
    bench = make_bench()
    first = bench.applier.start(ApplyRequest(quantization="int8"), measure=False)
    with pytest.raises(ApplyBusy):
        bench.applier.start(ApplyRequest(quantization="int4"), measure=False)
    bench.applier.wait(60)
    ended = bench.applier.status(first.id)
    assert ended is not None
    assert ended.state == "done"


def test_what_cannot_work_is_refused_at_once(make_bench: MakeBench) -> None:
    bench = make_bench()
    for setting, message in (
        ({"quantization": "int3"}, "choose auto"),
        ({"max_model_len": 100_000}, "made for 512"),
        ({"max_sequences": 4000}, "--max-step-tokens"),
        ({"kv_memory": 1 << 49}, r"more than the .* there are: .*KV int8"),
        ({"kv_memory": 1}, "needs --kv-memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            bench.applier.start(ApplyRequest(**setting), measure=False)  # type: ignore[arg-type]
    assert bench.applier.latest() is None


def test_a_shorter_length_is_announced_before_the_switch(make_bench: MakeBench) -> None:
    bench = make_bench()
    assert bench.apply(max_model_len=128).state == "done"
    assert bench.announced == [128, 128]
    assert bench.apply(max_model_len=256).state == "done"
    assert bench.announced[2:] == [128, 256]
