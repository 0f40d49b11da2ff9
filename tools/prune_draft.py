"""Makes a draft model of a model: `python -m tools.prune_draft --model … --text … --out …`.

Layers are dropped one after the other, each time the one without which the text's perplexity rises
least, and then, with PyTorch, what is left learns its target's distribution for a while. The
result has the target's vocabulary and format; the server takes it with `--draft-model OUT`.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.checkpoint.tensor import StoredTensor
from engine.config import ConfigError, EngineConfig
from engine.loader import ModelHeaders, read_headers
from tools.evaluate import cut_windows, encode_text
from tools.prune.layers import (
    LayerMeter,
    choose_layers,
    kept_spec,
    kept_tensors,
    require_equal_layers,
)
from tools.prune.write import write_model


def prune(options: argparse.Namespace) -> str:
    """Choose, distil, write; returns what came of it."""
    headers = read_headers(EngineConfig(model=options.model, num_threads=options.threads))
    spec, tensors = headers.checkpoint.spec, headers.checkpoint.tensors
    require_equal_layers(spec)
    if not 0 < options.drop < spec.num_layers:
        raise ValueError(f"--drop {options.drop}: the model has {spec.num_layers} layers")
    windows = _windows(options, headers)
    judged = windows[: options.windows]
    meter = LayerMeter(spec, tensors, judged, isa=headers.isa, num_threads=headers.num_threads)
    kept = choose_layers(spec.num_layers, options.drop, meter.perplexity, _say)
    pruned = kept_tensors(spec, tensors, kept)
    if options.distil_tokens and importlib.util.find_spec("torch") is None:
        _say("no distillation: it needs PyTorch, pip install '.[train]'")
    elif options.distil_tokens:
        # What was measured is not learned: the figure below is of text that was not seen.
        pruned = _distil(options, headers, pruned, windows[options.windows :], len(kept))
    write_model(headers.resolved, options.out, pruned, len(kept))
    written = read_headers(EngineConfig(model=str(options.out), num_threads=options.threads))
    again = LayerMeter(
        written.checkpoint.spec,
        written.checkpoint.tensors,
        judged,
        isa=headers.isa,
        num_threads=headers.num_threads,
    )
    perplexity = again.perplexity(range(len(kept)))
    return f"{options.out}: layers {kept} of {spec.num_layers}, perplexity {perplexity:.3f}"


def _windows(options: argparse.Namespace, headers: ModelHeaders) -> NDArray[np.int32]:
    """The text, or the answers, as windows (windows, context)."""
    if options.answers is not None:
        paths = sorted(options.answers.glob("answers-?????.npz"))
        if not paths:
            raise ValueError(f"{options.answers}: holds no answers of tools.train_mtp")
        ids, bos = np.concatenate([np.load(path)["token_ids"] for path in paths]).tolist(), None
    else:
        tokenizer, _ = headers.checkpoint.read_text()
        ids, bos = encode_text(tokenizer, options.text.read_text(encoding="utf-8"))
    windows = cut_windows(ids, options.context, bos)
    needed = options.windows + (1 if options.distil_tokens else 0)
    if len(windows) < needed:
        raise ValueError(
            f"{len(ids)} tokens fill {len(windows)} windows of {options.context}; {needed} are "
            "needed"
        )
    return windows


def _distil(
    options: argparse.Namespace,
    headers: ModelHeaders,
    pruned: dict[str, StoredTensor],
    windows: NDArray[np.int32],
    num_layers: int,
) -> dict[str, StoredTensor]:
    import torch

    from tools.prune.decoder import Decoder
    from tools.prune.distil import distil, distilled_tensors

    torch.set_num_threads(headers.num_threads)
    spec = headers.checkpoint.spec
    teacher = Decoder(spec, headers.checkpoint.tensors)
    small = kept_spec(spec, range(num_layers))
    student = Decoder(small, pruned)
    distil(teacher, student, windows, options.distil_tokens, options.seed, _say)
    return distilled_tensors(student, small, pruned)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.prune_draft", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="as the server's: short name, folder, .gguf file, hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="UTF-8 text file to measure and learn on")
    source.add_argument("--answers", type=Path, help="or a folder of tools.train_mtp's answers")
    add("--out", type=Path, required=True, help="folder to write the draft model into")
    add("--drop", type=_count(1), required=True, help="number of layers to drop")
    add("--context", type=_count(2), default=256, help="tokens of a window (%(default)s)")
    add("--windows", type=_count(1), default=8, help="windows to measure on (%(default)s)")
    add("--distil-tokens", type=_count(0), default=200_000, help="to learn on (%(default)s)")
    add("--seed", type=int, default=1, help="(%(default)s)")
    add("--threads", type=_count(1), help="default: physical cores")
    return parser.parse_args(arguments)


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return parse


def main(arguments: list[str] | None = None) -> int:
    """Prune; 2 where the settings cannot work."""
    options = parse_options(arguments)
    try:
        print(prune(options))
    except (ConfigError, ValueError, OSError, ArithmeticError) as failure:
        _say(f"tools.prune_draft: {failure}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
