"""Tiny random models in the Hugging Face layout, for tests of what is built around a model."""

from pathlib import Path
from typing import Any

import transformers

from tests.engine.oracle import make_checkpoint

VOCAB_SIZE = 256  # one token for each byte
_CONFIGS = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}


def tiny_config(kind: str = "llama", **options: Any) -> Any:
    """A configuration of transformers; `options` are its own and change single settings."""
    settings = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    return _CONFIGS[kind](**settings | options)


def make_tiny_model(folder: Path, seed: int, **options: Any) -> Path:
    """Save one and return its folder; for `options` see `tiny_config`."""
    make_checkpoint(folder, tiny_config(**options), seed)
    return folder
