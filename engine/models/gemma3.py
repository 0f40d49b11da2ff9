"""The Gemma 3 family, text only: sliding windows in most layers with a rope base of their own,
four norms a block, norms over the heads of q and k, scaled embeddings."""

import math
from collections.abc import Mapping

from msgspec.structs import replace

from engine.checkpoint.tensor import StoredTensor
from engine.models import gguf_dialect, hf_dialect
from engine.models.rope import rope_table
from engine.models.settings import Settings
from engine.models.spec import Family, ModelSpec

_LOCAL_ROPE_THETA = 10_000.0
_WINDOW_PATTERN = 6  # every sixth layer sees all tokens

# config.json of the larger models leaves out what transformers has as default.
_CONFIG_DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

_HF_NAMES = {
    **hf_dialect.TENSOR_NAMES,
    **hf_dialect.HEAD_NORM_NAMES,
    "attention_post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
    "mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
}
_GGUF_NAMES = {
    **gguf_dialect.TENSOR_NAMES,
    **gguf_dialect.HEAD_NORM_NAMES,
    "attention_post_norm": "blk.{layer}.post_attention_norm.weight",
    "mlp_post_norm": "blk.{layer}.post_ffw_norm.weight",
}

# Where the text model lies in a checkpoint that also sees images: old and new layout.
_TEXT_PREFIXES = {"language_model.model.": "language_model.", "model.language_model.": ""}
_IMAGE_TENSORS = (
    "vision_tower.*",
    "multi_modal_projector.*",
    "model.vision_tower.*",
    "model.multi_modal_projector.*",
)


def _spec_from_config(config: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    if config.has("text_config"):
        ids = {key: config.raw(key) for key in ("bos_token_id", "eos_token_id")}
        config = config.section("text_config").with_defaults(ids)
    config = config.with_defaults(_CONFIG_DEFAULTS)
    config = config.replaced(hidden_act=config.text("hidden_activation", "gelu_pytorch_tanh"))
    parameters = hf_dialect.rope_parameters(config)
    # Newer files nest the parameters by kind of layer; older ones scale the global layers only.
    is_nested = "full_attention" in parameters or "sliding_attention" in parameters
    whole = parameters.section("full_attention") if is_nested else parameters
    sliding = parameters.section("sliding_attention") if is_nested else Settings({}, config.source)
    theta = whole.number("rope_theta", config.number("rope_theta", 1_000_000.0))
    local_theta = sliding.number(
        "rope_theta", config.number("rope_local_base_freq", _LOCAL_ROPE_THETA)
    )
    spec = hf_dialect.decoder_spec(
        config.replaced(rope_parameters=None, rope_scaling=None), FAMILY.name, _names(tensors)
    )
    whole_rope = rope_table(spec.head_dim, theta, whole, spec.max_position)
    local_rope = rope_table(spec.head_dim, local_theta, sliding, spec.max_position)
    for rope, kind in ((whole_rope, whole), (local_rope, sliding)):
        if rope.attention_factor != 1.0:
            raise kind.error("rope_type", "with an attention factor is not supported for Gemma 3")
    window = config.count("sliding_window")
    windows = hf_dialect.windows_of_types(config, spec.num_layers, window) or _windows(
        spec.num_layers, window, config.count("sliding_window_pattern", _WINDOW_PATTERN)
    )
    return replace(
        _gemma_spec(spec, windows, whole_rope.inv_freq, local_rope.inv_freq),
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        norm_offset=1.0,  # the files hold w, the model multiplies by 1 + w
        ignored_tensors=spec.ignored_tensors + _IMAGE_TENSORS,
    )


def _spec_from_gguf(metadata: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    spec = gguf_dialect.decoder_spec(metadata, tensors, FAMILY.name, _GGUF_NAMES, "gelu_tanh")
    shape = metadata.prefixed("gemma3.")
    window = shape.integer("attention.sliding_window", 0)
    pattern = shape.raw("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != spec.num_layers:
            raise shape.error("attention.sliding_window_pattern", "has not one entry a layer")
        windows = tuple(window if is_sliding else 0 for is_sliding in pattern)
    else:
        period = shape.count("attention.sliding_window_pattern", _WINDOW_PATTERN)
        windows = _windows(spec.num_layers, window, period)
    local_theta = shape.number("rope.freq_base_swa", _LOCAL_ROPE_THETA)
    plain = Settings({}, shape.source)
    local_rope = rope_table(spec.head_dim, local_theta, plain, spec.max_position)
    # The converter has already added 1 to the norms.
    spec = _gemma_spec(spec, windows, spec.rope_inv_freq[0], local_rope.inv_freq)
    if not shape.has("attention.scale") and spec.num_layers == 62:
        # The 27B model alone scales by hidden size / heads, and the file does not say so.
        scale = (spec.hidden_size / spec.num_heads) ** -0.5
        return replace(spec, attention_scale=scale)
    return spec


def _gemma_spec(
    spec: ModelSpec,
    windows: tuple[int, ...],
    inv_freq: tuple[float, ...],
    local_inv_freq: tuple[float, ...],
) -> ModelSpec:
    return replace(
        spec,
        embedding_scale=math.sqrt(spec.hidden_size),
        layer_windows=windows,
        layer_rope_index=tuple(1 if window else 0 for window in windows),
        rope_inv_freq=(inv_freq, local_inv_freq),
    )


def _windows(num_layers: int, window: int, period: int) -> tuple[int, ...]:
    return tuple(window if (layer + 1) % period else 0 for layer in range(num_layers))


def _names(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    for prefix, head_prefix in _TEXT_PREFIXES.items():
        if prefix + "embed_tokens.weight" in tensors:
            names = {slot: prefix + name.removeprefix("model.") for slot, name in _HF_NAMES.items()}
            return names | {"output": head_prefix + _HF_NAMES["output"]}
    return _HF_NAMES


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    model_types=("gemma3_text", "gemma3"),
    gguf_architectures=("gemma3",),
    spec_from_config=_spec_from_config,
    spec_from_gguf=_spec_from_gguf,
)
