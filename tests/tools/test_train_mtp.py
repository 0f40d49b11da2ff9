"""tools.train_mtp as a person runs it, on a tiny random model: killed twice, gone on with, used."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine.checkpoint.progress import SilentProgress
from engine.checkpoint.safetensors import read_file
from engine.config import EngineConfig
from engine.loader import load_model
from engine.speculation.setup import OFF
from tests.engine.speculation.planted import Planted
from tests.engine.test_invariance import GREEDY, MAX_MODEL_LEN, Result, RunningEngine
from tests.engine.tiny_model import make_tiny_model
from tools import train_mtp

# Seven files of answers, written one after the other, and two epochs of batches: long enough to be
# killed in between.
SIZES = [
    *("--answer-tokens", "5000", "--shard-prompts", "20", "--max-answer-tokens", "40"),
    *("--num-sequences", "4", "--max-prompt-tokens", "40", "--rows", "9000"),
    *("--draft-vocab", "200", "--threads", "1"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return make_tiny_model(folder, seed=5, max_position_embeddings=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i} plus {i}?"}) + "\n" for i in range(130)))
    return path


def _arguments(model_folder: Path, prompts: Path, out: Path, interval_s: str) -> list[str]:
    return [
        *("--model", str(model_folder), "--prompts", str(prompts), "--out", str(out)),
        *("--report-interval-s", interval_s),
        *SIZES,
    ]


def _run_until(arguments: list[str], mark: str | None) -> str:
    """Run the command, kill it at the first line that matches `mark`, return what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.train_mtp", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if mark is not None and re.match(mark, line):
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    expected = 0 if mark is None else -signal.SIGKILL
    assert process.returncode == expected, "".join(lines)
    return "".join(lines)


def test_a_run_that_was_killed_twice_ends_with_the_same_head_and_it_drafts(
    model_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert train_mtp.main(_arguments(model_folder, prompts, whole, "1e9")) == 0

    arguments = _arguments(model_folder, prompts, resumed, "0")
    _run_until(arguments, "answers: [1-9]")
    assert len(list(Path(f"{resumed}.work/answers").glob("answers-?????.npz"))) < 6
    _run_until(arguments, r"\d+% trained")
    assert not resumed.exists()
    assert "goes on after" in _run_until(arguments, None)
    for name in ("model.safetensors", "config.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    assert _num_accepted(model_folder, resumed) > 0


def _num_accepted(model_folder: Path, head: Path) -> int:
    """How many of the head's drafts the engine accepts, its text being that without drafts."""
    config = EngineConfig(
        model=str(model_folder), max_model_len=MAX_MODEL_LEN, speculation="mtp", mtp_head=str(head)
    )
    model = load_model(config, progress=SilentProgress())
    assert model.speculation.drafters == ("mtp",)
    speculation: Any = Planted(
        mode="mtp", hidden_size=model.spec.hidden_size, mtp=model.speculation.mtp, made=[]
    )

    def answer(speculation: Any) -> Result:
        run = RunningEngine(model, max_sequences=1, speculation=speculation)
        run.submit(0, list(b"12 plus 12?"), replace(GREEDY, max_tokens=200))
        result = run.result(0)
        run.stop()
        return result

    assert answer(speculation) == answer(OFF)
    return int(speculation.made[0].num_accepted)


def test_other_settings_do_not_go_on_with_what_was_begun(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = _arguments(model_folder, prompts, tmp_path / "head", "1e9")
    assert train_mtp.main([*arguments, "--rows", "1"]) == 0
    assert train_mtp.main([*arguments, "--rows", "1", "--seed", "2"]) == 2
    assert "was begun with seed 1, not 2; take another --work" in capsys.readouterr().err


def test_a_head_goes_on_from_another_one(
    model_folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    # Matrices do not move at a step size of 0: the second head's are the first one's.
    assert train_mtp.main([*_arguments(model_folder, prompts, first, "1e9"), "--rows", "1"]) == 0
    arguments = [*_arguments(model_folder, prompts, second, "1e9"), "--start-from", str(first)]
    options = ["--work", f"{first}.work", "--rows", "2", "--matrix-lr", "0"]
    (tmp_path / "first.work" / "checkpoint.pt").unlink()
    assert train_mtp.main([*arguments, *options]) == 0
    heads = [read_file(folder / "model.safetensors") for folder in (first, second)]
    for name in ("eh_proj.weight", "mlp.down_proj.weight"):
        np.testing.assert_array_equal(heads[0][name].floats(), heads[1][name].floats())

    other = make_tiny_model(tmp_path / "other", seed=6, max_position_embeddings=MAX_MODEL_LEN)
    arguments = _arguments(other, prompts, third, "1e9")
    assert train_mtp.main([*arguments, "--rows", "1", "--start-from", str(first)]) == 2
    assert "was trained for another model" in capsys.readouterr().err


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "sitecustomize.py"
    blocked.write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'torch' "
        "else find(name, *rest)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tools.train_mtp", "--model", "m", "--prompts", "p", "--out", "o"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.returncode == 2
    assert done.stderr == "tools.train_mtp: needs PyTorch; pip install '.[train]'\n"
