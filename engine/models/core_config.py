"""The core's form of a spec; the loader makes models of it, the ledger sizes."""

import fulcrum_core

from engine.models.spec import ModelSpec


def core_config(spec: ModelSpec) -> fulcrum_core.Config:
    """The core's form of a spec."""
    config = fulcrum_core.Config()
    config.num_layers = spec.num_layers
    config.hidden_size = spec.hidden_size
    config.intermediate_size = spec.intermediate_size
    config.num_heads = spec.num_heads
    config.num_kv_heads = spec.num_kv_heads
    config.head_dim = spec.head_dim
    config.vocab_size = spec.vocab_size
    config.norm_eps = spec.norm_eps
    config.activation = spec.activation
    config.attention_scale = spec.attention_scale
    config.embedding_scale = spec.embedding_scale
    config.layer_windows = list(spec.layer_windows)
    config.layer_rope_index = list(spec.layer_rope_index)
    config.rope_inv_freq = [list(table) for table in spec.rope_inv_freq]
    config.rope_attention_factor = spec.rope_attention_factor
    return config
