"""Norm, gate, rotation and paged attention: every instruction set against float64, and exactly
the same result of a row whatever shares its tile."""

import os
import platform
import re
from pathlib import Path

import fulcrum_core as core
import numpy as np
import pytest

ISAS = core.isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if ISAS.index(request.param) > ISAS.index(core.detect_isa()):
        pytest.skip(f"this machine has no {request.param}")
    return str(request.param)


@pytest.fixture(params=["bf16", "int8"])
def kv_dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("size", [1, 3, 16, 31, 576, 640])
def test_rms_norm_equals_float64(isa: str, size: int) -> None:
    rng = np.random.default_rng(size)
    x = rng.normal(size=size).astype(np.float32) * 10
    weight = rng.normal(size=size).astype(np.float32)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2) + 1e-5) * weight
    np.testing.assert_allclose(core.rms_norm(isa, x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_zeros_is_zero(isa: str) -> None:
    out = core.rms_norm(isa, np.zeros(40, np.float32), np.ones(40, np.float32), 1e-6)
    assert (out == 0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gate_equals_float64_over_its_whole_range(isa: str, activation: str) -> None:
    x = np.concatenate([np.linspace(-120, 120, 4001), np.linspace(-2, 2, 1000), [0.0, 1e-30]])
    up = np.random.default_rng(0).normal(size=x.size)
    if activation == "silu":
        expected = x / (1 + np.exp(-x)) * up
    else:
        expected = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * up
    got = core.gate(isa, activation, x.astype(np.float32), up.astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 128, 256])
def test_rotate_turns_channel_pairs_half_a_head_apart(isa: str, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    head = rng.normal(size=head_dim).astype(np.float32)
    angle = rng.uniform(0, 100, size=head_dim // 2)
    low, high = head[: head_dim // 2], head[head_dim // 2 :]
    expected = np.concatenate(
        [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)]
    )
    got = core.rotate(isa, head, np.cos(angle), np.sin(angle))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def to_int8(x: np.ndarray) -> np.ndarray:
    """What an int8 cache gives back of keys or values (S, KH, HD): a scale per token and head."""
    largest = np.abs(x).max(axis=-1, keepdims=True)
    quants = np.rint(x * (np.float32(127) / largest))
    return quants.astype(np.float64) * (largest / np.float32(127))


def assert_is_attention(
    got: np.ndarray,
    isa: str,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    window: int,
    kv_dtype: str,
    rtol: float = 1e-4,
) -> None:
    """Hold `got` against float64. AVX-512 rounds queries and probabilities: over bf16, where it has
    pairs of them, to bf16; over int8 to integers of 16 bits, relative to the largest of their row.
    """
    rounding, sizes = 0.0, np.abs(v)
    if isa in ("avx512-bf16", "amx") and kv_dtype == "bf16":
        q, rounding = to_bf16(q), 2.0**-8  # each probability by that of itself at most
    elif (isa.startswith("avx512") or isa == "amx") and kv_dtype == "int8":
        rounding, sizes = 2.0**-11, np.broadcast_to(sizes.max(axis=-1, keepdims=True), v.shape)
    expected = reference_attention(q, k, v, window, kv_dtype)
    allowed = rtol * np.abs(expected) + 1e-5
    if rounding > 0:
        allowed = allowed + rounding * reference_attention(q, k, sizes, window, kv_dtype)
    assert (np.abs(got - expected) <= allowed).all()


def reference_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int, kv_dtype: str
) -> np.ndarray:
    num_queries, num_heads, _ = q.shape
    length, num_kv_heads, _ = k.shape
    store = to_bf16 if kv_dtype == "bf16" else to_int8
    k, v = store(k).astype(np.float64), store(v).astype(np.float64)
    out = np.zeros(q.shape)
    for t in range(num_queries):
        position = length - num_queries + t
        first = max(0, position - window + 1) if window else 0
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            scores = k[first : position + 1, kv_head] @ q[t, head].astype(np.float64)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[first : position + 1, kv_head]
    return out


def random_attention(
    seed: int, num_queries: int, length: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(num_queries, num_heads, head_dim)).astype(np.float32) * 0.5
    k = rng.normal(size=(length, num_kv_heads, head_dim)).astype(np.float32)
    v = rng.normal(size=(length, num_kv_heads, head_dim)).astype(np.float32)
    table = rng.permutation(length // 16 + 4)[: length // 16 + 1].astype(np.int32)
    return q, k, v, table


@pytest.mark.parametrize("window", [0, 1, 5, 64, 100])
@pytest.mark.parametrize(
    ("num_queries", "length", "num_heads", "num_kv_heads", "head_dim"),
    [
        (1, 1, 1, 1, 16),
        (1, 200, 9, 3, 64),
        (37, 37, 4, 2, 32),
        (20, 300, 4, 1, 256),
        (3, 65, 5, 5, 80),
        (9, 1100, 3, 1, 48),
    ],
)
def test_attention_equals_float64(
    isa: str,
    kv_dtype: str,
    window: int,
    num_queries: int,
    length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    q, k, v, table = random_attention(
        length, num_queries, length, num_heads, num_kv_heads, head_dim
    )
    # Tokens and heads of very different sizes tell a scale in the wrong place.
    sizes = np.random.default_rng(0).uniform(0.1, 1, size=(2, length, num_kv_heads, 1))
    k, v = (np.stack([k, v]) * sizes).astype(np.float32)
    got = core.attend(isa, q, k, v, table, window, 8, kv_dtype)
    assert_is_attention(got, isa, q, k, v, window, kv_dtype)


@pytest.mark.parametrize("window", [0, 70])
def test_attention_of_a_token_does_not_depend_on_its_tile_or_chunk(
    isa: str, kv_dtype: str, window: int
) -> None:
    q, k, v, table = random_attention(1, 150, 150, 6, 2, 64)
    whole = core.attend(isa, q, k, v, table, window, 16, kv_dtype)
    for tile_tokens in (1, 3, 7):
        tiled = core.attend(isa, q, k, v, table, window, tile_tokens, kv_dtype)
        np.testing.assert_array_equal(tiled, whole)
    for position in (0, 15, 16, 127, 128, 149):
        # Alone, with only the tokens before it in the cache: a decode step.
        query, seen = q[position : position + 1], slice(position + 1)
        alone = core.attend(isa, query, k[seen], v[seen], table, window, 1, kv_dtype)
        np.testing.assert_array_equal(alone[0], whole[position])


@pytest.mark.parametrize("window", [0, 70, 600])
def test_attention_of_segments_apart_is_that_of_the_whole(
    isa: str, kv_dtype: str, window: int
) -> None:
    q, k, v, table = random_attention(1, 40, 1540, 6, 2, 64)
    whole = core.attend(isa, q, k, v, table, window, 16, kv_dtype)
    for tile_tokens in (1, 5, 16):
        apart = core.attend(isa, q, k, v, table, window, tile_tokens, kv_dtype, True)
        np.testing.assert_array_equal(apart, whole)


def test_attention_survives_scores_far_apart(isa: str, kv_dtype: str) -> None:
    q, k, v, table = random_attention(2, 1, 130, 1, 1, 16)
    k *= 100
    got = core.attend(isa, q, k, v, table, 0, 1, kv_dtype)
    assert_is_attention(got, isa, q, k, v, 0, kv_dtype, rtol=1e-3)


@pytest.mark.parametrize("value", [0.0, 1e-40, -3e-39])
def test_keys_and_values_near_zero_weigh_as_zero(isa: str, kv_dtype: str, value: float) -> None:
    q, k, v, table = random_attention(3, 4, 40, 2, 1, 32)
    k[7], v[7] = value, value
    got = core.attend(isa, q, k, v, table, 0, 4, kv_dtype)
    k[7], v[7] = 1e-30, 1e-30
    expected = core.attend(isa, q, k, v, table, 0, 4, kv_dtype)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("channel", [0, 13, 31])
def test_a_value_that_is_no_number_is_not_hidden(
    isa: str, kv_dtype: str, value: float, channel: int
) -> None:
    q, k, v, table = random_attention(4, 2, 20, 1, 1, 32)
    v[3, 0, channel] = value
    got = core.attend(isa, q, k, v, table, 0, 2, kv_dtype)
    assert not np.isfinite(got[:, :, channel]).any()


def test_memory_behind_the_last_key_is_not_read(isa: str, kv_dtype: str) -> None:
    q, k, v, table = random_attention(5, 1, 24, 2, 1, 48)
    expected = core.attend(isa, q, k[:23], v[:23], table, 0, 1, kv_dtype)
    k[23], v[23] = np.nan, np.nan  # a slot of the same block, not yet a key of this query
    queries = np.concatenate([q, q])
    got = core.attend(isa, queries, k, v, table, 0, 1, kv_dtype)
    np.testing.assert_array_equal(got[0], expected[0])


def kv_config() -> core.Config:
    config = core.Config()
    config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim = 3, 4, 2, 48
    config.hidden_size, config.intermediate_size, config.vocab_size = 32, 32, 8
    config.layer_windows, config.layer_rope_index = [0] * 3, [0] * 3
    config.rope_inv_freq = [[1.0] * 24]
    return config


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def populates() -> bool:
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    return (
        platform.system() == "Linux"
        and bool(release)
        and (int(release[1]), int(release[2])) >= (5, 14)
    )


@pytest.mark.skipif(not populates(), reason="Linux populates memory on demand from 5.14 on")
def test_only_blocks_that_are_populated_take_memory() -> None:
    model = core.Model(kv_config(), 1, "portable")
    model.allocate_kv(16384, "bf16")
    before, bytes_each = resident_bytes(), model.kv_bytes_per_block
    model.populate_kv(1024)
    grown = resident_bytes() - before
    huge_pages = 3 * 2 * (2 << 20)  # both ends of each layer's part
    assert 1024 * bytes_each - huge_pages <= grown <= 1024 * bytes_each + huge_pages


def test_a_block_of_the_cache_counts_its_scales() -> None:
    model = core.Model(kv_config(), 1, "portable")
    heads = 3 * 2 * 16  # of a block's tokens, in all layers
    assert model.kv_block_bytes("bf16") == heads * 2 * 48 * 2
    assert model.kv_block_bytes("int8") == heads * 2 * (48 + 4)
    for dtype in ("int8", "bf16"):
        model.allocate_kv(2, dtype)
        assert (model.kv_dtype, model.kv_bytes_per_block) == (dtype, model.kv_block_bytes(dtype))
    with pytest.raises(ValueError, match="choose bf16 or int8"):
        model.allocate_kv(2, "fp8")
