"""Writes a model with fewer layers, in the format of the model that it was made of.

Everything but the number of layers is carried over as it is: vocabulary, chat template, settings.
"""

import json
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.safetensors import INDEX_NAME
from engine.checkpoint.sources import ResolvedModel
from engine.checkpoint.tensor import StoredTensor
from tools.safetensors_writer import write_safetensors

_ALIGNMENT = 32
_GGUF_TYPE_IDS = {
    **{"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8},
    **{"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "BF16": 30},
}
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY, _UINT32 = 8, 9, 4
_NUMPY_TYPES = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def write_model(
    source: ResolvedModel, folder: Path, tensors: Mapping[str, StoredTensor], num_layers: int
) -> None:
    """Write a model that `--draft-model FOLDER` loads."""
    folder.mkdir(parents=True, exist_ok=True)
    if source.kind == "gguf":
        _write_gguf(source.path, folder / "model.gguf", tensors, num_layers)
    else:
        _write_folder(source.path, folder, tensors, num_layers)


def _write_folder(
    source: Path, folder: Path, tensors: Mapping[str, StoredTensor], num_layers: int
) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name != INDEX_NAME:
            shutil.copyfile(path, folder / path.name)
    arrays = {
        name: tensor.data.view(_NUMPY_TYPES[tensor.block_type]).reshape(tensor.shape)
        for name, tensor in tensors.items()
    }
    write_safetensors(folder / "model.safetensors", arrays)
    config = json.loads((source / "config.json").read_text())
    config["num_hidden_layers"] = num_layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:num_layers]
    # The module of the whole model is not that of this one.
    for key in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_gguf(
    source: Path, path: Path, tensors: Mapping[str, StoredTensor], num_layers: int
) -> None:
    file = GgufFile(source)
    key = f"{file.architecture}.block_count"
    settings = {k: v for k, v in file.metadata.items() if k.startswith(f"{file.architecture}.")}
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == settings[key]:
            raise ValueError(f"{source}: {name} is a list by layer, which is not written")
    entries, num_entries = _metadata_with(source.read_bytes(), key, num_layers)
    infos, data, offset = [], [], 0
    for name, tensor in tensors.items():
        encoded = name.encode()
        dims = struct.pack(f"<{len(tensor.shape)}Q", *reversed(tensor.shape))
        type_id = _GGUF_TYPE_IDS[tensor.block_type]
        infos.append(
            struct.pack("<Q", len(encoded))
            + encoded
            + struct.pack("<I", len(tensor.shape))
            + dims
            + struct.pack("<IQ", type_id, offset)
        )
        values = tensor.data.tobytes()
        values += bytes(-len(values) % _ALIGNMENT)
        data.append(values)
        offset += len(values)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), num_entries) + entries + b"".join(infos)
    partial = path.with_suffix(".part")
    partial.write_bytes(header + bytes(-len(header) % _ALIGNMENT) + b"".join(data))
    partial.rename(path)


def _metadata_with(content: bytes, key: str, value: int) -> tuple[bytes, int]:
    """The metadata entries of a GGUF file, one of them set anew, and how many there are."""
    (num_entries,) = struct.unpack_from("<Q", content, 16)
    position, entries, num_written = 24, [], 0
    for _ in range(num_entries):
        begin = position
        (length,) = struct.unpack_from("<Q", content, position)
        name = content[position + 8 : position + 8 + length].decode()
        position += 8 + length
        (type_id,) = struct.unpack_from("<I", content, position)
        position = _end_of_value(content, position + 4, type_id)
        if name == "general.alignment":
            continue  # written with the usual one
        entry = content[begin:position]
        if name == key:
            entry = content[begin : begin + 8 + length] + struct.pack("<II", _UINT32, value)
        entries.append(entry)
        num_written += 1
    return b"".join(entries), num_written


def _end_of_value(content: bytes, position: int, type_id: int) -> int:
    if type_id == _STRING:
        return position + 8 + int(struct.unpack_from("<Q", content, position)[0])
    if type_id != _ARRAY:
        return position + _VALUE_BYTES[type_id]
    item_type, count = struct.unpack_from("<IQ", content, position)
    position += 12
    if item_type not in (_STRING, _ARRAY):
        return position + int(count) * _VALUE_BYTES[item_type]
    for _ in range(count):
        position = _end_of_value(content, position, item_type)
    return position
