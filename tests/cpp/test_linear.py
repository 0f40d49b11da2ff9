"""The linear kernels of every instruction set of this machine: the portable ones against numpy in
float64, the others against the portable ones, and the invariance of a row, exactly."""

import fulcrum_core
import numpy as np
import pytest

from tests.cpp.bf16 import multiplied

ORDER = fulcrum_core.isas()
ISAS = ORDER[: ORDER.index(fulcrum_core.detect_isa()) + 1]
VECTOR_ISAS = ISAS[1:]
INT_FORMATS = ["int8", "int8-channel", "int4", "int4-g64", "int4-g128"]
INT_FORMATS += ["int4-sym", "int4-sym-g64", "int4-sym-g128"]
FORMATS = ["bf16", "fp8", *INT_FORMATS]
SHAPES = [(1, 1), (1, 31), (16, 32), (17, 33), (48, 64), (63, 100), (100, 577), (130, 256)]
NUM_TOKENS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 35]

all_isas = pytest.mark.parametrize("isa", ISAS)
vector_isas = pytest.mark.parametrize("isa", VECTOR_ISAS)
all_formats = pytest.mark.parametrize("format", FORMATS)


def pack(isa: str, format: str, weights: np.ndarray) -> fulcrum_core.Linear:
    data = np.ascontiguousarray(weights, np.float32).view(np.uint8).reshape(-1)
    return fulcrum_core.Linear(isa, format, "F32", data, *weights.shape)


def random(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng([rows, cols, seed])
    return rng.standard_normal((rows, cols)).astype(np.float32)


def rounded_activations(isa: str, format: str, x: np.ndarray) -> np.ndarray:
    """What the kernel multiplies: x itself, or its int8 form, in float64."""
    if format not in INT_FORMATS:
        return x.astype(np.float64)
    quants, scales, _ = fulcrum_core.quantize_activations(isa, x)
    groups = quants.reshape(len(x), -1, 32) * scales[:, :, None].astype(np.float64)
    return groups.reshape(len(x), -1)[:, : x.shape[1]]


@all_formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_portable_equals_float64_within_rounding(format, shape):
    linear = pack("portable", format, random(*shape))
    for num_tokens in (1, 5, 9):
        x = random(num_tokens, shape[1], seed=1)
        expected = rounded_activations("portable", format, x) @ linear.dequantize().T.astype(float)
        bound = 1e-6 * np.sqrt(shape[1]) * np.linalg.norm(x, axis=1, keepdims=True)
        assert (np.abs(linear.forward(x) - expected) <= bound + 1e-6).all()


@vector_isas
@all_formats
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_vector_kernels_equal_portable_within_rounding(isa, format, shape):
    weights = random(*shape)
    linear, oracle = pack(isa, format, weights), pack("portable", format, weights)
    np.testing.assert_array_equal(linear.dequantize(), oracle.dequantize())
    for num_tokens in NUM_TOKENS:
        x = random(num_tokens, shape[1], seed=2)
        expected = oracle.forward(multiplied(isa, format, x))
        np.testing.assert_allclose(linear.forward(x), expected, rtol=1e-5, atol=1e-4)


@all_isas
@all_formats
def test_row_is_identical_for_any_number_of_rows(isa, format):
    linear = pack(isa, format, random(83, 130))
    x = random(40, 130, seed=3)
    whole = linear.forward(x)
    for num_tokens in range(1, 20):
        for first in range(0, 40 - num_tokens, 7):
            rows = slice(first, first + num_tokens)
            np.testing.assert_array_equal(linear.forward(x[rows]), whole[rows])


@all_isas
@all_formats
def test_row_is_identical_beyond_one_cache_block_of_rows(isa, format):
    linear = pack(isa, format, random(20, 1056))
    x = random(230, 1056, seed=4)
    whole = linear.forward(x)
    for row in (0, 1, 100, 180, 229):
        np.testing.assert_array_equal(linear.forward(x[row : row + 1])[0], whole[row])


@all_isas
@all_formats
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 12])
def test_result_is_identical_for_any_tile_range(isa, format, num_tokens):
    linear = pack(isa, format, random(150, 70))
    x = random(num_tokens, 70, seed=5)
    whole = linear.forward(x)
    for middle in range(linear.num_tiles + 1):
        parts = linear.forward(x, tile_end=middle), linear.forward(x, tile_begin=middle)
        channels = middle * linear.tile_channels
        np.testing.assert_array_equal(parts[0][:, :channels], whole[:, :channels])
        np.testing.assert_array_equal(parts[1][:, channels:], whole[:, channels:])
        assert not parts[0][:, channels:].any()  # other threads' channels stay untouched
        assert not parts[1][:, :channels].any()


@all_isas
@all_formats
@pytest.mark.parametrize("num_tokens", [1, 3, 8])
def test_accumulate_adds_to_what_is_there(isa, format, num_tokens):
    linear = pack(isa, format, random(37, 64))
    x, y = random(num_tokens, 64, seed=6), random(num_tokens, 37, seed=7)
    expected = y + linear.forward(x)
    np.testing.assert_array_equal(linear.forward(x, out=y, accumulate=True), expected)


@all_isas
@pytest.mark.parametrize("num_tokens", [1, 9, 20])
def test_what_lies_behind_the_last_k_of_a_tile_is_not_multiplied(isa, num_tokens):
    weights = random(32, 40)
    weights[16:] = np.inf  # the next tile
    x = random(num_tokens, 40, seed=8)
    expected = pack(isa, "bf16", weights[:16]).forward(x)
    np.testing.assert_array_equal(pack(isa, "bf16", weights).forward(x)[:, :16], expected)


