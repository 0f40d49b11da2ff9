"""The ledger says before loading what the core allocates afterwards, whatever the settings."""

from pathlib import Path

import msgspec
import pytest

from engine.batch import Batch
from engine.config import ConfigError, EngineConfig
from engine.deployment import deploy
from engine.ledger import Ledger, measured_ledger
from engine.loader import load_model, plan_headers, read_headers
from engine.loop import Engine


def _allocated(config: EngineConfig) -> Ledger:
    loaded = load_model(config)
    Batch(
        loaded.core,
        max_sequences=config.max_sequences,
        max_step_tokens=config.max_step_tokens,
        max_model_len=loaded.max_model_len,
        eos_token_ids=frozenset(loaded.eos_token_ids),
    )
    return measured_ledger(loaded.core, loaded.num_kv_blocks)


@pytest.mark.parametrize(
    ("quantization", "kv_dtype", "max_step_tokens", "max_model_len"),
    [("auto", "bf16", 512, None), ("int8", "int8", 64, 1000), ("none", "bf16", 128, 2048)],
)
def test_what_is_planned_from_headers_is_what_is_allocated(
    default_model_path: Path,
    quantization: str,
    kv_dtype: str,
    max_step_tokens: int,
    max_model_len: int | None,
) -> None:
    config = EngineConfig(
        model=str(default_model_path),
        quantization=quantization,  # type: ignore[arg-type]
        kv_dtype=kv_dtype,  # type: ignore[arg-type]
        kv_memory_bytes=100 << 20,
        max_step_tokens=max_step_tokens,
        max_sequences=16,
        max_model_len=max_model_len,
        num_threads=2,
    )
    planned = plan_headers(config, read_headers(config)).ledger
    allocated = _allocated(config)
    assert planned.weights_bytes == allocated.weights_bytes > 50e6
    assert planned.kv_bytes == allocated.kv_bytes > 90e6
    assert planned.activation_bytes == allocated.activation_bytes > 1e6


def test_what_the_drafters_allocate_is_planned_too(default_model_path: Path) -> None:
    config = EngineConfig(
        model=str(default_model_path),
        kv_memory_bytes=50 << 20,
        max_sequences=8,
        max_model_len=1024,
        num_threads=2,
        speculation="auto",
    )
    planned = plan_headers(config, read_headers(config)).ledger
    deployment = deploy(config)
    loaded = deployment.loaded
    engine = Engine(loaded.core, deployment.engine_settings, lambda _: None, loaded.speculation)
    assert planned.draft_bytes == deployment.measured().draft_bytes > 10e6
    engine.stop(0.0)


def test_what_drafters_take_is_not_given_to_the_kv_cache(default_model_path: Path) -> None:
    available = 400 << 20
    auto = EngineConfig(model=str(default_model_path), speculation="auto", max_model_len=1024)
    off = msgspec.structs.replace(auto, speculation="off")
    headers = read_headers(auto)
    plans = [plan_headers(config, headers, available) for config in (auto, off)]
    blocks = [plan.context.num_kv_blocks for plan in plans]
    # The module, and its layer of keys and values beside thirty.
    assert 0.7 * blocks[1] < blocks[0] < blocks[1]
    # All that `off` leaves: with the drafters it is too much, and they are named.
    ledger = plans[1].ledger
    left = available - ledger.weights_bytes - ledger.activation_bytes
    full, given = (msgspec.structs.replace(config, kv_memory_bytes=left) for config in (off, auto))
    plan_headers(full, headers, available)
    with pytest.raises(ConfigError, match="drafters"):
        plan_headers(given, headers, available)
    with pytest.raises(ConfigError, match=r"of drafters are [\d.]+ MiB more than"):
        plan_headers(auto, headers, available - left + (5 << 20))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    default_model_path: Path,
) -> None:
    config = EngineConfig(model=str(default_model_path))
    headers = read_headers(config)
    with pytest.raises(ConfigError, match=r"are [\d.]+ MiB more than the 50.0 MiB available"):
        plan_headers(config, headers, available_bytes=50 << 20)
    ledger = plan_headers(config, headers, available_bytes=400 << 20).ledger
    assert ledger.weights_bytes + ledger.activation_bytes + ledger.kv_bytes <= 400 << 20
