"""Rope tables against transformers' own, for every scaling that is supported."""

from typing import Any

import numpy as np
import pytest

from engine.checkpoint.tensor import CheckpointError
from engine.models.rope import divided_table, rope_table
from engine.models.settings import Settings

pytest.importorskip("torch")
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

HEAD_DIM = 64
MAX_POSITION = 4096

PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    "yarn with all its options": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
    "yarn with a given attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.25,
    },
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_are_those_of_transformers(name: str) -> None:
    parameters = PARAMETERS[name]
    config = LlamaConfig(
        hidden_size=HEAD_DIM,
        num_attention_heads=1,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={"rope_theta": 50_000.0, **parameters},
    )
    reference = LlamaRotaryEmbedding(config)
    table = rope_table(HEAD_DIM, 50_000.0, Settings(parameters, "test"), MAX_POSITION)
    np.testing.assert_allclose(table.inv_freq, reference.inv_freq.numpy(), rtol=1e-6)
    assert table.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-12)


def test_the_older_key_of_the_type_is_read() -> None:
    older = Settings({"type": "linear", "factor": 2.0}, "test")
    newer = Settings({"rope_type": "linear", "factor": 2.0}, "test")
    assert rope_table(8, 1e4, older, 64) == rope_table(8, 1e4, newer, 64)


def test_yarn_extends_the_context_by_its_factor() -> None:
    values = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert rope_table(HEAD_DIM, 1e4, Settings(values, "test"), 1024).max_position == 4096


def test_divisors_of_the_file_divide_the_plain_table() -> None:
    factors = np.array([1, 1, 2, 8], dtype=np.float32)
    plain = rope_table(8, 1e4, Settings({}, "test"), 64)
    expected = np.array(plain.inv_freq, np.float32) / factors
    np.testing.assert_allclose(divided_table(8, 1e4, factors).inv_freq, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type dynamic is not supported"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0.0; it must be positive"),
        ({"rope_type": "linear", "factor": "two"}, "factor is 'two', not a number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        rope_table(8, 1e4, Settings(values, "config.json"), 64)
