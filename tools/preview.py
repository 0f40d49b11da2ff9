"""Says what a model would take and give on this machine: `python -m tools.preview --model …`.

Prints who qualifies, the memory of FP16, INT8 and INT4 side by side, and the preview of one
setting, from the files' headers and micro-benchmarks of at most about five seconds. It starts no
server and loads no weights.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from engine.config import ConfigError, EngineConfig
from engine.ledger import mib
from engine.loader import read_headers
from engine.machine import available_memory_bytes
from engine.planning.cost_model import Interval, Speed
from engine.planning.memory import shortage_text
from engine.planning.preview import Level, Planner, Preview
from engine.planning.proposal import Proposal
from engine.planning.qualification import Technique, qualify


class _OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in a line, without the usage."""

    def error(self, message: str) -> NoReturn:
        print(f"tools.preview: {message}", file=sys.stderr)
        sys.exit(2)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; settings have the names of the preview endpoint's."""
    parser = _OneLineParser(prog="python -m tools.preview", description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="as the server's: short name, folder, .gguf file, hub id")
    add("--quantization", default="auto", help="auto, none, int8 or int4 (%(default)s)")
    add("--kv-dtype", default="auto", help="auto, bf16 or int8 (%(default)s)")
    add("--kv-memory", help="memory of the KV cache: 512MB, 2GiB")
    add("--max-model-len", type=int, help="tokens of prompt and output together")
    add("--max-sequences", type=int, help="sequences computed at once")
    add("--speculation", help="who drafts: auto, off, ngram, mtp or draft")
    add("--mtp-head", help="folder of a head that was trained for the model")
    add("--draft-model", help="a smaller model of the same vocabulary that drafts")
    add("--threads", type=int, help="of the core; default: physical cores")
    add("--concurrency", type=int, default=8, help="sequences together (%(default)s)")
    add("--prompt-tokens", type=int, default=128, help="of a request (%(default)s)")
    add("--output-tokens", type=int, default=128, help="of a request (%(default)s)")
    add("--no-speed", action="store_true", help="leave out what must be measured")
    add("--json", type=Path, help="write everything to this file as well")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; 2 where the settings cannot work, 1 where they do not fit."""
    options = parse_options(arguments)
    try:
        config = EngineConfig(
            model=options.model,
            num_threads=options.threads,
            mtp_head=options.mtp_head,
            draft_model=options.draft_model,
        )
        proposal = Proposal(
            quantization=options.quantization,
            kv_dtype=options.kv_dtype,
            kv_memory=options.kv_memory,
            max_model_len=options.max_model_len,
            max_sequences=options.max_sequences,
            speculation=options.speculation,
            concurrency=options.concurrency,
            prompt_tokens=options.prompt_tokens,
            output_tokens=options.output_tokens,
        )
        planner = Planner(read_headers(config))
        wanted = proposal.changed(config)
        techniques = qualify(planner.headers, wanted, planner.plan(wanted).context.kv_dtype)
        levels = planner.levels(wanted)
        print(_header(planner, techniques, levels), flush=True)
        preview = planner.preview(
            config,
            proposal,
            available_bytes=available_memory_bytes(),
            measure=not options.no_speed,
        )
    except ConfigError as error:
        print(f"tools.preview: {error}", file=sys.stderr)
        return 2
    print(preview_text(preview))
    if options.json:
        document = {"optimizations": techniques, "levels": levels, "preview": preview}
        try:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
        except OSError as error:
            print(f"tools.preview: --json {options.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if preview.memory.fits else 1


def _header(planner: Planner, techniques: Sequence[Technique], levels: Sequence[Level]) -> str:
    spec = planner.headers.checkpoint.spec
    title = (
        f"{planner.headers.resolved.name}: {spec.family}, {spec.num_layers} layers of "
        f"{spec.hidden_size}, vocabulary {spec.vocab_size}, made for {spec.max_position} tokens"
    )
    return "\n\n".join((title, techniques_table(techniques), levels_table(levels)))


def techniques_table(techniques: Sequence[Technique]) -> str:
    """A line for each technique: whether it qualifies, and why."""
    rows = [("technique", "qualifies", "evidence")]
    for row in techniques:
        needs = f"; needs {row.needs}" if row.needs else ""
        rows.append((row.name, "yes" if row.qualified else "no", row.evidence + needs))
    return _lay_out(rows)


def levels_table(levels: Sequence[Level]) -> str:
    """Memory by component, a column for each level."""
    rows = [("memory", *(f"{level.name} ({level.quantization})" for level in levels))]
    for name in levels[0].memory:
        rows.append((name, *(mib(level.memory[name]) for level in levels)))
    rows.append(("total", *(mib(level.total_bytes) for level in levels)))
    return _lay_out(rows, right=True)


def preview_text(preview: Preview) -> str:
    """The preview of one setting, line by line."""
    memory, routes, quality = preview.memory, preview.routes, preview.quality
    parts = ", ".join(f"{name} {mib(size)}" for name, size in memory.components.items() if size)
    rows = [
        ("setting", ", ".join(f"{k} {v}" for k, v in preview.setting.items() if v is not None)),
        ("formats", preview.formats),
        ("memory", f"{mib(memory.total_bytes)} of {mib(memory.available_bytes)}: {parts}"),
        ("routes", f"{routes.count} sequences of {routes.sequence_tokens} tokens at once"),
    ]
    if not memory.fits:
        rows.append(("short", shortage_text(memory)))
    if preview.speed is not None:
        rows += _speed_rows(preview.speed)
    rows.append(("speed from", preview.speed_basis))
    figures = ""
    if quality.kl_divergence is not None and quality.top1_agreement is not None:
        figures = (
            f": KL divergence {quality.kl_divergence:.4f} nats a token, the same most probable "
            f"token in {quality.top1_agreement:.1%}"
        )
    rows.append(("quality", f"{quality.basis}{figures} {quality.note}".rstrip()))
    return _lay_out(rows)


def _speed_rows(speed: Speed) -> list[tuple[str, str]]:
    drafts = "off"
    if speed.speculation != "off":
        drafts = (
            f"{speed.speculation_gain:.2f} times the tokens/s for one stream, "
            f"{speed.speculation_gain_together:.2f} together, {speed.speculation}"
        )
    return [
        ("drafts", drafts),
        ("decode", f"{_range(speed.decode_tokens_per_s)} tokens/s for one stream"),
        (
            "together",
            f"{_range(speed.total_tokens_per_s)} tokens/s for {speed.concurrency} streams",
        ),
        ("prefill", f"{_range(speed.prefill_tokens_per_s)} tokens/s"),
        ("TTFT", f"{_range(speed.ttft_ms)} ms for {speed.prompt_tokens} tokens"),
    ]


def _range(interval: Interval) -> str:
    return f"{interval.value:.0f} ({interval.low:.0f} to {interval.high:.0f})"


def _lay_out(rows: Sequence[tuple[str, ...]], *, right: bool = False) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width) if right else cell.ljust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
