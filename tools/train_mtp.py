"""Trains a multi-token-prediction head: `python -m tools.train_mtp --model … --prompts … --out …`.

The model answers the prompts; the head learns to foresee these answers a few tokens ahead, and is
judged by answers to prompts that were held out. Both parts may be interrupted: the same command
goes on where it stopped, and ends with the same head. The server takes it with `--mtp-head`.
Needs PyTorch: `pip install '.[train]'`.
"""

import argparse
import hashlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from engine.config import ConfigError, EngineConfig
from engine.loader import LoadedModel, ModelHeaders, load_model, read_headers
from engine.machine import physical_cores
from engine.models.mtp import HeadConfig, target_digest
from tools.mtp.answers import NUM_CONTEXT_TOKENS, AnswerWriter, write_shards
from tools.mtp.prompts import PromptSet, hold_out, read_prompts

if TYPE_CHECKING:
    from tools.mtp.train import Acceptance

_NUM_HELD_OUT = 64
_MIN_PROMPTS = 2 * _NUM_HELD_OUT


def train_head(options: argparse.Namespace) -> "Acceptance":
    """Generate, train and write the head; every part that is done already is skipped."""
    work = Path(options.work or f"{options.out}.work")
    work.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(options.prompts)
    if len(prompts) < _MIN_PROMPTS:
        raise ValueError(f"{options.prompts}: {len(prompts)} prompts; {_MIN_PROMPTS} are needed")
    config = _engine_config(options)
    headers = read_headers(config)
    digest = target_digest(headers.checkpoint.spec, headers.checkpoint.tensors)
    _keep_settings(work / "settings.json", options, digest)
    _generate(options, config, prompts, work)
    return _train(options, headers, digest, work)


def _engine_config(options: argparse.Namespace) -> EngineConfig:
    return EngineConfig(
        model=options.model,
        max_model_len=options.max_prompt_tokens + options.max_answer_tokens,
        max_sequences=options.num_sequences,
        max_step_tokens=max(256, options.num_sequences),
        num_threads=options.threads,
    )


def _keep_settings(path: Path, options: argparse.Namespace, digest: str) -> None:
    """Write what the answers depend on; raise ValueError where others were begun with."""
    settings = {
        "target_digest": digest,
        "prompts_sha256": hashlib.sha256(options.prompts.read_bytes()).hexdigest(),
        "seed": options.seed,
        "max_prompt_tokens": options.max_prompt_tokens,
        "max_answer_tokens": options.max_answer_tokens,
    }
    if not path.exists():
        path.write_bytes(msgspec.json.encode(settings))
        return
    for name, value in msgspec.json.decode(path.read_bytes()).items():
        if settings[name] != value:
            raise ValueError(
                f"{path}: was begun with {name} {value}, not {settings[name]}; take another --work"
            )


def _generate(
    options: argparse.Namespace, config: EngineConfig, prompts: list[str], work: Path
) -> None:
    """Have the model answer until there is enough."""
    model: LoadedModel = load_model(config)
    writer = AnswerWriter(
        model,
        num_sequences=options.num_sequences,
        max_prompt_tokens=options.max_prompt_tokens,
        max_answer_tokens=options.max_answer_tokens,
    )
    to_learn, held_out = hold_out(prompts, _NUM_HELD_OUT, options.seed)
    for folder, texts, num_tokens, shard_prompts in (
        ("held_out", held_out, 1, _NUM_HELD_OUT),
        ("answers", to_learn, options.answer_tokens, options.shard_prompts),
    ):
        progress = _Progress(folder, num_tokens)
        write_shards(
            work / folder,
            writer,
            PromptSet(texts, options.seed),
            options.seed,
            num_tokens,
            progress.show,
            shard_prompts,
        )


