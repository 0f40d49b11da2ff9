"""What speculation gains: `python -m bench.speculate --url … --model … --prompts spec_bench.jsonl`.

Sends each prompt once in every mode, `off` among them: the modes take turns in one run, and each in
turn goes first. That is done one request after the other, or with --streams so many at once. With
--sweep, also several streams at once, `off` against `auto` in turns. The server must be Fulcrum:
modes are chosen per request, and tokens per step are read from its usage. Texts are compared with
those of `off`.

Speed is that of decoding: tokens after the first chunk by the time after it. What a prompt takes
is the same in every mode, but for the prefix cache, which the first of them fills.
"""

import argparse
import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvloop

from bench.client import Outcome, Target, complete
from bench.options import json_object, levels, positive
from bench.speculate_summary import Answer, ModeSummary, SweepLevel, summarize, sweep_table, table

OFF = "off"
# Spec-Bench's five tasks of their own; the categories of MT-Bench are one group.
TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
SWEEP_MODES = (OFF, "auto")


class BenchError(Exception):
    """The measurement cannot be made; the message says why."""


class Prompt(msgspec.Struct, frozen=True):
    """A line of the prompts' file; of several turns the first is asked."""

    question_id: int
    category: str
    turns: list[str]

    @property
    def group(self) -> str:
        return self.category if self.category in TASKS else "mt_bench"


def read_prompts(path: Path, per_group: int | None) -> list[Prompt]:
    """Read the prompts, the first `per_group` of each group, groups taking turns."""
    decode = msgspec.json.Decoder(Prompt).decode
    groups: dict[str, list[Prompt]] = {}
    for line in path.read_bytes().splitlines():
        if line.strip():
            prompt = decode(line)
            groups.setdefault(prompt.group, []).append(prompt)
    if not groups:
        raise BenchError(f"{path} holds no prompts")
    columns = [prompts[:per_group] for prompts in groups.values()]
    most = max(map(len, columns))
    return [column[i] for i in range(most) for column in columns if i < len(column)]


def _with_mode(target: Target, mode: str) -> Target:
    fulcrum = {"speculation": mode, "usage": True}
    return msgspec.structs.replace(target, extra=target.extra | {"fulcrum": fulcrum})


def _checked(outcome: Outcome, prompt: Prompt, mode: str) -> Answer:
    if outcome.error is not None:
        raise BenchError(f"question {prompt.question_id}, {mode}: {outcome.error}")
    if outcome.fulcrum is None or "num_steps" not in outcome.fulcrum:
        raise BenchError("the server gives no statistics of speculation in its usage")
    return Answer(prompt.question_id, prompt.group, mode, outcome)


async def _run_level(
    session: aiohttp.ClientSession, target: Target, prompts: list[Prompt], mode: str, streams: int
) -> list[Answer]:
    """Ask all prompts, `streams` of them at any time."""
    answers: list[Answer] = []
    pending = iter(prompts)

    async def worker() -> None:
        for prompt in pending:
            outcome = await complete(session, _with_mode(target, mode), prompt.turns[0])
            answers.append(_checked(outcome, prompt, mode))

    await asyncio.gather(*(worker() for _ in range(streams)))
    return answers


async def run_modes(
    session: aiohttp.ClientSession,
    target: Target,
    prompts: list[Prompt],
    modes: list[str],
    streams: int,
) -> list[Answer]:
    """Ask every prompt in every mode, `streams` requests at any time."""
    answers: list[Answer] = []
    # With several streams, modes change after a few prompts of each stream: between two of these
    # batches the streams run dry.
    size = 1 if streams == 1 else 4 * streams
    batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    num_asked = 0
    for index, batch in enumerate(batches):
        first = index % len(modes)
        for mode in modes[first:] + modes[:first]:
            answers += await _run_level(session, target, batch, mode, streams)
        num_before, num_asked = num_asked, num_asked + len(batch)
        if num_asked // 10 > num_before // 10 or num_asked == len(prompts):
            print(f"{num_asked} of {len(prompts)} prompts", file=sys.stderr)
    return answers