@all_isas
@all_formats
@pytest.mark.parametrize("num_rows", [1, 15, 16, 37])
def test_channels_beyond_the_matrix_are_not_written(isa, format, num_rows):
    linear = pack(isa, format, random(num_rows, 64))
    for num_tokens in (1, 2, 4, 11):
        x = random(num_tokens, 64, seed=14)
        out = np.full((num_tokens, num_rows + 20), 7, np.float32)
        linear.forward(x, out=out)
        np.testing.assert_array_equal(out[:, :num_rows], linear.forward(x))
        assert (out[:, num_rows:] == 7).all()


@all_isas
@pytest.mark.parametrize("format", INT_FORMATS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_saturating_products_are_exact(isa, format, sign):
    # All quants at their ends, all activations at ±127: the largest sums that can occur.
    weights = np.tile(np.where(np.arange(64) == 40, -1.0, 1.0).astype(np.float32) * 127, (32, 1))
    linear = pack(isa, format, weights)
    x = np.full((6, 64), sign * 127, np.float32)
    expected = x.astype(np.float64) @ linear.dequantize().T.astype(np.float64)
    np.testing.assert_allclose(linear.forward(x), expected, rtol=1e-6)


@all_isas
def test_all_256_values_of_an_int8_quant_multiply_exactly(isa):
    quants = np.arange(256, dtype=np.uint8).reshape(8, 32)  # -128 included, as a file may hold it
    one = np.tile(np.array([1], np.float16).view(np.uint8), (8, 1))
    data = np.ascontiguousarray(np.concatenate([one, quants], axis=1)).reshape(-1)
    linear = fulcrum_core.Linear(isa, "int8", "Q8_0", data, 8, 32)
    result = linear.forward(np.eye(32, dtype=np.float32) * 127)
    np.testing.assert_array_equal(result, 127.0 * quants.view(np.int8).T.astype(np.float32))


@all_isas
@pytest.mark.parametrize("format", INT_FORMATS)
def test_zero_rows_give_zero_and_leave_their_neighbours_alone(isa, format):
    linear = pack(isa, format, random(40, 96))
    x = random(5, 96, seed=8)
    expected = linear.forward(x)
    x[2] = 0
    result = linear.forward(x)
    assert not result[2].any()
    np.testing.assert_array_equal(result[[0, 1, 3, 4]], expected[[0, 1, 3, 4]])


@all_isas
@all_formats
def test_a_row_of_nans_stays_one_and_leaves_its_neighbours_alone(isa, format):
    linear = pack(isa, format, random(40, 70))
    x = random(6, 70, seed=13)
    expected = linear.forward(x)
    x[2] = np.nan
    result = linear.forward(x)
    assert np.isnan(result[2]).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(result[others], expected[others])


@all_isas
@all_formats
@pytest.mark.parametrize(
    "size", [2.0**-149, 2.0**-126, 2.0**-100, 2.0**-40, 2.0**40, 2.0**100], ids=str
)
def test_tiny_and_huge_activations_stay_finite_and_scale(isa, format, size):
    linear = pack(isa, format, random(24, 64))
    x = random(4, 64, seed=9)
    result = linear.forward(x * np.float32(size))
    assert np.isfinite(result).all()
    if size > 2.0**-100:
        np.testing.assert_allclose(result / size, linear.forward(x), rtol=1e-3, atol=1e-3)
    elif size < 2.0**-100:
        assert np.abs(result).max() < 1e-28


@all_isas
def test_activations_round_to_nearest_even_multiples_of_the_group_maximum(isa):
    x = random(7, 75, seed=10)
    x[3, 32:64] = 0
    quants, scales, sums = fulcrum_core.quantize_activations(isa, x)
    padded = np.zeros((7, 96), np.float32)
    padded[:, :75] = x
    groups = padded.reshape(7, 3, 32)
    largest = np.abs(groups).max(axis=-1)
    with np.errstate(divide="ignore"):
        inverse = np.where(largest > 0, np.float32(127) / largest, np.float32(0))
    expected = np.rint(groups * inverse[:, :, None].astype(np.float32))
    np.testing.assert_array_equal(quants.reshape(7, 3, 32), expected)
    np.testing.assert_array_equal(scales, largest / np.float32(127))
    np.testing.assert_array_equal(sums, expected.sum(axis=-1))


def test_every_instruction_set_quantizes_activations_alike():
    x = random(9, 333, seed=11) * np.float32(10) ** random(9, 333, seed=12)
    expected = fulcrum_core.quantize_activations("portable", x)
    for isa in VECTOR_ISAS:
        for got, wanted in zip(fulcrum_core.quantize_activations(isa, x), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@all_formats
def test_packed_size_is_what_the_format_promises(format):
    linear = pack(ISAS[-1], format, random(64, 256))
    bits = {
        "bf16": 16, "fp8": 8 + 32 / 256, "int8": 8.5, "int8-channel": 8 + 32 / 256,
        "int4": 5, "int4-g64": 4.5, "int4-g128": 4.25,
        "int4-sym": 4.5, "int4-sym-g64": 4.25, "int4-sym-g128": 4.125,
    }[format]  # fmt: skip
    assert linear.packed_bytes == 64 * 256 * bits / 8


def test_an_instruction_set_or_format_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="instruction set sse9"):
        pack("sse9", "int4", random(1, 32))
    with pytest.raises(ValueError, match="unknown format int3: choose from bf16, fp8"):
        pack("portable", "int3", random(1, 32))
