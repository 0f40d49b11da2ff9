"""The AVX-512 and AMX kernels, compiled against emulated intrinsics, against the portable kernels.

Runs on any machine with g++ and the SIMDe headers, so that the code is tested where the
instructions are missing.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cpp.bf16 import multiplied

HERE = Path(__file__).parent
CPP = HERE.parent.parent / "cpp"
FORMATS = {
    name: index
    for index, name in enumerate(
        ("bf16", "fp8", "int8", "int8-channel", "int4", "int4-g64", "int4-g128", "int4-sym",
         "int4-sym-g64", "int4-sym-g128")
    )
}  # fmt: skip
# Those that avx512-bf16 and amx compute by themselves, and one that they leave to avx512.
KERNELS = [("avx512", name) for name in FORMATS]
KERNELS += [("avx512-bf16", name) for name in ("bf16", "fp8", "int8")]
KERNELS += [("amx", name) for name in ("bf16", "fp8", "int8")]
KV_DTYPES = {"bf16": 0, "int8": 1}
GROUP = 32
TILE = 16


def compile_library(folder: Path) -> ctypes.CDLL:
    common = ["g++", "-std=c++20", "-fPIC", "-w", "-ffp-contract=off", "-I", str(CPP)]
    emulated = f'-DFULCRUM_EMULATED_INTRINSICS="{HERE / "avx512_emulation.h"}"'
    units = [
        (CPP / "cpu" / "linear_avx512.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "linear_avx512_float.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "linear_avx512_bf16.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "linear_amx.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "linear_avx2.cpp", ["-O0", "-mavx2", "-mfma", "-mf16c"]),
        (CPP / "cpu" / "linear_avx2_float.cpp", ["-O0", "-mavx2", "-mfma", "-mf16c"]),
        (CPP / "cpu" / "activations_avx512.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "activations_avx2.cpp", ["-O0", "-mavx2", "-mfma", "-mf16c"]),
        (CPP / "cpu" / "linear_portable.cpp", ["-O2"]),
        (CPP / "linear.cpp", ["-O1"]),
        (CPP / "cpu" / "vector_avx512.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "vector_avx512_bf16.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "vector_amx.cpp", ["-O0", emulated]),
        (CPP / "cpu" / "vector_avx2.cpp", ["-O0", "-mavx2", "-mfma", "-mf16c"]),
        (CPP / "cpu" / "vector_portable.cpp", ["-O2"]),
        (CPP / "ops.cpp", ["-O1"]),
        (HERE / "avx512_harness.cpp", ["-O1"]),
    ]
    objects = []
    for source, flags in units:
        target = folder / (source.stem + ".o")
        subprocess.run([*common, *flags, "-c", str(source), "-o", str(target)], check=True)
        objects.append(str(target))
    library = folder / "libavx512_emulated.so"
    subprocess.run(["g++", "-shared", "-o", str(library), *objects], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    probe = "#if !defined(__x86_64__)\n#error\n#endif\n#include <simde/x86/avx512.h>\n"
    found = subprocess.run(
        ["g++", "-E", "-x", "c++", "-"], input=probe, text=True, capture_output=True
    )
    if found.returncode != 0:
        pytest.skip("needs x86-64 and the SIMDe headers (Debian: libsimde-dev)")
    return compile_library(tmp_path_factory.mktemp("avx512"))


def pointer(array: np.ndarray) -> Any:
    return array.ctypes.data_as(ctypes.c_void_p)


class Weights:
    """Random weights in the form that pack takes."""

    def __init__(self, format: str, rows: int, cols: int, *, extreme: bool = False) -> None:
        rng = np.random.default_rng(rows * 1000 + cols)
        groups = -(-cols // GROUP)
        self.format, self.rows, self.cols = FORMATS[format], rows, cols
        self.values = rng.standard_normal((rows, cols)).astype(np.float32)
        limit = (0, 16) if format.startswith("int4") else (-128, 128)
        quants = rng.integers(*limit, (rows, groups * GROUP))
        if extreme:
            quants = np.where(rng.random(quants.shape) < 0.5, limit[0], limit[1] - 1)
        self.quants = quants.astype(np.int64).astype(np.uint8)
        if format == "fp8":
            self.quants[self.quants & 127 == 127] = 0  # NaN, which no weight becomes
        self.scales = rng.uniform(0.001, 0.1, (rows, groups)).astype(np.float32)
        self.minima = rng.uniform(-1, 1, (rows, groups)).astype(np.float32)

    def arguments(self) -> tuple[Any, ...]:
        return (*map(pointer, (self.values, self.quants, self.scales, self.minima)),)


def gemm(
    library: ctypes.CDLL,
    isa: str,
    weights: Weights,
    x: np.ndarray,
    y: np.ndarray | None = None,
    tiles: tuple[int, int] | None = None,
) -> np.ndarray:
    begin, end = tiles or (0, -(-weights.rows // TILE))
    out = np.zeros((len(x), weights.rows), np.float32) if y is None else y.copy()
    library.gemm(
        isa.encode(), weights.format, weights.rows, weights.cols, len(x), *weights.arguments(),
        pointer(x), pointer(out), begin, end, int(y is not None),
    )  # fmt: skip
    return out


def activations(rows: int, cols: int) -> np.ndarray:
    rng = np.random.default_rng(rows)
    return rng.standard_normal((rows, cols)).astype(np.float32)


SHAPES = [(1, 1), (16, 32), (17, 33), (63, 100), (80, 288), (33, 559)]
kernels = pytest.mark.parametrize(("isa", "format"), KERNELS)


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_avx512_equals_portable_within_rounding(library, isa, format, shape):
    weights = Weights(format, *shape)
    for num_tokens in (1, 2, 3, 7, 8, 9, 19):
        x = activations(num_tokens, weights.cols)
        expected = gemm(library, "portable", weights, multiplied(isa, format, x))
        np.testing.assert_allclose(gemm(library, isa, weights, x), expected, rtol=1e-5, atol=1e-4)


@kernels
def test_emulated_avx512_decodes_the_same_weights(library, isa, format):
    weights = Weights(format, 35, 75)
    decoded = {}
    for name in ("portable", "avx2", isa):
        decoded[name] = np.full((35, 75), np.nan, np.float32)
        library.unpack(
            name.encode(), weights.format, 35, 75, *weights.arguments(), pointer(decoded[name])
        )
    np.testing.assert_array_equal(decoded[isa], decoded["portable"])
    np.testing.assert_array_equal(decoded["avx2"], decoded["portable"])


@kernels
def test_emulated_avx512_row_is_identical_for_any_batch_and_tile_range(library, isa, format):
    weights = Weights(format, 83, 131)
    x = activations(21, 131)
    whole = gemm(library, isa, weights, x)
    for row in range(21):
        np.testing.assert_array_equal(gemm(library, isa, weights, x[row : row + 1])[0], whole[row])
    parts = [gemm(library, isa, weights, x, tiles=t) for t in ((0, 1), (1, 4), (4, 6))]
    np.testing.assert_array_equal(sum(parts), whole)


@pytest.mark.parametrize("format", [name for name in FORMATS if name.startswith("int")])
def test_emulated_avx512_does_not_saturate(library, format):
    weights = Weights(format, 32, 256, extreme=True)
    x = np.where(np.arange(4 * 256).reshape(4, 256) % 5 == 0, -1.0, 1.0).astype(np.float32)
    np.testing.assert_allclose(
        gemm(library, "avx512", weights, x),
        gemm(library, "portable", weights, x),
        rtol=1e-5,
        atol=1e-3,
    )


@kernels
def test_emulated_avx512_accumulates(library, isa, format):
    weights = Weights(format, 21, 64)
    x, y = activations(5, 64), activations(5, 21)
    alone = gemm(library, isa, weights, x)
    np.testing.assert_array_equal(gemm(library, isa, weights, x, y), y + alone)


@pytest.mark.parametrize("cols", [1, 32, 100, 128, 333])
def test_emulated_avx512_quantizes_activations_as_portable(library, cols):
    x = activations(7, cols) * np.float32(10) ** activations(7, cols)
    x[2], x[3, :40] = 0, 0
    groups = -(-cols // GROUP)
    quantized = {}
    for isa in ("portable", "avx512"):
        quantized[isa] = [np.full((7, groups * GROUP), 99, np.int8)]
        quantized[isa] += [np.full((7, groups), np.nan, np.float32) for _ in range(3)]
        library.quantize(isa.encode(), 7, cols, pointer(x), *map(pointer, quantized[isa]))
    for got, wanted in zip(quantized["avx512"], quantized["portable"], strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_emulated_pairs_of_bf16_multiply_every_e4m3_value_exactly(library):
    weights = Weights("fp8", 16, 16)
    weights.quants[:, :16] = np.arange(256, dtype=np.uint8).reshape(16, 16)
    weights.quants[weights.quants & 127 == 127] = 0
    one = np.eye(16, dtype=np.float32)
    results = [gemm(library, isa, weights, one) for isa in ("portable", "avx512-bf16", "amx")]
    assert np.count_nonzero(results[0]) == 252  # subnormal values of e4m3 included
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


@pytest.mark.parametrize("isa", ["avx512-bf16", "amx"])
@pytest.mark.parametrize("format", ["bf16", "fp8"])
def test_emulated_pairs_of_bf16_round_once_and_keep_neighbours_apart(library, isa, format):
    weights = Weights(format, 20, 65)
    x = activations(5, 65)
    whole = gemm(library, isa, weights, x)
    assert not np.array_equal(whole, gemm(library, "avx512", weights, x))
    x[1], x[3, 7] = 0, np.nan
    x[4] = np.float32(1e-39)  # subnormal: vdpbf16ps takes it as zero
    result = gemm(library, isa, weights, x)
    np.testing.assert_array_equal(result[[0, 2]], whole[[0, 2]])
    assert not result[[1, 4]].any()
    assert np.isnan(result[3]).all()


@pytest.mark.parametrize("size", [1, 15, 16, 100])
def test_emulated_avx512_norm_and_gates_equal_portable(library, size):
    x, up = activations(2, size) * 20
    out = {}
    for isa in ("portable", "avx512"):
        out[isa] = np.zeros((3, size), np.float32)
        library.rms_norm(isa.encode(), pointer(x), pointer(up), size, pointer(out[isa][0]))
        for activation in (0, 1):
            library.gate(
                isa.encode(), activation, pointer(x), pointer(up), size,
                pointer(out[isa][1 + activation]),
            )  # fmt: skip
    np.testing.assert_allclose(out["avx512"], out["portable"], rtol=1e-5, atol=1e-5)


def attend(
    library: ctypes.CDLL, isa: str, kv_dtype: str, window: int, tile_tokens: int
) -> np.ndarray:
    """Attention of 5 tokens, 3 heads of 48 channels, after 85 others."""
    queries, keys, values = activations(15, 48) * 0.3, activations(90, 48), activations(91, 48)
    out = np.zeros_like(queries)
    library.attend(
        isa.encode(), KV_DTYPES[kv_dtype], 5, 90, 3, 48, window, tile_tokens,
        *map(pointer, (queries, keys, values, out)),
    )  # fmt: skip
    return out


@pytest.mark.parametrize("isa", ["avx512", "avx512-bf16", "amx"])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_emulated_avx512_attention_equals_portable_and_ignores_tiles(
    library, isa, kv_dtype, window
):
    whole = attend(library, isa, kv_dtype, window, 5)
    # What queries and probabilities are rounded to: integers of 16 bits, pairs of bf16, nothing.
    tolerance = 1e-3 if kv_dtype == "int8" else 1e-5 if isa == "avx512" else 1e-2
    np.testing.assert_allclose(
        whole, attend(library, "portable", kv_dtype, window, 5), rtol=tolerance, atol=tolerance
    )
    for tile_tokens in (1, 2):
        np.testing.assert_array_equal(attend(library, isa, kv_dtype, window, tile_tokens), whole)
