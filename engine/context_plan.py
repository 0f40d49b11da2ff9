"""How long a sequence may get, how many KV blocks there are and in which dtype: from the settings,
the model and the memory that is left. The loader calls it.
"""

from collections.abc import Callable

import msgspec

from engine.config import ConfigError, EngineConfig, KvDtype

# Longer contexts are for the user to ask for: their KV cache is what the memory goes to.
_DEFAULT_MAX_MODEL_LEN = 8192
_MAX_DEFAULT_KV_BYTES = 1 << 30
# What text of ended requests may keep unless told otherwise; more where the weights are larger, so
# that a model's users can share prompts of a length that fits the model.
_MIN_PREFIX_CACHE_BYTES = 256 << 20
_DEFAULT_KV_SHARE = 4  # at most 1/4 of the available memory


class ContextPlan(msgspec.Struct, frozen=True):
    """What was chosen, each with its reason for the start-up table."""

    kv_dtype: KvDtype
    kv_dtype_reason: str
    max_model_len: int
    max_model_len_reason: str
    num_kv_blocks: int
    num_blocks_reason: str
    num_kept_blocks: int  # that text which nobody holds may keep


def plan_context(
    config: EngineConfig,
    max_position: int,
    block_size: int,
    block_bytes_of: Callable[[KvDtype], int],
    available_bytes: int,
    weights_bytes: int,
    draft_block_bytes_of: Callable[[KvDtype], int] = lambda dtype: 0,
) -> ContextPlan:
    """Choose the context length, the KV dtype and the number of KV blocks.

    `max_position` is the model's own limit in tokens, `available_bytes` what the weights leave;
    with each block of the cache go those of the drafters, of `draft_block_bytes_of` together.
    What the user asked for is kept or refused with a ConfigError; defaults give way to what the
    memory holds.
    """
    max_model_len, len_reason = wanted_model_len(config, max_position)
    needed = -(-max_model_len // block_size)
    kv_dtype, dtype_reason = _kv_dtype(config, needed, block_bytes_of)
    block_bytes = block_bytes_of(kv_dtype)
    draft_block_bytes = draft_block_bytes_of(kv_dtype)
    num_blocks, blocks_reason = _wanted_blocks(
        config, needed, block_bytes, draft_block_bytes, available_bytes
    )
    if num_blocks < needed:
        if config.max_model_len is not None or num_blocks == 0:
            raise ConfigError(
                f"the KV cache ({blocks_reason}) holds {num_blocks * block_size} tokens; one "
                f"sequence of {max_model_len} needs --kv-memory {needed * block_bytes} (bytes), "
                "or set a lower --max-model-len"
            )
        max_model_len = num_blocks * block_size
        len_reason = "what the KV cache holds"
    return ContextPlan(
        kv_dtype=kv_dtype,
        kv_dtype_reason=dtype_reason,
        max_model_len=max_model_len,
        max_model_len_reason=len_reason,
        num_kv_blocks=num_blocks,
        num_blocks_reason=blocks_reason,
        num_kept_blocks=_kept_blocks(config, num_blocks, block_bytes, weights_bytes),
    )


def _kept_blocks(
    config: EngineConfig, num_blocks: int, block_bytes: int, weights_bytes: int
) -> int:
    kept_bytes = config.prefix_cache_bytes
    if kept_bytes is None:
        if config.kv_memory_bytes is not None:
            return num_blocks
        kept_bytes = max(_MIN_PREFIX_CACHE_BYTES, weights_bytes)
    return min(num_blocks, kept_bytes // block_bytes)


def _kv_dtype(
    config: EngineConfig, needed_blocks: int, block_bytes_of: Callable[[KvDtype], int]
) -> tuple[KvDtype, str]:
    if config.kv_dtype != "auto":
        return config.kv_dtype, "--kv-dtype"
    given = config.kv_memory_bytes
    if given is not None:
        bf16_bytes, int8_bytes = (needed_blocks * block_bytes_of(d) for d in ("bf16", "int8"))
        if int8_bytes <= given < bf16_bytes:
            return "int8", "--kv-memory is too small for a sequence of full length in bf16"
    return "bf16", "lossless by default"


def wanted_model_len(config: EngineConfig, own: int) -> tuple[int, str]:
    """The length that is asked for, before memory has a say, and why; `own` is the model's."""
    if config.max_model_len is None:
        if own <= _DEFAULT_MAX_MODEL_LEN:
            return own, "the model's own"
        return _DEFAULT_MAX_MODEL_LEN, f"default; --max-model-len allows the model's own {own}"
    if config.max_model_len > own:
        raise ConfigError(f"--max-model-len {config.max_model_len}: the model was made for {own}")
    return config.max_model_len, "--max-model-len"


def _wanted_blocks(
    config: EngineConfig, full_length: int, block_bytes: int, draft_block_bytes: int, available: int
) -> tuple[int, str]:
    """Blocks of the target's cache, of which a sequence of full length takes `full_length`."""
    all_bytes = block_bytes + draft_block_bytes
    if config.kv_memory_bytes is not None:
        num_blocks = config.kv_memory_bytes // block_bytes
        draft_bytes = num_blocks * draft_block_bytes
        if config.kv_memory_bytes + draft_bytes > available:
            beside = f" and the drafters' {draft_bytes} beside it" if draft_bytes else ""
            raise ConfigError(
                f"--kv-memory {config.kv_memory_bytes}{beside}: only {available} bytes are "
                "available"
            )
        return num_blocks, "--kv-memory"
    full = config.max_sequences * full_length
    share = available // _DEFAULT_KV_SHARE
    limit = min(share, _MAX_DEFAULT_KV_BYTES)
    if full * all_bytes <= limit:
        return full, f"{config.max_sequences} sequences of full length"
    limit_reason = "1 GiB" if limit == _MAX_DEFAULT_KV_BYTES else "a quarter of available memory"
    return limit // all_bytes, f"default limit, {limit_reason}; --kv-memory sets it"
