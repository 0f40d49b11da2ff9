"""Finds and loads the drafters of a model: called by the loader, after the target is in memory."""

from collections.abc import Mapping
from pathlib import Path

import fulcrum_core
from msgspec.structs import replace

from engine.checkpoint.tensor import StoredTensor
from engine.config import ConfigError, EngineConfig
from engine.ledger import DrafterMemory, step_bytes
from engine.models.mtp import (
    MtpHead,
    find_head,
    load_module,
    module_config,
    module_weights_bytes,
    read_head,
    target_digest,
)
from engine.models.mtp_layouts import find_module
from engine.models.spec import ModelSpec
from engine.speculation.draft_model import DraftModel
from engine.speculation.setup import HIDDEN_WINDOW, Speculation, hidden_states_bytes

HEADS = Path(__file__).parent / "heads"
_NAMES = ("ngram", "mtp", "draft")
_NO_HEAD = "no multi-token-prediction head was trained for this model"
_NO_DRAFT_MODEL = "no smaller model was given as --draft-model"


def load_speculation(
    config: EngineConfig,
    target: fulcrum_core.Model,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    num_kv_blocks: int,
    draft: DraftModel | None,
) -> Speculation:
    """Load what `config.speculation` asks for, in auto what there is; `draft` is loaded already.

    Raises ConfigError where a drafter was asked for by name and cannot be had.
    """
    mode = config.speculation
    unavailable = {name: f"--speculation {mode}" for name in _NAMES if mode not in ("auto", name)}
    head = choose_head(config, spec, tensors)
    if mode == "auto" and head is None:
        unavailable["mtp"] = _NO_HEAD
    if mode == "auto" and draft is None:
        unavailable["draft"] = _NO_DRAFT_MODEL
    speculation = Speculation(
        mode=mode, draft=draft, num_kv_blocks=num_kv_blocks, unavailable=unavailable
    )
    if head is None:
        return speculation
    return replace(
        speculation,
        hidden_size=spec.hidden_size,
        mtp=load_module(target, spec, tensors, head, num_kv_blocks),
        mtp_acceptance=head.acceptance_by_position,
        mtp_chains_normed=head.chains_normed,
    )


def module_memory(
    config: EngineConfig,
    spec: ModelSpec,
    tensors: Mapping[str, StoredTensor],
    isa: str,
    num_threads: int,
) -> DrafterMemory | None:
    """What a module will allocate, from headers alone; see `Speculation.memory_bytes`."""
    head = choose_head(config, spec, tensors)
    if head is None:
        return None
    shape = module_config(spec, head)
    max_tokens = max(config.max_step_tokens, HIDDEN_WINDOW)
    own_bytes = module_weights_bytes(head, spec, isa)
    own_bytes += hidden_states_bytes(config.max_sequences, spec.hidden_size, head.chains_normed)
    return DrafterMemory(
        lambda length: (
            own_bytes + step_bytes(shape, isa, num_threads, max_tokens, max_model_len=length)
        ),
        lambda dtype: fulcrum_core.kv_block_bytes(shape, dtype),
    )


def choose_head(
    config: EngineConfig, spec: ModelSpec, tensors: Mapping[str, StoredTensor]
) -> MtpHead | None:
    """The head that `config` asks for, or that there is; None where none may draft.

    Raises ConfigError where one was asked for, or is announced by the checkpoint, and cannot be
    had. Where no head may draft, nothing of one is read.
    """
    if config.speculation not in ("auto", "mtp"):
        return None
    if config.mtp_head is None:
        # A head that was made for this model stands in for a module that the files lack.
        found = find_head(HEADS, spec, tensors) or find_module(spec, tensors)
    else:
        head_config, found = read_head(Path(config.mtp_head))
        if head_config.target_digest != target_digest(spec, tensors):
            raise ConfigError(
                f"--mtp-head {config.mtp_head}: was trained for {head_config.target}, not for "
                f"{config.model}"
            )
    if found is None and config.speculation == "mtp":
        raise ConfigError(f"--speculation mtp: {_NO_HEAD}")
    return found