async def run_sweep(
    session: aiohttp.ClientSession,
    target: Target,
    prompts: list[Prompt],
    numbers_of_streams: list[int],
) -> list[SweepLevel]:
    """Measure each level in the order off, auto, auto, off, after a round that is not counted."""
    results = []
    for streams in numbers_of_streams:
        count = min(len(prompts), max(8, 2 * streams))
        chosen = prompts[:count]
        await _run_level(session, target, chosen, OFF, streams)
        rounds: dict[str, list[list[Answer]]] = {mode: [] for mode in SWEEP_MODES}
        for mode in (*SWEEP_MODES, *reversed(SWEEP_MODES)):
            rounds[mode].append(await _run_level(session, target, chosen, mode, streams))
        results.append(SweepLevel.of(streams, rounds))
        print(f"{streams} streams: done", file=sys.stderr)
    return results


async def run(options: argparse.Namespace) -> tuple[list[ModeSummary], list[SweepLevel]]:
    """Warm up, then measure what the options ask for."""
    prompts = read_prompts(options.prompts, options.per_group)
    target = Target(
        url=options.url,
        model=options.model,
        endpoint=options.endpoint,
        max_tokens=options.output_tokens,
        extra=options.extra,
    )
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=options.timeout_s),
        read_bufsize=1 << 20,
    ) as session:
        # What the server learns while it serves, it has learned a little of then.
        warm_up = prompts[: options.warm_up]
        await run_modes(session, target, warm_up, options.modes, 1)
        answers = await run_modes(session, target, prompts, options.modes, options.streams)
        sweep = await run_sweep(session, target, prompts, options.sweep)
    return summarize(answers, options.modes), sweep


def _modes(text: str) -> list[str]:
    modes = [mode.strip() for mode in text.split(",") if mode.strip()]
    # All others are compared with it.
    return [OFF, *(mode for mode in dict.fromkeys(modes) if mode != OFF)]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.speculate", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="base URL, with /v1 (%(default)s)")
    add("--model", required=True, help="model name to ask for")
    add("--prompts", required=True, type=Path, help="JSONL: question_id, category, turns")
    add("--api-key", help="sent as a bearer token")
    add("--endpoint", choices=("completions", "chat"), default="chat")
    add("--modes", type=_modes, default=[OFF, "ngram", "mtp", "auto"], help="besides off")
    add("--per-group", type=positive, help="prompts of each task group; default: all")
    add("--output-tokens", type=positive, default=256, help="max_tokens (%(default)s)")
    add("--streams", type=positive, default=1, help="requests at once (%(default)s)")
    add("--warm-up", type=int, default=3, help="prompts before what is measured (%(default)s)")
    add("--sweep", type=levels, default=[], help="streams at once, e.g. 1,2,4,8,16,32")
    add("--extra", type=json_object, default={}, help='e.g. {"temperature": 0.8, "seed": 1}')
    add("--timeout-s", type=float, default=600.0, help="of one request (%(default)s)")
    add("--json", type=Path, help="write the figures to this file as well")
    add("--plot", type=Path, help="draw them into this PNG file (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install '.[bench]'")
    return options


def _write_json(options: argparse.Namespace, document: dict[str, Any]) -> None:
    settings = {
        key: str(value) if isinstance(value, Path) else value
        for key, value in vars(options).items()
        if key not in ("api_key", "json", "plot")
    }
    encoded = msgspec.json.encode({"settings": settings, **document})
    options.json.write_bytes(msgspec.json.format(encoded, indent=2))


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 when a text differs from that of `off`, 2 when none can work."""
    options = parse_options(arguments)
    try:
        summaries, sweep = uvloop.run(run(options))
    except (BenchError, OSError, ValueError) as failure:
        print(f"bench.speculate: {failure}", file=sys.stderr)
        return 2
    print(f"{options.url}  model {options.model}, at most {options.output_tokens} output tokens")
    print(table(summaries))
    if sweep:
        print(sweep_table(sweep))
    if options.json:
        _write_json(options, {"modes": summaries, "sweep": sweep})
    if options.plot:
        from bench.speculate_plot import draw  # matplotlib comes with an extra

        draw(options.plot, f"{options.model}: speculation against off", summaries, sweep)
    different = {question for summary in summaries for question in summary.different_texts}
    different |= {question for level in sweep for question in level.different_texts}
    if different:
        print(f"texts differ from off: questions {sorted(different)}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
