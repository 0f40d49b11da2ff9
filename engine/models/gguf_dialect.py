"""What the families share in reading GGUF metadata and naming tensors as llama.cpp does."""

from collections.abc import Mapping
from typing import Literal

from engine.checkpoint.tensor import CheckpointError, StoredTensor
from engine.models.rope import RopeTable, divided_table, rope_table
from engine.models.settings import Settings
from engine.models.spec import ModelSpec

TENSOR_NAMES: Mapping[str, str] = {
    "embedding": "token_embd.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "q": "blk.{layer}.attn_q.weight",
    "k": "blk.{layer}.attn_k.weight",
    "v": "blk.{layer}.attn_v.weight",
    "attention_output": "blk.{layer}.attn_output.weight",
    "mlp_norm": "blk.{layer}.ffn_norm.weight",
    "gate": "blk.{layer}.ffn_gate.weight",
    "up": "blk.{layer}.ffn_up.weight",
    "down": "blk.{layer}.ffn_down.weight",
    "final_norm": "output_norm.weight",
    "output": "output.weight",
}
BIAS_NAMES: Mapping[str, str] = {
    "q_bias": "blk.{layer}.attn_q.bias",
    "k_bias": "blk.{layer}.attn_k.bias",
    "v_bias": "blk.{layer}.attn_v.bias",
}
HEAD_NORM_NAMES: Mapping[str, str] = {
    "q_norm": "blk.{layer}.attn_q_norm.weight",
    "k_norm": "blk.{layer}.attn_k_norm.weight",
}

# llama3's rope scaling lies in the file as divisors of the frequencies; decoder_spec applies them.
_ROPE_FACTORS = "rope_freqs.weight"
_ID_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def decoder_spec(
    metadata: Settings,
    tensors: Mapping[str, StoredTensor],
    family: str,
    tensor_names: Mapping[str, str],
    activation: Literal["silu", "gelu_tanh"] = "silu",
) -> ModelSpec:
    """The spec of a plain decoder: full attention, one rope table. Families replace the rest."""
    shape = metadata.prefixed(metadata.text("general.architecture") + ".")
    tokens = metadata.prefixed("tokenizer.ggml.")
    num_layers = shape.count("block_count")
    hidden_size = shape.count("embedding_length")
    num_heads = _same_in_all_layers(shape, "attention.head_count")
    num_kv_heads = _same_in_all_layers(shape, "attention.head_count_kv", num_heads)
    head_dim = shape.count("attention.key_length", hidden_size // num_heads)
    _refuse_unsupported(shape, head_dim)
    max_position = shape.count("context_length")
    rope = _rope(shape, tensors, head_dim, max_position)
    bos_ids = tokens.ids("bos_token_id")
    return ModelSpec(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=_same_in_all_layers(shape, "feed_forward_length"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=_vocab_size(metadata, tensors, tensor_names["embedding"]),
        norm_eps=shape.number("attention.layer_norm_rms_epsilon"),
        activation=activation,
        attention_scale=shape.number("attention.scale", head_dim**-0.5),
        layer_windows=(0,) * num_layers,
        layer_rope_index=(0,) * num_layers,
        rope_inv_freq=(rope.inv_freq,),
        rope_attention_factor=rope.attention_factor,
        max_position=rope.max_position or max_position,
        bos_token_id=bos_ids[0] if bos_ids else None,
        eos_token_ids=tuple(dict.fromkeys(id for key in _ID_KEYS for id in tokens.ids(key))),
        tied_embeddings=tensor_names["output"] not in tensors,
        tensor_names=tensor_names,
        ignored_tensors=(_ROPE_FACTORS,),
    )


def _rope(
    shape: Settings, tensors: Mapping[str, StoredTensor], head_dim: int, max_position: int
) -> RopeTable:
    theta = shape.number("rope.freq_base", 10_000.0)
    rope_type = shape.text("rope.scaling.type", "none")
    factors = tensors.get(_ROPE_FACTORS)
    if factors is not None:
        if rope_type != "none" or factors.shape != (head_dim // 2,):
            raise CheckpointError(
                f"{factors.path}: tensor {_ROPE_FACTORS} has shape {factors.shape} beside rope "
                f"scaling {rope_type}; expected {(head_dim // 2,)} and none"
            )
        return divided_table(head_dim, theta, factors.floats())
    keys = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "yarn_beta_fast": "beta_fast",
        "yarn_beta_slow": "beta_slow",
    }
    values = {
        name: shape.number(f"rope.scaling.{key}")
        for key, name in keys.items()
        if shape.has(f"rope.scaling.{key}")
    }
    if rope_type == "none" and shape.has("rope.scale_linear"):  # the key of older converters
        rope_type, values = "linear", {"factor": shape.number("rope.scale_linear")}
    parameters = Settings(
        {"rope_type": "default" if rope_type == "none" else rope_type, **values}, shape.source
    )
    return rope_table(head_dim, theta, parameters, max_position)


def _same_in_all_layers(shape: Settings, key: str, default: int | None = None) -> int:
    # Newer converters may write one number a layer.
    values = shape.raw(key)
    if not isinstance(values, list):
        return shape.count(key, default)
    if not values or any(value != values[0] for value in values):
        raise shape.error(key, "differs between layers; this is not supported")
    return shape.replaced(**{key: values[0]}).count(key)


def _refuse_unsupported(shape: Settings, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        if shape.integer(key, head_dim) != head_dim:
            raise shape.error(key, f"differs from the head size {head_dim}; this is not supported")
    if shape.integer("expert_count", 0):
        raise shape.error("expert_count", "is set: mixtures of experts are not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if shape.number(key, 0.0):
            raise shape.error(key, "is set; this is not supported")


def _vocab_size(metadata: Settings, tensors: Mapping[str, StoredTensor], name: str) -> int:
    if name not in tensors:
        raise CheckpointError(f"{metadata.source}: tensor {name} is missing")
    return tensors[name].shape[0]
