"""Decoding of checkpoint blocks, against the gguf package, and quantization to the formats."""

import fulcrum_core
import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from tests.cpp.bf16 import rounded_to_bf16

BLOCKS = {  # values, bytes
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
FORMATS = ["bf16", "fp8", "int8", "int8-channel", "int4", "int4-g64", "int4-g128"]
FORMATS += ["int4-sym", "int4-sym-g64", "int4-sym-g128"]
# Where the fp16 numbers of a block lie.
HALVES = {
    "F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0],
    "Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def random_blocks(block_type: str, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Random bits, with finite numbers where the block holds fp16: (num_blocks, bytes)."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (num_blocks, BLOCKS[block_type][1]), dtype=np.uint8)
    for offset in HALVES.get(block_type, []):
        halves = (rng.standard_normal(num_blocks) * 0.02).astype(np.float16)
        # Subnormal, zero and large scales occur in checkpoints, too.
        halves[: min(4, num_blocks)] = np.array([6e-8, 0, -0.5, 250], np.float16)[:num_blocks]
        blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    if block_type in ("F32", "BF16"):
        values = rng.standard_normal(num_blocks).astype(np.float32)
        wanted = values.view(np.uint8).reshape(-1, 4)
        blocks = wanted if block_type == "F32" else wanted[:, 2:]
    return np.ascontiguousarray(blocks)


def reference(block_type: str, blocks: np.ndarray) -> np.ndarray:
    return quants.dequantize(blocks, GGMLQuantizationType[block_type]).reshape(-1)


def requantize(
    format: str, block_type: str, data: np.ndarray, rows: int, cols: int, isa: str = "portable"
) -> np.ndarray:
    packed = fulcrum_core.Linear(isa, format, block_type, data.reshape(-1), rows, cols)
    return packed.dequantize()


def requantize_floats(format: str, values: np.ndarray) -> np.ndarray:
    values = np.ascontiguousarray(values, np.float32)
    return requantize(format, "F32", values.view(np.uint8), *values.shape)


@pytest.mark.parametrize("block_type", BLOCKS)
def test_dequantize_equals_the_gguf_reference_bit_for_bit(block_type):
    blocks = random_blocks(block_type, 300)
    num_values = 300 * BLOCKS[block_type][0]
    decoded = fulcrum_core.dequantize(block_type, blocks.reshape(-1), num_values)
    np.testing.assert_array_equal(decoded, reference(block_type, blocks))


def test_every_finite_half_is_decoded_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16)
    halves = halves[np.isfinite(halves.view(np.float16))]
    decoded = fulcrum_core.dequantize("F16", halves.view(np.uint8), len(halves))
    np.testing.assert_array_equal(
        decoded.view(np.uint32), halves.view(np.float16).astype(np.float32).view(np.uint32)
    )


def test_dequantize_refuses_what_is_not_whole_blocks():
    with pytest.raises(ValueError, match="whole blocks"):
        fulcrum_core.dequantize("Q4_0", np.zeros(17, np.uint8), 32)
    with pytest.raises(ValueError, match="unknown block type"):
        fulcrum_core.dequantize("Q9_9", np.zeros(18, np.uint8), 32)


