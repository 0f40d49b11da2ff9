"""What the families share in reading config.json and naming tensors as transformers does."""

from collections.abc import Mapping
from typing import Literal

from engine.models.rope import rope_table
from engine.models.settings import Settings
from engine.models.spec import ModelSpec

TENSOR_NAMES: Mapping[str, str] = {
    "embedding": "model.embed_tokens.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "q": "model.layers.{layer}.self_attn.q_proj.weight",
    "k": "model.layers.{layer}.self_attn.k_proj.weight",
    "v": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention_output": "model.layers.{layer}.self_attn.o_proj.weight",
    "mlp_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
BIAS_NAMES: Mapping[str, str] = {
    "q_bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "k_bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "v_bias": "model.layers.{layer}.self_attn.v_proj.bias",
}
HEAD_NORM_NAMES: Mapping[str, str] = {
    "q_norm": "model.layers.{layer}.self_attn.q_norm.weight",
    "k_norm": "model.layers.{layer}.self_attn.k_norm.weight",
}

# Buffers of old checkpoints that repeat what config.json says, and multi-token-prediction modules,
# which are read apart from the model.
_IGNORED_TENSORS = ("*.rotary_emb.inv_freq", "mtp.*", "model.mtp_layers.*")
# How many modules there are, in DeepSeek-V3's and in Qwen's words.
_MODULE_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")

_ACTIVATIONS: Mapping[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def decoder_spec(config: Settings, family: str, tensor_names: Mapping[str, str]) -> ModelSpec:
    """The spec of a plain decoder: full attention, one rope table. Families replace the rest."""
    _refuse_unsupported(config)
    num_layers = config.count("num_hidden_layers")
    hidden_size = config.count("hidden_size")
    num_heads = config.count("num_attention_heads")
    head_dim = config.count("head_dim", hidden_size // num_heads)
    max_position = config.count("max_position_embeddings")
    parameters = rope_parameters(config)
    theta = parameters.number("rope_theta", config.number("rope_theta", 10_000.0))
    rope = rope_table(head_dim, theta, parameters, max_position)
    bos_ids = config.ids("bos_token_id")
    num_modules = max(config.integer(key, 0) for key in _MODULE_COUNTS)
    module_tensors = (f"model.layers.{num_layers + index}.*" for index in range(num_modules))
    return ModelSpec(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=config.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=config.count("num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=config.count("vocab_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        activation=_activation(config),
        attention_scale=head_dim**-0.5,
        layer_windows=(0,) * num_layers,
        layer_rope_index=(0,) * num_layers,
        rope_inv_freq=(rope.inv_freq,),
        rope_attention_factor=rope.attention_factor,
        max_position=rope.max_position or max_position,
        bos_token_id=bos_ids[0] if bos_ids else None,
        eos_token_ids=config.ids("eos_token_id"),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        tensor_names=tensor_names,
        ignored_tensors=(*_IGNORED_TENSORS, *module_tensors),
        num_announced_modules=num_modules,
    )


def rope_parameters(config: Settings) -> Settings:
    """The rope settings under their newer or older key; empty where there is no scaling."""
    return config.section("rope_parameters" if config.has("rope_parameters") else "rope_scaling")


def windows_of_types(config: Settings, num_layers: int, window: int) -> tuple[int, ...] | None:
    """Windows as config.json's `layer_types` say, or None where it has none."""
    types = config.items("layer_types")
    if types is None:
        return None
    known = {"full_attention": 0, "sliding_attention": window}
    if len(types) != num_layers or not all(name in known for name in types):
        raise config.error(
            "layer_types",
            f"must name {' or '.join(known)} for each of the {num_layers} layers",
        )
    return tuple(known[name] for name in types)


def qwen_windows(config: Settings, num_layers: int) -> tuple[int, ...]:
    """Windows of the Qwen models: off unless use_sliding_window, and then in the upper layers."""
    if not config.flag("use_sliding_window", False):
        return (0,) * num_layers
    window = config.count("sliding_window", 4096)
    by_type = windows_of_types(config, num_layers, window)
    if by_type is not None:
        return by_type
    first = config.integer("max_window_layers", 28)
    return tuple(window if layer >= first else 0 for layer in range(num_layers))


def _activation(config: Settings) -> Literal["silu", "gelu_tanh"]:
    name = config.text("hidden_act", "silu")
    if name not in _ACTIVATIONS:
        raise config.error(
            "hidden_act", f"{name} is not supported; known: {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]


def _refuse_unsupported(config: Settings) -> None:
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        if config.flag(key, False):
            raise config.error(key, "is true; this is not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if config.has(key):
            raise config.error(key, "is set; this is not supported")
    if config.number("partial_rotary_factor", 1.0) != 1.0:
        raise config.error("partial_rotary_factor", "other than 1 is not supported")
    if config.has("quantization_config"):
        method = config.section("quantization_config").text("quant_method", "unnamed")
        raise config.error(
            "quantization_config",
            f"says that the weights are quantized ({method}); take an unquantized or GGUF one",
        )
