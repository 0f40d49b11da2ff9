"""tools.evaluate against a core whose probabilities are known in closed form."""

import json
import math
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tools import evaluate

VOCABULARY = 17
BOS = 16


class BigramCore:
    """Predicts each token from the one before it, which it reads back from its paged cache."""

    block_size = 4

    def __init__(self) -> None:
        logits = np.random.default_rng(7).normal(size=(VOCABULARY, VOCABULARY))
        self.log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        self.buffers: dict[str, NDArray[Any]] = {}
        self.num_steps = 0

    def allocate_kv(self, num_blocks: int) -> None:
        self.cache = np.full((num_blocks * self.block_size, 2), -1)

    def bind(self, **buffers: NDArray[Any]) -> None:
        assert all(buffer.flags.c_contiguous for buffer in buffers.values())
        self.buffers |= buffers

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        self.num_steps += 1
        b = self.buffers
        slots = b["slot_mapping"][:num_tokens]
        self.cache[slots, 0] = b["token_ids"][:num_tokens]
        self.cache[slots, 1] = b["positions"][:num_tokens]
        rows = b["logits_rows"][:num_rows]
        assert (np.diff(rows) > 0).all()
        for index, row in enumerate(rows):
            sequence = int(np.searchsorted(b["query_start"][: num_sequences + 1], row, "right")) - 1
            last = b["seq_lens"][sequence] - (b["query_start"][sequence + 1] - row)
            block = b["block_table"][sequence, last // self.block_size]
            token, position = self.cache[block * self.block_size + last % self.block_size]
            assert position == last
            b["sampled_logprobs"][index] = self.log_probs[token, b["target_ids"][index]]


class Letters:
    """One id a letter; puts a beginning-of-sequence id first when told so at construction."""

    def __init__(self, adds_bos: bool) -> None:
        self.bos_token_id = BOS
        self._adds_bos = adds_bos

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        assert not parse_special
        ids = [ord(letter) - ord("a") for letter in text]
        return [BOS, *ids] if add_bos and self._adds_bos else ids


def measure(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    text: str,
    *options: str,
    adds_bos: bool = False,
) -> tuple[int, dict[str, Any], BigramCore]:
    core = BigramCore()

    def load(config: Any, progress: Any) -> Any:
        return types.SimpleNamespace(
            core=core,
            tokenizer=Letters(adds_bos),
            name="bigrams",
            formats="float",
            kv_dtype="bf16",
            isa="none",
            num_threads=1,
        )

    monkeypatch.setattr(evaluate, "load_model", load)
    path, figures = tmp_path / "text", tmp_path / "figures.json"
    path.write_text(text)
    code = evaluate.main(
        ["perplexity", "--model", "m", "--text", str(path), "--json", str(figures), *options]
    )
    return code, json.loads(figures.read_text()) if figures.exists() else {}, core


def random_text(length: int) -> str:
    ids = np.random.default_rng(3).integers(0, 16, length)
    return "".join(chr(ord("a") + i) for i in ids)


def expected(windows: list[list[int]], first_scored: int) -> tuple[float, float]:
    table = BigramCore().log_probs
    means = [
        np.mean(
            [-table[a, b] for a, b in zip(w[first_scored - 1 :], w[first_scored:], strict=False)]
        )
        for w in windows
    ]
    perplexity = math.exp(np.mean(means))
    return perplexity, perplexity * float(np.std(means, ddof=1)) / math.sqrt(len(means))


def letters(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


@pytest.mark.parametrize("context", [2, 7, 8, 50])
@pytest.mark.parametrize("step_tokens", [5, 16, 1024])
def test_perplexity_is_that_of_the_windows_whatever_the_steps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, context: int, step_tokens: int
) -> None:
    monkeypatch.setattr(evaluate, "_STEP_TOKENS", step_tokens)
    text = random_text(3 * context + context // 2)
    code, figures, _ = measure(monkeypatch, tmp_path, text, "--context", str(context))
    windows = [letters(text[i * context : (i + 1) * context]) for i in range(3)]
    perplexity, error = expected(windows, 1)
    assert code == 0
    assert figures["num_windows"] == 3
    assert figures["num_scored_tokens"] == 3 * (context - 1)
    assert figures["perplexity"] == pytest.approx(perplexity, rel=1e-6)
    assert figures["standard_error"] == pytest.approx(error, rel=1e-4)


def test_second_half_scores_what_llama_cpp_scores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = random_text(16)
    _, figures, _ = measure(monkeypatch, tmp_path, text, "--context", "8", "--second-half")
    # Logits of the positions 4 to 6 of each window predict its tokens 5 to 7.
    assert figures["num_scored_tokens"] == 2 * 3
    windows = [letters(text[:8]), letters(text[8:])]
    assert figures["perplexity"] == pytest.approx(expected(windows, 5)[0], rel=1e-6)


def test_bos_takes_the_place_of_each_windows_first_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = random_text(15)
    _, figures, _ = measure(monkeypatch, tmp_path, text, "--context", "8", adds_bos=True)
    windows = [[BOS, *letters(text[:7])], [BOS, *letters(text[8:])]]
    assert figures["perplexity"] == pytest.approx(expected(windows, 1)[0], rel=1e-6)


def test_several_windows_share_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluate, "_STEP_TOKENS", 32)
    _, figures, core = measure(monkeypatch, tmp_path, random_text(80), "--context", "8")
    assert figures["num_windows"] == 10
    assert core.num_steps == 3


def test_max_chunks_limits_the_windows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--context", "8", "--max-chunks", "1")
    _, figures, _ = measure(monkeypatch, tmp_path, random_text(80), *options)
    assert figures["num_windows"] == 1
    assert figures["standard_error"] is None


def test_a_text_shorter_than_a_window_is_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = measure(monkeypatch, tmp_path, random_text(7), "--context", "8")
    assert code == 2
    assert "7 tokens do not fill --context 8" in capsys.readouterr().err


def test_probabilities_that_are_no_numbers_are_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        BigramCore, "step", lambda self, *_: self.buffers["sampled_logprobs"].fill(np.nan)
    )
    code, _, _ = measure(monkeypatch, tmp_path, random_text(16), "--context", "8")
    assert code == 2
    assert "not finite" in capsys.readouterr().err
