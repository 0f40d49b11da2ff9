"""bf16 in numpy, and which kernels round activations to it."""

import numpy as np
from numpy.typing import NDArray


def rounded_to_bf16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """To nearest even; for finite values."""
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def multiplied(isa: str, format: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The activations that a kernel multiplies, for the portable one to multiply as they are."""
    rounds = isa in ("avx512-bf16", "amx") and format in ("bf16", "fp8")
    return rounded_to_bf16(x) if rounds else x
