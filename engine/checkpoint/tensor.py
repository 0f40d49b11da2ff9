"""What every checkpoint format hands over: named tensors as views of their bytes on disk.

The readers (gguf, safetensors) make them; the loader gives them to the core.
"""

from math import prod
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.config import ConfigError


class CheckpointError(ConfigError):
    """A checkpoint that cannot be loaded, so a --model that cannot work.

    The message is one line that names the file and, where there is one, the tensor.
    """


class BlockType(msgspec.Struct, frozen=True):
    """A storage type: `num_values` consecutive values of a row take `num_bytes`."""

    name: str
    num_values: int
    num_bytes: int


# Named as in GGUF, which is how the core's parser knows them too.
BLOCK_TYPES = {
    block_type.name: block_type
    for block_type in (
        BlockType("F32", 1, 4),
        BlockType("F16", 1, 2),
        BlockType("BF16", 1, 2),
        BlockType("Q4_0", 32, 18),
        BlockType("Q4_1", 32, 20),
        BlockType("Q5_0", 32, 22),
        BlockType("Q5_1", 32, 24),
        BlockType("Q8_0", 32, 34),
        BlockType("Q2_K", 256, 84),
        BlockType("Q3_K", 256, 110),
        BlockType("Q4_K", 256, 144),
        BlockType("Q5_K", 256, 176),
        BlockType("Q6_K", 256, 210),
    )
}

FLOAT_TYPES = ("F32", "F16", "BF16")


class StoredTensor(msgspec.Struct, frozen=True):
    """One tensor as it lies in its file. `data` is a read-only view of the mapped bytes."""

    name: str
    shape: tuple[int, ...]  # row-major: (rows, cols) of a matrix
    block_type: str  # a key of BLOCK_TYPES
    data: NDArray[np.uint8]
    path: Path

    @property
    def num_values(self) -> int:
        """Values, not bytes."""
        return prod(self.shape)

    def floats(self) -> NDArray[np.float32]:
        """Decode a tensor of a plain float type to float32, in its shape."""
        if self.block_type == "F32":
            values = self.data.view(np.float32).copy()
        elif self.block_type == "F16":
            values = self.data.view(np.float16).astype(np.float32)
        elif self.block_type == "BF16":
            values = (self.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            raise CheckpointError(
                f"{self.path}: tensor {self.name} is {self.block_type}; "
                f"norms and biases must be one of {', '.join(FLOAT_TYPES)}"
            )
        return values.reshape(self.shape)