@pytest.mark.parametrize(
    ("format", "block_type"),
    [("int4", "Q4_0"), ("int4", "Q4_1"), ("int8", "Q4_0"), ("int8", "Q5_0"), ("int8", "Q8_0"),
     ("int4-sym", "Q4_0"), ("bf16", "BF16")],
)  # fmt: skip
def test_formats_hold_these_block_types_exactly(format, block_type):
    values = BLOCKS[block_type][0]
    blocks = random_blocks(block_type, 33 * (96 // values), seed=1)
    expected = reference(block_type, blocks).reshape(33, 96)
    np.testing.assert_array_equal(requantize(format, block_type, blocks, 33, 96), expected)


def test_a_scale_beyond_what_int4_can_shift_is_requantized():
    blocks = random_blocks("Q4_0", 1)
    blocks[0, :2] = np.array([30000], np.float16).view(np.uint8)
    expected = reference("Q4_0", blocks)  # from -240000 on: the minimum does not fit fp16
    result = requantize("int4", "Q4_0", blocks, 1, 32)[0]
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result, np.clip(expected, -65504, None), atol=30000)


def test_int4_keeps_the_quants_of_q4_k():
    blocks = random_blocks("Q4_K", 40, seed=2)
    expected = reference("Q4_K", blocks).reshape(40, 8, 32)
    result = requantize("int4", "Q4_K", blocks, 40, 256).reshape(40, 8, 32)
    # The error is that of rounding scale and minimum to fp16: 2^-11 of the largest term.
    step = np.ptp(expected, axis=-1, keepdims=True)
    bound = (np.abs(expected).max(axis=-1, keepdims=True) + step) * 2.0**-10 + 1e-6
    assert (np.abs(result - expected) <= bound).all()


DISTRIBUTIONS = ["normal", "laplace", "uniform", "outliers"]


def values_of(distribution: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    return {
        "normal": rng.standard_normal((64, 256)),
        "laplace": rng.laplace(size=(64, 256)),
        "uniform": rng.uniform(-1, 1, (64, 256)),
        "outliers": rng.standard_normal((64, 256)) * np.where(rng.random((64, 256)) < 0.02, 8, 1),
    }[distribution].astype(np.float32)  # fmt: skip


def half(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_int4_error_is_no_worse_than_plain_rounding_in_any_group(distribution, group_size):
    values = values_of(distribution)
    groups = values.reshape(-1, group_size)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    scale, minimum = half((high - low) / 15), half(low)
    plain = np.clip(np.floor((groups - minimum) / scale + 0.5), 0, 15) * scale + minimum
    plain_error = np.square(plain - groups).sum(axis=1)
    name = "int4" if group_size == 32 else f"int4-g{group_size}"
    result = requantize_floats(name, values).reshape(-1, group_size)
    error = np.square(result - groups).sum(axis=1)
    assert (error <= plain_error * 1.001 + 1e-7).all()
    assert error.sum() < plain_error.sum() * 0.97


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_symmetric_int4_error_is_no_worse_than_plain_rounding(distribution, group_size):
    values = values_of(distribution)
    groups = values.reshape(-1, group_size)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
    scale = half(largest / -8)
    plain = np.clip(np.rint(groups / scale), -8, 7) * scale
    plain_error = np.square(plain - groups).sum(axis=1)
    name = "int4-sym" if group_size == 32 else f"int4-sym-g{group_size}"
    result = requantize_floats(name, values).reshape(-1, group_size)
    error = np.square(result - groups).sum(axis=1)
    assert (error <= plain_error * 1.001 + 1e-7).all()
    assert error.sum() < plain_error.sum() * 0.97


def test_fp8_is_the_nearest_e4m3_of_its_channel():
    # Every value of the format: a sign, 4 bits of exponent, 3 of mantissa.
    bits = np.arange(127)
    exponent, mantissa = bits >> 3, bits & 7
    positive = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0)
    )
    grid = np.concatenate([-positive[::-1], positive])
    rng = np.random.default_rng(8)
    values = rng.standard_normal((16, 300)) * 10.0 ** rng.uniform(-4, 0, (16, 300))
    values = values.astype(np.float32)
    scale = np.abs(values).max(axis=1, keepdims=True) / np.float32(448)
    nearest = np.abs(values[:, :, None] / scale[:, :, None] - grid).min(axis=2)
    error = np.abs(requantize_floats("fp8", values) - values) / scale
    np.testing.assert_allclose(error, nearest, atol=1e-4)


def test_int8_channel_error_is_at_most_half_a_step_of_the_channel():
    values = np.random.default_rng(4).standard_normal((32, 160)).astype(np.float32)
    step = np.abs(values).max(axis=1, keepdims=True) / 127
    error = np.abs(requantize_floats("int8-channel", values) - values)
    assert (error <= step * 0.5001).all()


def test_int8_error_is_at_most_half_a_step():
    values = np.random.default_rng(4).standard_normal((32, 160)).astype(np.float32)
    result = requantize_floats("int8", values)
    step = np.abs(values.reshape(32, 5, 32)).max(axis=-1, keepdims=True) / 127
    error = np.abs(result - values).reshape(32, 5, 32)
    assert (error <= step * (0.5 + 127 * 2.0**-11) + 1e-7).all()


def test_bf16_rounds_to_nearest_even():
    values = np.random.default_rng(5).standard_normal((3, 70)).astype(np.float32)
    values[0, :2] = np.array([0x3F808000, 0x3F818000], np.uint32).view(np.float32)  # ties
    result = requantize_floats("bf16", values)
    np.testing.assert_array_equal(result, rounded_to_bf16(values))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "value", [0.0, 1.0, -1.0, 3e-8, -1e-6, 1e-30, 1e-45, 6e4, 3e38, -3e38], ids=str
)
def test_groups_of_one_value_stay_finite_and_close(format, value):
    result = requantize_floats(format, np.full((2, 64), value, np.float32))
    assert np.isfinite(result).all()
    if abs(value) <= 65504 and format != "bf16":
        np.testing.assert_allclose(result, value, rtol=0.008, atol=6e-8)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_values_of_extreme_range_stay_finite(format):
    values = np.random.default_rng(6).standard_normal((4, 64)).astype(np.float32)
    for factor in (1e-38, 1e-20, 1e-7, 1e4, 1e30, 1e38):
        assert np.isfinite(requantize_floats(format, values * np.float32(factor))).all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_last_group_that_is_cut_short_is_as_accurate_as_a_whole_one(format):
    values = np.random.default_rng(7).standard_normal((5, 37)).astype(np.float32) + 3
    result = requantize_floats(format, values)
    limits = {"bf16": 0.02, "fp8": 0.3, "int8": 0.03, "int8-channel": 0.03}
    limit = limits.get(format, 0.6 if "sym" in format else 0.25)
    assert np.abs(result - values).max() < limit
