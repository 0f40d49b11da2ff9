"""Measures a model on a text: `python -m tools.evaluate perplexity --model … --text FILE`.

The text is encoded once and cut into windows of `--context` tokens that do not overlap; the rest
that fills no window is left out. Where the model asks for a beginning-of-sequence id, it takes
the place of the first token of every window, as llama.cpp does. Every token of a window but the
first is scored; with `--second-half`, llama.cpp's convention, only the tokens after the first
context / 2 + 1. The core computes exactly what it computes when it serves.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import fulcrum_core
import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.config import QUANTIZATIONS, ConfigError, EngineConfig
from engine.loader import load_model
from engine.tokenizer.protocol import Tokenizer

# Tokens of a step: wide enough that the linear layers are limited by arithmetic.
_STEP_TOKENS = 1024


class Perplexity(msgspec.Struct, frozen=True, kw_only=True):
    """Result of a run; the standard error treats windows as independent samples."""

    perplexity: float
    standard_error: float  # NaN for a single window
    mean_negative_log_likelihood: float  # nats per token
    num_windows: int
    num_scored_tokens: int


def cut_windows(
    token_ids: list[int], context: int, bos_token_id: int | None
) -> NDArray[np.int32]:  # (windows, context)
    """Cut the ids into windows and put the id, if any, in place of each window's first."""
    num_windows = len(token_ids) // context
    ids = np.array(token_ids[: num_windows * context], np.int32).reshape(num_windows, context)
    if bos_token_id is not None:
        ids[:, 0] = bos_token_id
    return ids


def encode_text(tokenizer: Tokenizer, text: str) -> tuple[list[int], int | None]:
    """Return the text's ids, and the id that begins every window or None."""
    ids = tokenizer.encode(text, add_bos=True, parse_special=False)
    bos = tokenizer.bos_token_id
    return ids, bos if bos is not None and ids[:1] == [bos] else None


def summarize(log_probs: NDArray[np.float64]) -> Perplexity:
    """Reduce the log probabilities (windows, scored tokens) to perplexity and its error."""
    means = -log_probs.mean(axis=1)
    perplexity = math.exp(means.mean())
    spread = float(means.std(ddof=1)) if len(means) > 1 else math.nan
    return Perplexity(
        perplexity=perplexity,
        standard_error=perplexity * spread / math.sqrt(len(means)),
        mean_negative_log_likelihood=float(means.mean()),
        num_windows=len(means),
        num_scored_tokens=log_probs.size,
    )


