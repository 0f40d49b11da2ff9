"""Tiny random models of every family against transformers: logits at all positions, greedy text."""

from pathlib import Path
from typing import Any

import fulcrum_core
import numpy as np
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.engine.oracle import (  # noqa: E402
    CoreDriver,
    load_unquantized,
    make_checkpoint,
    reference_logits,
    unrounded_isa,
    worst_greedy_gap,
)

NUM_TOKENS = 45  # several KV blocks, and longer than the sliding windows below
VOCAB_SIZE = 307
LOGITS_TOLERANCE = 0.01  # of logits whose standard deviation is about 1.3


def shape(
    heads: int, kv_heads: int, head_dim: int, hidden: int, intermediate: int
) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "num_hidden_layers": 3,
    }


def llama(*sizes: int, **options: Any) -> Any:
    return transformers.LlamaConfig(**shape(*sizes), **options)


def mistral(*sizes: int, **options: Any) -> Any:
    return transformers.MistralConfig(**shape(*sizes), **options)


def qwen2(*sizes: int, **options: Any) -> Any:
    return transformers.Qwen2Config(**shape(*sizes), **options)


def qwen3(*sizes: int, **options: Any) -> Any:
    return transformers.Qwen3Config(**shape(*sizes), **options)


def gemma3(*sizes: int, **options: Any) -> Any:
    return transformers.Gemma3TextConfig(**{**shape(*sizes), "num_hidden_layers": 7, **options})


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 500_000.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3_000.0},
}

# Sizes: heads, KV heads, head size, hidden size, intermediate size.
CONFIGS = {
    "llama: one KV head a head, tied": lambda: llama(4, 4, 16, 64, 97, tie_word_embeddings=True),
    "llama: head size unlike hidden / heads, llama3 rope": lambda: llama(
        4, 2, 32, 72, 130, rope_parameters=LLAMA3_ROPE
    ),
    "llama: one KV head, linear rope": lambda: llama(
        4, 1, 64, 96, 160, rope_parameters=LINEAR_ROPE, rms_norm_eps=1e-4
    ),
    "llama: SmolLM2's group size": lambda: llama(9, 3, 16, 144, 33, tie_word_embeddings=True),
    "mistral: a window shorter than the text": lambda: mistral(4, 2, 16, 64, 96, sliding_window=7),
    "mistral: no window": lambda: mistral(4, 4, 32, 80, 65, sliding_window=None),
    "qwen2: tied": lambda: qwen2(4, 2, 16, 64, 101, tie_word_embeddings=True),
    "qwen2: a window in the upper layers": lambda: qwen2(
        6, 2, 16, 96, 64, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "qwen3: one KV head": lambda: qwen3(4, 1, 32, 80, 100),
    "qwen3: wide heads, tied": lambda: qwen3(4, 4, 64, 48, 77, tie_word_embeddings=True),
    "gemma3: two rope bases": lambda: gemma3(
        4, 1, 32, 48, 90, sliding_window=6, query_pre_attn_scalar=24, rope_parameters=GEMMA_ROPE
    ),
    "gemma3: grouped heads, untied": lambda: gemma3(
        4, 2, 16, 72, 131, sliding_window=17, tie_word_embeddings=False
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(reference, driver) of one configuration."""
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    reference = make_checkpoint(folder, CONFIGS[request.param](), seed=11)
    return reference, make_driver(folder, unrounded_isa())


def make_driver(folder: Path, isa: str) -> CoreDriver:
    loaded = load_unquantized(
        folder, num_threads=1, max_model_len=80, max_sequences=4, max_step_tokens=64, isa=isa
    )
    return CoreDriver(loaded, max_sequences=4, max_len=80, max_tokens=64)


def text(seed: int, num_tokens: int = NUM_TOKENS) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_tokens).tolist()


def test_logits_equal_those_of_transformers(models: Any) -> None:
    """With the reference's cache rounded as the engine's.

    What is left is the order of sums, and the few keys and values that it makes round the other
    way: one step of bf16 each.
    """
    reference, driver = models
    token_ids = text(1)
    expected = reference_logits(reference, token_ids, bf16_cache=True)
    assert expected.std() > 0.5  # else equality would say little
    difference = driver.logits(token_ids, [NUM_TOKENS]) - expected
    assert np.abs(difference).max() < LOGITS_TOLERANCE
    assert np.sqrt((difference**2).mean()) < LOGITS_TOLERANCE / 10


def test_logits_are_close_to_those_of_transformers_without_a_rounded_cache(models: Any) -> None:
    reference, driver = models
    token_ids = text(2)
    expected = reference_logits(reference, token_ids)
    difference = driver.logits(token_ids, [NUM_TOKENS]) - expected
    assert np.sqrt((difference**2).mean()) < 0.01 * expected.std()


@pytest.mark.skipif(
    fulcrum_core.detect_isa() == unrounded_isa(), reason="activations stay as they are here"
)
@pytest.mark.parametrize("name", ["llama: SmolLM2's group size", "gemma3: two rope bases"])
def test_logits_are_close_where_activations_are_rounded_to_bf16(name: str, tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, CONFIGS[name](), seed=11)
    token_ids = text(2)
    expected = reference_logits(reference, token_ids, bf16_cache=True)
    driver = make_driver(tmp_path, fulcrum_core.detect_isa())
    difference = driver.logits(token_ids, [NUM_TOKENS]) - expected
    assert np.sqrt((difference**2).mean()) < 0.03 * expected.std()


@pytest.mark.parametrize("chunks", [[1, 16, 7, 21], [32, 13], [1] * NUM_TOKENS], ids=str)
def test_logits_are_bit_identical_in_any_chunks(models: Any, chunks: list[int]) -> None:
    _, driver = models
    token_ids = text(3)
    whole = driver.logits(token_ids, [NUM_TOKENS])
    assert np.array_equal(driver.logits(token_ids, chunks), whole)


def test_greedy_text_is_that_of_transformers(models: Any) -> None:
    reference, driver = models
    prompts = [text(seed, length) for seed, length in ((4, 3), (5, 20), (6, 1), (7, 33))]
    for prompt, output in zip(prompts, driver.generate(prompts, 24), strict=True):
        expected = reference_logits(reference, prompt + output, bf16_cache=True)
        gap = worst_greedy_gap(expected[len(prompt) - 1 : -1], output)
        assert gap < 2 * LOGITS_TOLERANCE
