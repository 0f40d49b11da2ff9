"""What --model may be, where the cache is, and how progress shows itself."""

import io
from pathlib import Path

import pytest

from engine.checkpoint.cache import cache_folder
from engine.checkpoint.progress import SilentProgress, StreamProgress
from engine.checkpoint.sources import resolve
from engine.config import ConfigError
from tools import fetch


def test_paths_of_either_kind_are_taken_as_they_are(tmp_path: Path) -> None:
    gguf = tmp_path / "some.model.gguf"
    gguf.touch()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").touch()
    (folder / "model.safetensors").touch()
    file, directory = resolve(str(gguf)), resolve(str(folder) + "/")
    assert (file.name, file.path, file.kind) == ("some.model", gguf, "gguf")
    assert (directory.name, directory.path, directory.kind) == ("mine", folder, "folder")
    assert resolve(str(tmp_path)).path == gguf  # the only .gguf there


@pytest.mark.parametrize(
    "model", ["nothing-of-this-name", "/no/such/folder", "absent.gguf", "a/b/c"]
)
def test_what_is_nothing_known_is_refused_with_the_choices(model: str) -> None:
    with pytest.raises(ConfigError, match=r"no such file.*smollm2-135m.*org/name") as caught:
        resolve(model, SilentProgress())
    assert "\n" not in str(caught.value)


def test_folders_and_files_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"must be a \.gguf"):
        resolve(str(tmp_path / "weights.bin"))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"holds 2 \.gguf files"):
        resolve(str(tmp_path))


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("FULCRUM_CACHE")
    assert cache_folder() == Path("/shared/fulcrum")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/fulcrum")


def test_a_cache_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="FULCRUM_CACHE"):
        resolve("smollm2-135m", SilentProgress())


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    terminal, log = io.StringIO(), io.StringIO()
    for stream, is_terminal in ((terminal, True), (log, False)):
        progress = StreamProgress(stream, is_terminal=is_terminal)
        progress.start("Fetching tiny", 2_000_000)
        for _ in range(8):
            progress.advance(250_000)
        progress.finish()
    assert "[" + "#" * 30 + "] 100% of 2.0 MB\n" in terminal.getvalue()
    assert log.getvalue().splitlines() == [
        "Fetching tiny (2.0 MB)",
        *(f"Fetching tiny: {share} % of 2.0 MB" for share in (25, 50, 75, 100)),
    ]


def test_the_fetch_tool_prints_the_path_or_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.gguf").touch()
    assert fetch.main([str(tmp_path / "a.gguf")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.gguf'}\n"
    assert fetch.main(["nothing-of-this-name"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tools.fetch: --model nothing-of-this-name")