class WindowScorer:
    """Computes log probabilities of windows with the core, several windows in a step."""

    def __init__(self, core: Any, context: int, first_scored: int) -> None:
        """Bind buffers of its own to `core` and size its cache, whose dtype stays; the core serves
        nothing else."""
        self._core = core
        self._context = context
        self._first_scored = first_scored
        self.batch_size = max(1, _STEP_TOKENS // context)
        self._max_tokens = min(_STEP_TOKENS, self.batch_size * context)
        self._num_blocks = -(-context // core.block_size)  # of one window
        core.allocate_kv(self.batch_size * self._num_blocks)
        self._buffers = self._make_buffers()
        core.bind(**self._buffers)

    def _make_buffers(self) -> dict[str, NDArray[Any]]:
        rows, sequences = self._max_tokens, self.batch_size
        blocks = np.arange(sequences * self._num_blocks, dtype=np.int32)
        buffers: dict[str, NDArray[Any]] = {
            "query_start": np.zeros(sequences + 1, np.int32),
            "seq_lens": np.zeros(sequences, np.int32),
            "block_table": blocks.reshape(sequences, self._num_blocks),
            "seed": np.zeros(rows, np.uint64),
            "bias_start": np.zeros(rows + 1, np.int32),
            "history_ids": np.zeros(1, np.int32),
            "bias_ids": np.zeros(1, np.int32),
            "bias_values": np.zeros(1, np.float32),
            "top_ids": np.zeros((rows, 20), np.int32),
            "top_logprobs": np.zeros((rows, 20), np.float32),
        }
        for name in ("token_ids", "positions", "slot_mapping", "logits_rows", "target_ids"):
            buffers[name] = np.zeros(rows, np.int32)
        for name in ("top_k", "num_logprobs", "noise_position", "sampled_ids"):
            buffers[name] = np.zeros(rows, np.int32)
        for name in ("history_start", "history_output_start", "history_end"):
            buffers[name] = np.zeros(rows, np.int32)
        for name in ("temperature", "min_p", "presence_penalty", "frequency_penalty"):
            buffers[name] = np.zeros(rows, np.float32)
        for name in ("top_p", "repetition_penalty"):
            buffers[name] = np.ones(rows, np.float32)
        buffers["sampled_logprobs"] = np.zeros(rows, np.float32)
        return buffers

    def score(self, windows: NDArray[np.int32]) -> NDArray[np.float64]:
        """Return the log probabilities (windows, context - first_scored) of at most batch_size
        windows (windows, context).

        Raises ArithmeticError where the model computes something that is no number.
        """
        num_windows = len(windows)
        chunk = self._max_tokens // num_windows
        scores = np.zeros((num_windows, self._context - self._first_scored))
        for begin in range(0, self._context, chunk):
            self._step(windows, begin, min(begin + chunk, self._context), scores)
        if not np.isfinite(scores).all():
            raise ArithmeticError("the model gives log probabilities that are not finite")
        return scores

    def _step(
        self, windows: NDArray[np.int32], begin: int, end: int, scores: NDArray[np.float64]
    ) -> None:
        """Compute the tokens [begin, end) of every window; fill what they predict in scores."""
        num_windows, length = len(windows), end - begin
        num_tokens = num_windows * length
        positions = np.arange(begin, end, dtype=np.int32)
        blocks = self._buffers["block_table"][:num_windows]
        block_size = self._core.block_size
        slots = blocks[:, positions // block_size] * block_size + positions % block_size
        # The row of position p predicts the token at p + 1.
        predicting = positions[
            (positions >= self._first_scored - 1) & (positions < self._context - 1)
        ]
        first_rows = np.arange(num_windows, dtype=np.int32)[:, None] * length
        rows = first_rows + (predicting - begin)[None, :]
        for name, values in (
            ("token_ids", windows[:, begin:end]),
            ("positions", np.broadcast_to(positions, (num_windows, length))),
            ("slot_mapping", slots),
            ("query_start", np.arange(num_windows + 1) * length),
            ("seq_lens", np.full(num_windows, end)),
            ("logits_rows", rows),
            ("target_ids", windows[:, predicting + 1]),
        ):
            self._buffers[name][: values.size] = values.ravel()
        self._core.step(num_tokens, num_windows, rows.size)
        columns = predicting + 1 - self._first_scored
        scores[:, columns] = self._buffers["sampled_logprobs"][: rows.size].reshape(rows.shape)


class _Bar:
    """Progress on stderr: a bar on a terminal, otherwise a line every tenth."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._terminal = sys.stderr.isatty()
        self._next_line = 0.1

    def show(self, done: int, perplexity: float) -> None:
        share = done / self._total
        text = f"{done}/{self._total} windows, perplexity {perplexity:.4f}"
        if self._terminal:
            bar = ("#" * round(30 * share)).ljust(30)
            end = "\n" if done == self._total else ""
            print(f"\r[{bar}] {text}", end=end, file=sys.stderr, flush=True)
        elif share >= self._next_line:
            self._next_line = share + 0.1
            print(text, file=sys.stderr, flush=True)


def measure_perplexity(options: argparse.Namespace) -> dict[str, Any]:
    """Load the model, score the text, and return the figures with the settings they hold for."""
    context = options.context
    text = options.text.read_text(encoding="utf-8")
    config = EngineConfig(
        model=options.model,
        quantization=options.quantization,
        kv_dtype=options.kv_dtype,
        num_threads=options.threads,
        isa=options.isa,
        max_model_len=context,
        max_sequences=1,  # the scorer sizes the cache itself
    )
    model = load_model(config, progress=None)
    ids, bos = encode_text(model.tokenizer, text)
    windows = cut_windows(ids, context, bos)[: options.max_chunks]
    if len(windows) == 0:
        raise ConfigError(f"{options.text}: {len(ids)} tokens do not fill --context {context}")
    first_scored = context // 2 + 1 if options.second_half else 1
    scorer = WindowScorer(model.core, context, first_scored)
    log_probs = np.zeros((len(windows), context - first_scored))
    bar = _Bar(len(windows))
    started_s = time.perf_counter()
    for begin in range(0, len(windows), scorer.batch_size):
        end = min(begin + scorer.batch_size, len(windows))
        log_probs[begin:end] = scorer.score(windows[begin:end])
        bar.show(end, math.exp(-log_probs[:end].mean()))
    wall_s = time.perf_counter() - started_s
    return {
        "model": model.name,
        "quantization": options.quantization,
        "formats": model.formats,
        "kv_dtype": model.kv_dtype,
        "isa": model.isa,
        "threads": model.num_threads,
        "text": str(options.text),
        "context": context,
        "second_half": options.second_half,
        **msgspec.structs.asdict(summarize(log_probs)),
        "computed_tokens_per_s": windows.size / wall_s,
        "wall_s": wall_s,
    }


def _at_least(minimum: int) -> Any:
    def parse(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {minimum}")
        return value

    return parse


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.evaluate", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("perplexity", help="perplexity with its standard error").add_argument
    add("--model", required=True, help="as the server's: short name, folder, .gguf file, hub id")
    add("--text", type=Path, required=True, help="UTF-8 text file")
    add("--context", type=_at_least(2), default=512, help="tokens of a window (%(default)s)")
    add("--second-half", action="store_true", help="score as llama.cpp's perplexity tool does")
    add("--max-chunks", type=_at_least(1), help="only the first so many windows")
    add("--quantization", default="auto", help=f"{', '.join(QUANTIZATIONS)} (%(default)s)")
    add("--kv-dtype", default="auto", help="auto, bf16 or int8 (%(default)s)")
    add("--threads", type=_at_least(1), help="of the core; default: physical cores")
    add("--isa", help=f"force an instruction set: {', '.join(fulcrum_core.isas())}")
    add("--json", type=Path, help="write the figures to this file as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 2 when the settings cannot work."""
    options = parse_options(arguments)
    try:
        figures = measure_perplexity(options)
    except (ConfigError, ValueError, OSError, ArithmeticError) as failure:
        print(f"tools.evaluate: {failure}", file=sys.stderr)
        return 2
    print(
        f"{figures['model']}, {figures['formats']}, KV {figures['kv_dtype']}, "
        f"{figures['isa']}: "
        f"perplexity {figures['perplexity']:.4f} ± {figures['standard_error']:.4f} "
        f"({figures['num_windows']} windows of {figures['context']}, "
        f"{figures['num_scored_tokens']} tokens scored, "
        f"{figures['computed_tokens_per_s']:.0f} tokens/s)"
    )
    if options.json:
        # NaN, the error of a single window, becomes null.
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
