"""How far a setting's answers are from the reference: the same weights in bf16 with a bf16 cache.

KL divergence and agreement of the most probable token over a fixed text, both measured by the
core itself, in a process of the lowest priority; results are kept in the cache folder. What was
not measured is estimated from parts that were, or unknown: a figure is never made up.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.batch import Core
from engine.checkpoint.cache import cache_folder
from engine.config import ConfigError, EngineConfig
from engine.loader import LoadedModel, load_model
from engine.planning.core_probe import CoreProbe
from engine.planning.quality_text import TEXT

_VERSION = 1  # of the text and of how it is measured
_MAX_TOKENS = 768
_CHUNK = 64  # rows whose logits are held at a time


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """Distance from the reference; figures are None where the basis is unknown."""

    basis: Literal["measured", "estimated", "unknown"]
    kl_divergence: float | None = None  # nats per token, reference to setting
    top1_agreement: float | None = None  # share of tokens
    num_tokens: int = 0
    note: str = ""


class QualityKey(msgspec.Struct, frozen=True):
    """What quality depends on: the files, the formats made of them, and the cache's dtype."""

    model: str  # digest of the headers
    formats: str  # digest of the formats
    kv_dtype: str

    @property
    def path(self) -> Path:
        name = f"{self.model}-{self.formats}-{self.kv_dtype}.json"
        return cache_folder() / "quality" / name


def known_quality(key: QualityKey) -> Quality | None:
    """What has been measured of exactly this setting."""
    try:
        return msgspec.json.decode(key.path.read_bytes(), type=Quality)
    except (OSError, msgspec.DecodeError):
        return None


def quality_of(key: QualityKey, reference_formats: str) -> Quality:
    """Measured, else added up from the measured parts, else unknown."""
    measured = known_quality(key)
    if measured is not None:
        return measured
    if key.kv_dtype == "bf16" and key.formats == reference_formats:
        return Quality(
            basis="measured", kl_divergence=0.0, top1_agreement=1.0, note="this is the reference"
        )
    weights = known_quality(msgspec.structs.replace(key, kv_dtype="bf16"))
    cache = known_quality(msgspec.structs.replace(key, formats=reference_formats))
    if weights is None or cache is None or weights.kl_divergence is None:
        return Quality(basis="unknown", note="not measured yet")
    assert cache.kl_divergence is not None
    assert weights.top1_agreement is not None
    assert cache.top1_agreement is not None
    return Quality(
        basis="estimated",
        kl_divergence=weights.kl_divergence + cache.kl_divergence,
        top1_agreement=max(0.0, weights.top1_agreement + cache.top1_agreement - 1),
        note="sum of the weights' and the cache's measured parts",
    )


def text_digest() -> str:
    """Identifies the text and the method, as a part of the keys."""
    return hashlib.sha256(f"{_VERSION}/{_MAX_TOKENS}/{TEXT}".encode()).hexdigest()


def compare(reference: LoadedModel, setting: LoadedModel) -> Quality:
    """Measure both models on the text, a chunk at a time. They serve nothing else meanwhile."""
    ids = reference.tokenizer.encode(TEXT, add_bos=True, parse_special=False)
    ids = ids[: min(_MAX_TOKENS, reference.max_model_len, setting.max_model_len)]
    probes = [_probe(model.core, model, len(ids)) for model in (reference, setting)]
    divergences: list[NDArray[np.float64]] = []
    num_agreeing = 0
    for begin in range(0, len(ids), _CHUNK):
        chunk = ids[begin : begin + _CHUNK]
        expected, actual = (probe.logits(begin, chunk) for probe in probes)
        num_agreeing += int((expected.argmax(axis=1) == actual.argmax(axis=1)).sum())
        divergences.append(_kl_divergence(expected, actual))
    kl = np.concatenate(divergences)
    if not np.isfinite(kl).all():
        raise ArithmeticError("the model gives logits that are not finite")
    return Quality(
        basis="measured",
        kl_divergence=float(kl.mean()),
        top1_agreement=num_agreeing / len(ids),
        num_tokens=len(ids),
    )


class QualityMeasurer:
    """Starts one measuring process at a time; the control plane polls it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._failed: set[QualityKey] = set()
        self._key: QualityKey | None = None

    @property
    def is_busy(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def request(self, key: QualityKey, config: EngineConfig) -> bool:
        """Measure in the background, unless it is known, has failed, or another one runs."""
        if self.is_busy or known_quality(key) is not None:
            return False
        if self._process is not None and self._key is not None and self._process.returncode:
            self._failed.add(self._key)
        if key in self._failed:
            return False
        self._key = key
        command = [sys.executable, "-m", "engine.planning.quality", "--model", config.model]
        command += ["--quantization", config.quantization, "--kv-dtype", key.kv_dtype]
        command += ["--path", str(key.path)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        return True

    def stop(self) -> None:
        """End the process, if one runs."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)


def measure(config: EngineConfig, path: Path) -> Quality:
    """Load reference and setting, compare them, and keep the result at `path`."""
    small = msgspec.structs.replace(
        config,
        kv_memory_bytes=None,
        max_model_len=_MAX_TOKENS + 1,
        max_sequences=1,
        max_step_tokens=_CHUNK,
        num_threads=1,
    )
    setting = load_model(_within_model(small))
    reference = load_model(
        _within_model(msgspec.structs.replace(small, quantization="none", kv_dtype="bf16"))
    )
    quality = compare(reference, setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_bytes(msgspec.json.encode(quality))
    scratch.replace(path)
    return quality


def _within_model(config: EngineConfig) -> EngineConfig:
    """A model that was made for less than the text is measured on what it was made for."""
    from engine.loader import read_headers

    longest = read_headers(config).checkpoint.spec.max_position
    assert config.max_model_len is not None
    return msgspec.structs.replace(config, max_model_len=min(config.max_model_len, longest))


def _probe(core: Core, model: LoadedModel, num_tokens: int) -> CoreProbe:
    return CoreProbe(core, model.spec.vocab_size, max_tokens=num_tokens, max_rows=_CHUNK)


def _kl_divergence(expected: NDArray[Any], actual: NDArray[Any]) -> NDArray[np.float64]:
    """Per row, sum of p (log p - log q); both are logits (R, V)."""
    log_expected, log_actual = _log_softmax(expected), _log_softmax(actual)
    kl: NDArray[np.float64] = (np.exp(log_expected) * (log_expected - log_actual)).sum(axis=1)
    return kl


def _log_softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Measure one setting at the lowest priority; for `QualityMeasurer`."""
    parser = argparse.ArgumentParser(prog="python -m engine.planning.quality")
    for name in ("--model", "--quantization", "--kv-dtype"):
        parser.add_argument(name, required=True)
    parser.add_argument("--path", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.nice(19)
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    try:
        measure(
            EngineConfig(
                model=options.model,
                quantization=options.quantization,
                kv_dtype=options.kv_dtype,
            ),
            options.path,
        )
    except (ConfigError, ArithmeticError, OSError) as error:
        print(f"engine.planning.quality: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
