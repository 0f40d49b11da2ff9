"""`python -m tools.preview` as a person calls it: tables, exit codes, one line for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def _preview(model: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.preview", "--model", str(model), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_it_prints_the_tables_and_writes_them_as_json(
    default_model_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "preview.json"
    done = _preview(
        default_model_path,
        *("--quantization", "int8", "--kv-memory", "64MiB", "--speculation", "off"),
        *("--no-speed", "--json", str(path)),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "FP16 (none)" in done.stdout
    assert "int8 (211)" in done.stdout
    document = json.loads(path.read_bytes())
    fp16, int8, int4 = (level["memory"] for level in document["levels"])
    assert fp16["weights"] > 1.5 * int8["weights"] > int4["weights"]
    preview = document["preview"]
    assert preview["setting"]["quantization"] == "int8"
    assert preview["memory"]["components"]["weights"] == int8["weights"]
    assert preview["memory"]["components"]["draft"] == 0
    names = {row["name"] for row in document["optimizations"]}
    assert {"weights int8", "KV int8", "speculation ngram", "prefix cache"} <= names


def test_speed_is_measured_where_it_is_asked_for(
    default_model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path))
    done = _preview(default_model_path, "--kv-memory", "64MiB", "--speculation", "ngram")
    assert done.returncode == 0, done.stderr
    assert "tokens/s for one stream" in done.stdout
    assert "micro-benchmarks of" in done.stdout
    assert "estimated" in done.stdout


def test_what_does_not_fit_ends_with_1_and_says_what_would(default_model_path: Path) -> None:
    done = _preview(default_model_path, "--kv-memory", "900GiB", "--no-speed")
    assert done.returncode == 1
    assert "KV int8 for as many tokens frees" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantization", "int3"], "choose auto"),
        (["--kv-memory", "lots"], "is no size"),
        (["--concurrency", "many"], "many"),
        (["--concurrency", "0"], "at least 1"),
        (["--speculation", "luck"], "choose"),
        (["--max-model-len", "9000"], "made for 8192"),
        (["--colour", "red"], "colour"),
        (["--kv-memory", "64MiB", "--no-speed", "--json", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    default_model_path: Path, options: list[str], message: str
) -> None:
    done = _preview(default_model_path, *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tools.preview: ")
    assert message in line