class _Progress:
    """Lines on standard error: how many answer tokens there are, and how long the rest takes."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total
        self._began_s = time.monotonic()
        self._first: int | None = None

    def show(self, done: int) -> None:
        if self._first is None:
            self._first = done
        elapsed_s = time.monotonic() - self._began_s
        line = f"{self._what}: {done} of {self._total} tokens"
        if done > self._first:
            per_s = (done - self._first) / elapsed_s
            left_min = max(0, self._total - done) / per_s / 60
            line += f", {per_s:.0f}/s, {left_min:.0f} min left"
        _say(line)


def _train(
    options: argparse.Namespace, headers: ModelHeaders, digest: str, work: Path
) -> "Acceptance":
    """Train on the answers that lie in `work` and write the head."""
    import torch

    from tools.mtp.dataset import AnswerSet
    from tools.mtp.export import load_weights, write_head
    from tools.mtp.target import new_module, read_embedding, read_head_rows
    from tools.mtp.train import Trainer, TrainSettings

    torch.set_num_threads(options.threads or physical_cores())
    spec, tensors = headers.checkpoint.spec, headers.checkpoint.tensors
    max_length = NUM_CONTEXT_TOKENS + options.max_answer_tokens
    answers, held_out = (
        AnswerSet(max_length=max_length, num_context_tokens=NUM_CONTEXT_TOKENS) for _ in range(2)
    )
    answers.load(work / "answers")
    held_out.load(work / "held_out")
    counts = answers.token_counts(spec.vocab_size)
    draft_ids = counts.topk(min(options.draft_vocab, spec.vocab_size)).indices.sort().values
    module = new_module(spec, options.seed)
    if options.start_from is not None:
        load_weights(options.start_from, module, digest)
    trainer = Trainer(
        module,
        read_embedding(spec, tensors),
        read_head_rows(spec, tensors, draft_ids),
        draft_ids,
        TrainSettings(num_rows=options.rows, matrix_lr=options.matrix_lr, seed=options.seed),
    )
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        trainer.load(checkpoint)
        _say(f"goes on after {trainer.num_rows} rows")
    trainer.run(answers, held_out, _say, checkpoint, options.report_interval_s)
    acceptance = trainer.evaluate(held_out)
    head_config = HeadConfig(
        target=headers.resolved.name,
        target_digest=digest,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        acceptance_by_position=tuple(round(share, 3) for share in acceptance.by_position),
        tokens_per_step=round(acceptance.tokens_per_step, 3),
    )
    write_head(options.out, trainer.module, draft_ids, head_config)
    return acceptance


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_mtp", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="as the server's: short name, folder, .gguf file, hub id")
    add("--prompts", type=Path, required=True, help='JSON lines with a "prompt" each, or .gz')
    add("--out", type=Path, required=True, help="folder to write the head into")
    add("--work", type=Path, help="folder of answers and checkpoint (default: OUT.work)")
    add("--answer-tokens", type=_positive, default=430_000, help="to learn from (%(default)s)")
    add("--rows", type=_positive, default=1_550_000, help="to train on (%(default)s)")
    add("--start-from", type=Path, help="head of the same model whose weights it starts from")
    add("--matrix-lr", type=float, default=0.02, help="step size of the matrices (%(default)s)")
    add("--draft-vocab", type=_positive, default=8192, help="tokens it drafts (%(default)s)")
    add("--max-prompt-tokens", type=_positive, default=768, help="(%(default)s)")
    add("--max-answer-tokens", type=_positive, default=320, help="(%(default)s)")
    add("--num-sequences", type=_positive, default=32, help="answered at once (%(default)s)")
    add("--shard-prompts", type=_positive, default=256, help="prompts of a file (%(default)s)")
    add("--report-interval-s", type=float, default=300.0, help="(%(default)s)")
    add("--seed", type=int, default=1, help="(%(default)s)")
    add("--threads", type=_positive, help="default: physical cores")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    """Train; 2 where the settings cannot work."""
    options = parse_options(arguments)
    if importlib.util.find_spec("torch") is None:
        _say("tools.train_mtp: needs PyTorch; pip install '.[train]'")
        return 2
    try:
        acceptance = train_head(options)
    except (ConfigError, ValueError, OSError, ArithmeticError) as failure:
        _say(f"tools.train_mtp: {failure}")
        return 2
    by_position = " ".join(f"{share:.3f}" for share in acceptance.by_position)
    print(
        f"{options.out}: accepted on held-out prompts by position {by_position}, "
        f"{acceptance.tokens_per_step:.3f} tokens per step"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
