"""safetensors files of the reference package are read back; broken ones are refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoint.safetensors import INDEX_NAME, read_file, read_folder
from engine.checkpoint.tensor import CheckpointError


def _write(path: Path, header: Any, data: bytes) -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_tensors_of_the_reference_writer_are_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    floats = rng.standard_normal((5, 7), dtype=np.float32)
    halves = rng.standard_normal((3,)).astype(np.float16)
    save_file(
        {"a.floats": floats, "b.halves": halves, "c.ids": np.arange(3)},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    tensors = read_folder(tmp_path)
    assert {name: (t.shape, t.block_type) for name, t in tensors.items()} == {
        "a.floats": ((5, 7), "F32"),
        "b.halves": ((3,), "F16"),
        "c.ids": ((3,), "I64"),
    }
    np.testing.assert_array_equal(tensors["a.floats"].floats(), floats)
    np.testing.assert_array_equal(tensors["b.halves"].floats(), halves.astype(np.float32))


def test_bf16_is_widened_exactly_even_when_unaligned(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3e38, 0.0], dtype=np.float32)
    raw = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = {"pad": _entry("U8", [1], 0, 1), "w": _entry("BF16", [2, 2], 1, 9)}
    tensor = read_file(_write(tmp_path / "x.safetensors", header, b"\0" + raw))["w"]
    expected = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(tensor.floats(), expected.reshape(2, 2))


def test_shards_of_an_index_are_joined_and_files_beside_it_left_alone(tmp_path: Path) -> None:
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    save_file({"one": one}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"two": two}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"one": two, "two": one}, tmp_path / "consolidated.safetensors")
    weight_map = {
        "one": "model-00001-of-00002.safetensors",
        "two": "model-00002-of-00002.safetensors",
    }
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    tensors = read_folder(tmp_path)
    np.testing.assert_array_equal(tensors["one"].floats(), one)
    np.testing.assert_array_equal(tensors["two"].floats(), two)

    (tmp_path / INDEX_NAME).write_text(
        json.dumps({"weight_map": {**weight_map, "three": weight_map["two"]}})
    )
    with pytest.raises(CheckpointError, match=r"00002\.safetensors: tensor three is missing"):
        read_folder(tmp_path)

    (tmp_path / weight_map["one"]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002.*missing"):
        read_folder(tmp_path)


def test_an_index_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="not the name of a shard"):
        read_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"w": np.ones(1, np.float32)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"tensor w is also in a\.safetensors"):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"w": _entry("F32", [2, 2], 0, 16)}, "truncated: tensor w"),
        ({"w": _entry("F32", [2], 0, 4)}, "tensor w.*takes 8 bytes"),
        ({"w": _entry("F32", [2**40, 2**40], 0, 8)}, "tensor w.*takes"),
        ({"w": _entry("F4", [2], 0, 8)}, "tensor w has unknown type F4"),
        ({"w": _entry("F32", [-1], 0, 8)}, "tensor w has a broken entry"),
        ({"w": _entry("F32", [1], 8, 4)}, "tensor w has a broken entry"),
        ({"w": {"dtype": "F32", "shape": [1]}}, "tensor w has a broken entry"),
        ({"w": [1]}, "tensor w has a broken entry"),
        ([1], "not an object"),
        (b'{"w":', "broken header"),
        (b"\xff\xfe", "broken header"),
        (
            {"v": _entry("F32", [1], 0, 4), "w": _entry("F16", [2], 2, 6)},
            "tensors v and w overlap",
        ),
        (
            b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            "w occurs twice",
        ),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, header: Any, message: str) -> None:
    path = _write(tmp_path / "bad.safetensors", header, b"\0" * 8)
    with pytest.raises(CheckpointError, match=f"bad.safetensors: .*{message}|bad.*{message}"):
        read_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = _write(tmp_path / "a.safetensors", {"w": _entry("F32", [2], 0, 8)}, b"\0" * 8)
    content = whole.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            read_file(cut)


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated in its header"):
        read_file(path)
