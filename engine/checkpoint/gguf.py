"""Reads GGUF files (versions 2 and 3), memory-mapped: metadata as Python values, tensors as views.

The loader, the model families and the tokenizers read from it. Every length in the file is
checked against the bytes that are there before anything is allocated for it.
"""

import mmap
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.tensor import BLOCK_TYPES, CheckpointError, StoredTensor

_BLOCK_TYPE_OF_ID = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    30: "BF16",
}

# Numeric value types of the metadata, by their id in the file.
_NUMBER_OF_TYPE: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_STRING_TYPE = 8
_ARRAY_TYPE = 9

_MAX_DIMS = 4
_MAX_ARRAY_DEPTH = 4
_LENGTH = struct.Struct("<Q")


class GgufFile:
    """A mapped GGUF file. Raises CheckpointError, naming the file and the tensor.

    `metadata` maps keys to int, float, bool, str or lists of these. Strings are UTF-8 decoded
    with surrogateescape, so that broken bytes survive. The tensors' data are views that keep the
    file mapped.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        try:
            with self.path.open("rb") as file:
                buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error
        _Header(self.path, buffer).read_into(self.metadata, self.tensors)

    @property
    def architecture(self) -> str:
        """The model family, as GGUF names it ("llama", "gemma3", …)."""
        architecture = self.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{self.path}: the metadata name no general.architecture")
        return architecture


class _Header:
    """A cursor over the mapped bytes, from the magic to the last entry of the tensor table."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self._path = path
        self._buffer = buffer
        self._size = len(buffer)
        self._position = 0

    def read_into(self, metadata: dict[str, Any], tensors: dict[str, StoredTensor]) -> None:
        if self._take(4, "the magic") != b"GGUF":
            raise CheckpointError(f"{self._path}: not a GGUF file")
        version = self._uint32("the version")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self._path}: GGUF version {version}; versions 2 and 3 (little-endian) are read"
            )
        num_tensors = self._uint64("the number of tensors")
        num_entries = self._uint64("the number of metadata entries")
        for _ in range(num_entries):
            key = self._string("a metadata key")
            if key in metadata:
                raise CheckpointError(f"{self._path}: metadata key {key} occurs twice")
            metadata[key] = self._value(self._uint32(key), key, depth=0)
        infos = [self._tensor_info() for _ in range(num_tensors)]
        data_start = self._aligned(metadata.get("general.alignment", 32))
        for name, shape, block_type, offset in infos:
            if name in tensors:
                raise CheckpointError(f"{self._path}: tensor {name} occurs twice")
            tensors[name] = self._tensor(name, shape, block_type, data_start + offset)

    def _take(self, num_bytes: int, what: str) -> bytes:
        start = self._position
        if num_bytes > self._size - start:
            raise CheckpointError(
                f"{self._path}: truncated: {what} needs {num_bytes} bytes at offset {start}, "
                f"the file has {self._size - start} left"
            )
        self._position = start + num_bytes
        return self._buffer[start : self._position]

    def _uint32(self, what: str) -> int:
        return int.from_bytes(self._take(4, what), "little")

    def _uint64(self, what: str) -> int:
        return int.from_bytes(self._take(8, what), "little")

    def _string(self, what: str) -> str:
        return self._take(self._uint64(what), what).decode("utf-8", "surrogateescape")

    def _value(self, type_id: int, key: str, depth: int) -> Any:
        if type_id == _STRING_TYPE:
            return self._string(key)
        if type_id == _ARRAY_TYPE:
            return self._array(key, depth)
        return self._numbers(type_id, 1, key)[0]

    def _array(self, key: str, depth: int) -> list[Any]:
        type_id = self._uint32(key)
        count = self._uint64(key)
        if type_id == _STRING_TYPE:
            return self._strings(count, key)
        if type_id == _ARRAY_TYPE:
            if depth == _MAX_ARRAY_DEPTH:
                raise CheckpointError(f"{self._path}: metadata key {key}: arrays nested too deep")
            return [self._array(key, depth + 1) for _ in range(count)]
        return self._numbers(type_id, count, key)

    def _numbers(self, type_id: int, count: int, key: str) -> list[Any]:
        dtype = _NUMBER_OF_TYPE.get(type_id)
        if dtype is None:
            raise CheckpointError(f"{self._path}: metadata key {key} has unknown type {type_id}")
        numbers: list[Any] = np.frombuffer(
            self._take(count * dtype.itemsize, key), dtype=dtype
        ).tolist()
        return numbers

    def _strings(self, count: int, key: str) -> list[str]:
        # A vocabulary has up to some 260,000 strings: hence no method calls in this loop.
        strings: list[str] = []
        append = strings.append
        unpack_length = _LENGTH.unpack_from
        buffer, size, position = self._buffer, self._size, self._position
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack_length(buffer, position)[0]
                if position > size:
                    break
                append(buffer[start:position].decode("utf-8", "surrogateescape"))
        except struct.error:
            position = size + 1
        if position > size:
            raise CheckpointError(
                f"{self._path}: truncated: metadata key {key} says {count} strings, "
                f"the file ends after {len(strings)}"
            )
        self._position = position
        return strings

    def _tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        name = self._string("a tensor name")
        num_dims = self._uint32(f"tensor {name}")
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(
                f"{self._path}: tensor {name} has {num_dims} dimensions; 1 to {_MAX_DIMS} are known"
            )
        # GGUF counts the fastest dimension first.
        shape = tuple(self._uint64(f"tensor {name}") for _ in range(num_dims))[::-1]
        type_id = self._uint32(f"tensor {name}")
        if type_id not in _BLOCK_TYPE_OF_ID:
            raise CheckpointError(
                f"{self._path}: tensor {name} has block type {type_id}; known are "
                f"{', '.join(_BLOCK_TYPE_OF_ID.values())}"
            )
        return name, shape, _BLOCK_TYPE_OF_ID[type_id], self._uint64(f"tensor {name}")

    def _aligned(self, alignment: Any) -> int:
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(
                f"{self._path}: general.alignment is {alignment!r}, not a power of two"
            )
        return -(-self._position // alignment) * alignment

    def _tensor(
        self, name: str, shape: tuple[int, ...], type_name: str, start: int
    ) -> StoredTensor:
        block_type = BLOCK_TYPES[type_name]
        if min(shape) < 1 or shape[-1] % block_type.num_values:
            raise CheckpointError(
                f"{self._path}: tensor {name} has shape {shape}; rows of {type_name} hold a "
                f"positive multiple of {block_type.num_values} values"
            )
        num_bytes = prod(shape) // block_type.num_values * block_type.num_bytes
        if start + num_bytes > self._size:
            raise CheckpointError(
                f"{self._path}: truncated: tensor {name} needs bytes {start} to "
                f"{start + num_bytes}, the file has {self._size}"
            )
        data = np.frombuffer(self._buffer, dtype=np.uint8, count=num_bytes, offset=start)
        return StoredTensor(name, shape, type_name, data, self._path)
