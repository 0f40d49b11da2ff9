"""Finds and loads the drafters of a model: called by the loader, after the target is in memory."""

from collections.abc import Mapping
from pathlib import Path

import fulcrum_core

from engine.checkpoint.tensor import StoredTensor
from engine.config import ConfigError, EngineConfig
from engine.models.mtp import find_head, load_module, read_head, target_digest
from engine.models.spec import ModelSpec
from engine.speculation.setup import OFF, Speculation

HEADS = Path(__file__).parent / "heads"
_NO_HEAD = "no multi-token-prediction head was trained for this model"


def load_speculation(
    config: EngineConfig,
    target: fulcrum_core.Model,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    num_kv_blocks: int,
) -> Speculation:
    """Load what `config.speculation` asks for; in auto, what there is.

    Raises ConfigError where a drafter was asked for by name and cannot be had.
    """
    mode = config.speculation
    if mode == "off":
        return OFF
    unavailable: dict[str, str] = {}
    mtp = None
    if mode in ("auto", "mtp"):
        mtp = _load_mtp(config, target, spec, tensors, num_kv_blocks)
        if mtp is None:
            if mode == "mtp":
                raise ConfigError(f"--speculation mtp: {_NO_HEAD}")
            unavailable["mtp"] = _NO_HEAD
    return Speculation(mode=mode, hidden_size=spec.hidden_size, mtp=mtp, unavailable=unavailable)


def _load_mtp(
    config: EngineConfig,
    target: fulcrum_core.Model,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    num_kv_blocks: int,
) -> fulcrum_core.Model | None:
    if config.mtp_head is None:
        found = find_head(HEADS, spec, tensors)
    else:
        found = read_head(Path(config.mtp_head))
        if found[0].target_digest != target_digest(spec, tensors):
            raise ConfigError(
                f"--mtp-head {config.mtp_head}: was trained for {found[0].target}, not for "
                f"{config.model}"
            )
    return None if found is None else load_module(target, spec, tensors, found[1], num_kv_blocks)
