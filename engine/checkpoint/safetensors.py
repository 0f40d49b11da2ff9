"""Reads safetensors files, memory-mapped: one file, or the shards that an index names.

The loader calls it for folders in the Hugging Face layout.
"""

import json
import mmap
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.tensor import CheckpointError, StoredTensor

INDEX_NAME = "model.safetensors.index.json"

# Types as safetensors names them → bytes a value. Only the floats are weights that can be used;
# the others are let through here, since a buffer that nobody reads may have any type.
_BYTES_OF_TYPE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

_MAX_HEADER_BYTES = 100_000_000  # as in the format's reference
_MAX_DIMS = 8


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a folder: those of its index, or model.safetensors, or all there are.

    Raises CheckpointError for an index that names files that are not there.
    """
    index_path = folder / INDEX_NAME
    if index_path.exists():
        paths = [folder / name for name in shard_names(index_path)]
    elif (folder / "model.safetensors").exists():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: this shard is named in {INDEX_NAME} but missing")
    return paths


def shard_names(index_path: Path) -> list[str]:
    """File names of the shards that an index lists, each a plain name beside it."""
    return sorted(set(_weight_map(index_path).values()))


def read_folder(folder: Path) -> dict[str, StoredTensor]:
    """All tensors of a folder's shards by name. Raises CheckpointError naming file and tensor."""
    paths = find_shards(folder)
    if not paths:
        raise CheckpointError(f"{folder}: holds no .safetensors file")
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        for name, tensor in read_file(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    index_path = folder / INDEX_NAME
    if index_path.exists():
        for name, shard in _weight_map(index_path).items():
            if name not in tensors or tensors[name].path.name != shard:
                raise CheckpointError(f"{folder / shard}: tensor {name} is missing in this shard")
    return tensors


def read_file(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name, as views that keep the file mapped."""
    try:
        with path.open("rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    header_bytes = int.from_bytes(buffer[:8], "little")
    data_start = 8 + header_bytes
    if len(buffer) < 8 or header_bytes > _MAX_HEADER_BYTES or data_start > len(buffer):
        raise CheckpointError(f"{path}: not a safetensors file, or truncated in its header")
    try:
        header = json.loads(buffer[8:data_start], object_pairs_hook=_unique_keys)
    except ValueError as error:  # broken JSON, broken UTF-8 or a key that occurs twice
        raise CheckpointError(f"{path}: broken header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: broken header: not an object")
    header.pop("__metadata__", None)
    tensors = {
        name: _tensor(path, buffer, data_start, name, entry) for name, entry in header.items()
    }
    _refuse_overlap(path, header)
    return tensors


def _tensor(path: Path, buffer: mmap.mmap, data_start: int, name: str, entry: Any) -> StoredTensor:
    shape, begin, end, dtype = _fields(path, name, entry)
    if dtype not in _BYTES_OF_TYPE:
        raise CheckpointError(f"{path}: tensor {name} has unknown type {dtype}")
    if end > len(buffer) - data_start:
        raise CheckpointError(
            f"{path}: truncated: tensor {name} needs bytes up to {end}, "
            f"the file has {len(buffer) - data_start} behind its header"
        )
    num_bytes = prod(shape) * _BYTES_OF_TYPE[dtype]
    if end - begin != num_bytes:
        raise CheckpointError(
            f"{path}: tensor {name}, {dtype} of shape {shape}, takes {num_bytes} bytes; "
            f"its offsets give it {end - begin}"
        )
    data = np.frombuffer(buffer, dtype=np.uint8, count=num_bytes, offset=data_start + begin)
    return StoredTensor(name, shape, dtype, data, path)


def _fields(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], int, int, str]:
    try:
        shape, (begin, end), dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name} has a broken entry in the header") from error
    if (
        not all(isinstance(number, int) and number >= 0 for number in numbers)
        or len(shape) > _MAX_DIMS
        or begin > end
        or not isinstance(dtype, str)
    ):
        raise CheckpointError(f"{path}: tensor {name} has a broken entry in the header")
    return tuple(shape), begin, end, dtype


def _refuse_overlap(path: Path, header: dict[str, Any]) -> None:
    ranges = sorted((*entry["data_offsets"], name) for name, entry in header.items())
    for (_, end, name), (next_begin, _, next_name) in pairwise(ranges):
        if next_begin < end:
            raise CheckpointError(f"{path}: tensors {name} and {next_name} overlap")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} occurs twice")
    return keys


def _weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_bytes())["weight_map"]
        names = list(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_path}: has no readable weight_map") from error
    for name in names:
        # A shard lies beside its index; a name that leads elsewhere is not followed.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index_path}: {name!r} is not the name of a shard")
    return dict(weight_map)
