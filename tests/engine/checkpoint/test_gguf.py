"""GGUF files written by the reference package are read back; broken ones are refused by name."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.tensor import CheckpointError


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _entry(key: bytes, type_id: int, value: bytes) -> bytes:
    return _string(key) + struct.pack("<I", type_id) + value


def _info(name: bytes, dims: tuple[int, ...], type_id: int, offset: int) -> bytes:
    packed = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return _string(name) + packed + struct.pack("<IQ", type_id, offset)


def _file(
    path: Path,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    entries: tuple[bytes, ...] = (),
    infos: tuple[bytes, ...] = (),
    data: bytes = b"",
    counts: tuple[int, int] | None = None,
) -> Path:
    num_tensors, num_entries = counts or (len(infos), len(entries))
    header = magic + struct.pack("<IQQ", version, num_tensors, num_entries)
    header += b"".join(entries) + b"".join(infos)
    header += b"\0" * (-len(header) % 32)
    path.write_bytes(header + data)
    return path


def test_metadata_and_tensors_of_the_reference_writer_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    weights = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q4_1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -3)
    writer.add_uint64("u64", 2**63 + 1)
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e-300)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 漢字 🎉")
    writer.add_array("words", ["", "a", "Ġb", "é"])
    writer.add_array("numbers", [-1, 0, 7])
    writer.add_array("flags", [True, False])
    writer.add_tensor("floats", weights)
    writer.add_tensor("halves", weights.astype(np.float16))
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GgufFile(path)

    assert file.architecture == "llama"
    metadata = file.metadata
    assert metadata["u8"] == 200
    assert metadata["i16"] == -3
    assert metadata["u64"] == 2**63 + 1
    assert metadata["f32"] == 0.5
    assert metadata["f64"] == 1e-300
    assert metadata["yes"] is True
    assert metadata["text"] == "naïve 漢字 🎉"
    assert metadata["words"] == ["", "a", "Ġb", "é"]
    assert metadata["numbers"] == [-1, 0, 7]
    assert metadata["flags"] == [True, False]
    assert {name: (t.shape, t.block_type) for name, t in file.tensors.items()} == {
        "floats": ((3, 64), "F32"),
        "halves": ((3, 64), "F16"),
        "blocks": ((3, 64), "Q4_1"),
    }
    np.testing.assert_array_equal(file.tensors["floats"].floats(), weights)
    np.testing.assert_array_equal(
        file.tensors["halves"].floats(), weights.astype(np.float16).astype(np.float32)
    )
    np.testing.assert_array_equal(file.tensors["blocks"].data, blocks.reshape(-1))
    assert not file.tensors["blocks"].data.flags.writeable


def test_version_2_nested_arrays_and_broken_utf8_are_read(tmp_path: Path) -> None:
    inner = struct.pack("<IQ", 5, 2) + struct.pack("<2i", 1, -2)
    nested = struct.pack("<IQ", 9, 2) + inner + inner
    path = _file(
        tmp_path / "v2.gguf",
        version=2,
        entries=(_entry(b"nested", 9, nested), _entry(b"raw", 8, _string(b"\xff\xfea"))),
    )
    metadata = GgufFile(path).metadata
    assert metadata["nested"] == [[1, -2], [1, -2]]
    assert metadata["raw"].encode("utf-8", "surrogateescape") == b"\xff\xfea"


def test_alignment_of_the_metadata_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "aligned.gguf"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    header += _entry(b"general.alignment", 4, struct.pack("<I", 256)) + _info(b"t", (2,), 0, 0)
    header += b"\0" * (-len(header) % 256)
    path.write_bytes(header + struct.pack("<2f", 1.5, -2.0))
    np.testing.assert_array_equal(GgufFile(path).tensors["t"].floats(), [1.5, -2.0])


_HUGE = struct.pack("<Q", 2**60)
_ENTRY_HEADS = {
    "string": _string(b"key") + struct.pack("<I", 8) + _HUGE,
    "array": _string(b"key") + struct.pack("<II", 9, 5) + _HUGE,
    "array of strings": _string(b"key") + struct.pack("<II", 9, 8) + _HUGE,
    "array of arrays": _string(b"key") + struct.pack("<II", 9, 9) + _HUGE,
}


@pytest.mark.parametrize("kind", list(_ENTRY_HEADS))
def test_an_absurd_length_is_refused_without_allocating_it(tmp_path: Path, kind: str) -> None:
    path = _file(tmp_path / "bad.gguf", entries=(_ENTRY_HEADS[kind],))
    with pytest.raises(CheckpointError, match=r"bad\.gguf: truncated.*key|bad\.gguf.*key"):
        GgufFile(path)


@pytest.mark.parametrize("counts", [(2**60, 0), (0, 2**60)])
def test_absurd_counts_are_refused(tmp_path: Path, counts: tuple[int, int]) -> None:
    with pytest.raises(CheckpointError, match="truncated"):
        GgufFile(_file(tmp_path / "bad.gguf", counts=counts))


def test_files_of_other_kinds_and_versions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a GGUF file"):
        GgufFile(_file(tmp_path / "a.gguf", magic=b"GGML"))
    with pytest.raises(CheckpointError, match="version 1"):
        GgufFile(_file(tmp_path / "b.gguf", version=1))
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "empty.gguf")
    with pytest.raises(CheckpointError, match="cannot be read"):
        GgufFile(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ((_info(b"w", (64, 2), 0, 0),), "truncated: tensor w"),
        ((_info(b"w", (1,), 0, 2**62),), "truncated: tensor w"),
        ((_info(b"w", (2**62, 2**62), 0, 0),), "truncated: tensor w"),
        ((_info(b"w", (1,), 99, 0),), "tensor w has block type 99"),
        ((_info(b"w", (33,), 2, 0),), "tensor w has shape"),
        ((_info(b"w", (0,), 0, 0),), "tensor w has shape"),
        ((_info(b"w", (1, 1, 1, 1, 1), 0, 0),), "tensor w has 5 dimensions"),
        ((_info(b"w", (1,), 0, 0), _info(b"w", (1,), 0, 0)), "tensor w occurs twice"),
    ],
)
def test_a_broken_tensor_is_named(tmp_path: Path, infos: tuple[bytes, ...], message: str) -> None:
    path = _file(tmp_path / "bad.gguf", infos=infos, data=b"\0" * 64)
    with pytest.raises(CheckpointError, match=f"bad.gguf: {message}"):
        GgufFile(path)


def test_every_truncation_of_a_header_is_refused(tmp_path: Path) -> None:
    words = struct.pack("<IQ", 8, 2) + _string(b"a") + _string(b"bc")
    whole = _file(
        tmp_path / "whole.gguf",
        entries=(_entry(b"words", 9, words), _entry(b"n", 4, b"\1\0\0\0")),
        infos=(_info(b"w", (8,), 0, 0),),
        data=b"\0" * 32,
    )
    content = whole.read_bytes()
    assert GgufFile(whole).metadata == {"words": ["a", "bc"], "n": 1}
    cut = tmp_path / "cut.gguf"
    for length in range(1, len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GgufFile(cut)


def test_doubled_keys_unknown_types_and_bad_alignment_are_refused(tmp_path: Path) -> None:
    one = _entry(b"n", 4, b"\1\0\0\0")
    with pytest.raises(CheckpointError, match="key n occurs twice"):
        GgufFile(_file(tmp_path / "a.gguf", entries=(one, one)))
    with pytest.raises(CheckpointError, match="key n has unknown type 77"):
        GgufFile(_file(tmp_path / "b.gguf", entries=(_entry(b"n", 77, b"\0" * 8),)))
    alignment = _entry(b"general.alignment", 4, b"\3\0\0\0")
    with pytest.raises(CheckpointError, match="not a power of two"):
        GgufFile(_file(tmp_path / "c.gguf", entries=(alignment,)))
