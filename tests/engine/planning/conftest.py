"""A tiny model, and an applier with an engine over it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.config import EngineConfig
from engine.deployment import Deployment, deploy
from engine.loader import read_headers
from engine.loop import Engine
from engine.planning.applier import Applier
from engine.planning.apply_types import ApplyRequest, Status
from engine.planning.observer import Observer
from engine.planning.preview import Planner
from engine.planning.receipts import ReceiptLog
from engine.types import SamplingParams, StepReport, Submit
from tests.engine.tiny_model import make_tiny_model

WAIT_S = 60.0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("tiny-model")
    return make_tiny_model(folder, seed=1, head_dim=32, vocab_size=257, tie_word_embeddings=False)


@pytest.fixture
def config(tiny: Path) -> EngineConfig:
    return EngineConfig(
        model=str(tiny),
        num_threads=1,
        max_sequences=8,
        kv_memory_bytes=4 << 20,
        speculation="off",
    )


class Bench:
    """An engine that serves, its applier, and the tokens that come out."""

    def __init__(
        self, config: EngineConfig, log: Path, *, slow_s: float = 0.0, **options: Any
    ) -> None:
        """`slow_s` is added to the first core's steps, so that its streams outlive an apply."""
        deployment = slowed(deploy(config), slow_s) if slow_s else deploy(config)
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.announced: list[int] = []
        self.observer = Observer()
        self.applier = Applier(
            Planner(read_headers(config)),
            deployment,
            ReceiptLog(log),
            observer=self.observer,
            on_change=lambda deployment, length: self.announced.append(length),
            **options,
        )
        self.engine = Engine(
            deployment.loaded.core,
            deployment.engine_settings,
            self._on_report,
            deployment.loaded.speculation,
        )
        self.applier.attach(self.engine)
        self.engine.start()

    def _on_report(self, report: StepReport) -> None:
        self.observer.observe(report)
        for event in report.events:
            self.tokens.setdefault(event.seq_id, []).extend(event.token_ids)
            if event.finish_reason:
                assert event.seq_id not in self.reasons, "a sequence ended twice"
                self.reasons[event.seq_id] = event.finish_reason

    def submit(self, seq_id: int, max_tokens: int) -> None:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=seq_id)
        ids = tuple(range(1, 10 + seq_id))
        self.engine.submit(Submit(seq_id, ids, params, time.monotonic()))

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline_s, "waited in vain"
            time.sleep(0.002)

    def apply(self, *, measure: bool = False, **setting: Any) -> Status:
        """Apply and wait for the end."""
        status = self.applier.start(ApplyRequest(**setting), measure=measure)
        self.applier.wait(WAIT_S)
        ended = self.applier.status(status.id)
        assert ended is not None
        assert ended.has_ended, ended
        return ended


@pytest.fixture
def make_bench(config: EngineConfig, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def make(**options: Any) -> Bench:
        benches.append(Bench(config, tmp_path / "receipts.jsonl", **options))
        return benches[-1]

    yield make
    for bench in benches:
        bench.applier.wait(WAIT_S)
        bench.engine.stop(0.0)


def slowed(deployment: Deployment, seconds: float) -> Deployment:
    """The same with a core whose every step takes longer: the planted slow kernel."""
    from msgspec.structs import replace

    class SlowCore:
        def __init__(self, core: Any) -> None:
            self._core = core

        def __getattr__(self, name: str) -> Any:
            return getattr(self._core, name)

        def step(self, *sizes: int) -> None:
            time.sleep(seconds)
            self._core.step(*sizes)

    return replace(
        deployment, loaded=replace(deployment.loaded, core=SlowCore(deployment.loaded.core))
    )
