"""Promises of the control plane against reality: `python -m bench.control preview|load|fuzz`.

preview: for each setting, the preview of a running server, then the same load for real: memory and
tokens per second, and whether the interval held. load: levels and cache dtypes are applied under
streams, whose tokens must be complete; the longest pause of any client is stated. fuzz:
schemathesis on the server's own description, no 500 and no hang. Each starts a server of its own
on 127.0.0.1. Run it on an idle machine.
"""

import argparse
import asyncio
import itertools
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from bench.client import Outcome, Target, complete
from bench.local_server import LocalServer
from bench.prompts import PromptSource

_MIB = 1 << 20
_ENDED = ("done", "failed", "rolled_back")
_LEVELS = (("none", "bf16"), ("int8", "int8"), ("int4", "int4"))


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One setting at one concurrency, promised and measured."""

    model: str
    quantization: str
    kv_dtype: str
    concurrency: int
    promised: float  # tokens per second of all streams
    low: float
    high: float
    measured: float
    planned_mib: float
    allocated_mib: float
    resident_mib: float  # of the process, not backed by files, after the load

    @property
    def held(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def memory_error(self) -> float:
        return self.allocated_mib / self.planned_mib - 1


async def _json(session: aiohttp.ClientSession, url: str, body: Any = None) -> Any:
    method = "GET" if body is None else "POST"
    async with session.request(method, url, json=body) as response:
        answer = await response.json()
        if response.status >= 400:
            raise RuntimeError(f"{url}: HTTP {response.status}: {answer}")
        return answer


async def _apply(session: aiohttp.ClientSession, url: str, setting: dict[str, Any]) -> Any:
    """Apply and wait for the end; the status with its receipt."""
    status = await _json(session, f"{url}/v1/optimizations/apply", setting)
    while status["state"] not in _ENDED:
        await asyncio.sleep(0.05)
        status = await _json(session, f"{url}/v1/optimizations/apply/{status['id']}")
    return status


async def _streams(
    session: aiohttp.ClientSession, target: Target, prompts: Sequence[str]
) -> list[Outcome]:
    return list(await asyncio.gather(*(complete(session, target, p) for p in prompts)))


def _decode_rate(outcomes: Sequence[Outcome]) -> float:
    """Tokens per second of all streams while every one of them decodes."""
    bad = [outcome.error for outcome in outcomes if outcome.error is not None]
    if bad:
        raise RuntimeError(f"a request failed: {bad[0]}")
    begin = max(o.sent_at_s + o.chunk_times_s[0] for o in outcomes)
    end = min(o.sent_at_s + o.chunk_times_s[-1] for o in outcomes)
    count = sum(begin < o.sent_at_s + t <= end for o in outcomes for t in o.chunk_times_s)
    return count / (end - begin)


async def _measure_setting(
    session: aiohttp.ClientSession, server: LocalServer, setting: dict[str, Any], words: int
) -> list[Case]:
    url, cases = server.url, []
    model = (await _json(session, f"{url}/v1/models"))["data"][0]["id"]
    for concurrency in (1, 8):
        body = {"concurrency": concurrency, "prompt_tokens": words, "output_tokens": 128}
        preview = (await _json(session, f"{url}/v1/optimizations/preview", body))["today"]
        name = "decode_tokens_per_s" if concurrency == 1 else "total_tokens_per_s"
        promise = preview["speed"][name]
        target = Target(url=f"{url}/v1", model=model, max_tokens=128, ignore_eos=True)
        prompts = PromptSource(None, seed=concurrency)
        rates = []
        for turn in range(3):
            texts = [prompts.prompt(turn * concurrency + i, words) for i in range(concurrency)]
            rates.append(_decode_rate(await _streams(session, target, texts)))
        overview = await _json(session, f"{url}/v1/optimizations")
        cases.append(
            Case(
                model=model,
                quantization=setting["quantization"],
                kv_dtype=setting["kv_dtype"],
                concurrency=concurrency,
                promised=promise["value"],
                low=promise["low"],
                high=promise["high"],
                measured=statistics.median(rates),
                planned_mib=preview["memory"]["total_bytes"] / _MIB,
                allocated_mib=sum(overview["today"]["memory"].values()) / _MIB,
                resident_mib=server.anonymous_bytes() / _MIB,
            )
        )
    return cases


async def measure_previews(model: str, settings: Sequence[dict[str, Any]]) -> list[Case]:
    """Previews and reality of each setting, applied one after the other to one server."""
    cases: list[Case] = []
    options = ["--model", model, "--kv-memory", "256MiB", "--max-model-len", "2048"]
    with LocalServer(options) as server:
        async with aiohttp.ClientSession() as session:
            for setting in settings:
                status = await _apply(session, server.url, setting)
                if status["state"] != "done":
                    raise RuntimeError(f"{setting}: {status['detail']}")
                cases += await _measure_setting(session, server, setting, words=100)
                print(f"{model} {setting}: done", file=sys.stderr)
    return cases


def preview_table(cases: Sequence[Case]) -> str:
    """A line for each case, and how often the promises held."""
    head = ("model", "weights", "KV", "streams", "promised tok/s", "interval", "measured", "held")
    rows = [(*head, "planned MiB", "allocated", "resident")]
    for case in cases:
        rows.append(
            (
                case.model,
                "bf16" if case.quantization == "none" else case.quantization,
                case.kv_dtype,
                str(case.concurrency),
                f"{case.promised:.0f}",
                f"{case.low:.0f} to {case.high:.0f}",
                f"{case.measured:.0f}",
                "yes" if case.held else f"no ({case.measured / case.promised - 1:+.0%})",
                f"{case.planned_mib:.1f}",
                f"{case.memory_error:+.1%}",
                f"{case.resident_mib:.1f}",
            )
        )
    num_held = sum(case.held for case in cases)
    worst = max(abs(case.memory_error) for case in cases)
    end = f"{num_held} of {len(cases)} intervals held; memory within {worst:.1%}"
    return f"{_lay_out(rows)}\n{end}"


async def apply_under_load(model: str, num_streams: int) -> int:
    """Apply levels and cache dtypes under streams; returns the number of what went wrong."""
    steps: list[dict[str, Any]] = [
        {"quantization": "int8"},
        {"quantization": "none"},
        {"quantization": "int4"},
        {"kv_dtype": "int8"},
        {"kv_dtype": "bf16"},
    ]
    options = ["--model", model, "--quantization", "int4", "--kv-memory", "256MiB"]
    rows = [("applied", "state", "mode", "build s", "switch s", "engine's longest pause ms")]
    with LocalServer(options) as server:
        async with aiohttp.ClientSession() as session:
            name = (await _json(session, f"{server.url}/v1/models"))["data"][0]["id"]
            target = Target(url=f"{server.url}/v1", model=name, max_tokens=256, ignore_eos=True)
            stop = asyncio.Event()
            outcomes: list[Outcome] = []

            async def keep_streaming(index: int) -> None:
                prompts = PromptSource(None, seed=index)
                for turn in itertools.count():
                    if stop.is_set():
                        return
                    outcomes.append(await complete(session, target, prompts.prompt(turn, 60)))

            tasks = [asyncio.create_task(keep_streaming(index)) for index in range(num_streams)]
            await asyncio.sleep(3)
            num_bad = 0
            for setting in steps:
                status = await _apply(session, server.url, setting)
                receipt = status["receipt"]
                num_bad += status["state"] != "done"
                rows.append(
                    (
                        ", ".join(f"{k} {v}" for k, v in setting.items()),
                        status["state"],
                        status["mode"],
                        f"{receipt['build_s']:.1f}",
                        f"{receipt['switch_s']:.1f}",
                        f"{1e3 * (receipt['longest_pause_s'] or 0):.0f}",
                    )
                )
                await asyncio.sleep(1)
            stop.set()
            await asyncio.gather(*tasks)
    print(_lay_out(rows))
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    short = [o for o in outcomes if o.error is None and o.output_tokens != 256]
    pause_s = max((max(o.gaps_s, default=0.0) for o in outcomes if o.error is None), default=0.0)
    print(
        f"{num_streams} streams at a time, {len(outcomes)} requests: {len(errors)} failed, "
        f"{len(short)} incomplete, longest pause seen by a client {pause_s:.2f} s"
    )
    return num_bad + len(errors) + len(short)


def fuzz(model: str, seconds: int) -> int:
    """Run schemathesis on the served description for some time; 1 where the server failed.

    What counts is the server's own access log: every request of the run is in it.
    """
    options = ["--model", model, "--kv-memory", "64MiB", "--max-model-len", "512"]
    with LocalServer(options) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
        command += ["--checks", "not_a_server_error", "--request-timeout", "30"]
        command += ["--max-examples", "50", "--phases", "fuzzing", "--continue-on-failure"]
        ends_at_s = time.monotonic() + seconds
        # Round after round over all operations, each with examples of its own.
        for seed in itertools.count(1):
            left_s = ends_at_s - time.monotonic()
            if left_s <= 0:
                break
            process = subprocess.Popen([*command, "--seed", str(seed)])
            try:
                process.wait(left_s)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait(60)
        is_healthy = server.is_healthy()
        log = server.log()
    answers = re.findall(r" INFO (GET|POST|\S+) (\S+) (\d{3}) ([\d.]+) ms", log)
    failed = [f"{method} {path}" for method, path, status, _ in answers if status == "500"]
    by_status = Counter(status for _, _, status, _ in answers)
    by_path = Counter(path[:40] for _, path, status, _ in answers if status in ("200", "202"))
    slowest_s = max((float(duration) / 1e3 for *_, duration in answers), default=0.0)
    print(
        f"{len(answers)} requests, by status {dict(sorted(by_status.items()))}, "
        f"answered {dict(by_path.most_common(8))}, slowest {slowest_s:.1f} s, "
        f"{len(failed)} times 500 {sorted(set(failed))}, "
        f"server healthy afterwards: {is_healthy}"
    )
    return 0 if is_healthy and answers and not failed and slowest_s < 30 else 1


def _lay_out(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.control", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preview = commands.add_parser("preview", help="previews against reality")
    preview.add_argument("--model", default="smollm2-135m")
    preview.add_argument("--json", type=Path, help="write the cases to this file")
    load = commands.add_parser("load", help="apply under streams")
    load.add_argument("--model", default="smollm2-135m")
    load.add_argument("--streams", type=int, default=16)
    fuzzing = commands.add_parser("fuzz", help="schemathesis; needs pip install '.[bench]'")
    fuzzing.add_argument("--model", default="smollm2-135m")
    fuzzing.add_argument("--seconds", type=int, default=60)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the bench that was asked for."""
    options = parse_options(arguments)
    if options.command == "preview":
        settings = [
            {"quantization": level, "kv_dtype": dtype}
            for level, _ in _LEVELS
            for dtype in ("bf16", "int8")
        ]
        cases = asyncio.run(measure_previews(options.model, settings))
        print(preview_table(cases))
        if options.json:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(cases), indent=2))
        return 0
    if options.command == "load":
        return min(1, asyncio.run(apply_under_load(options.model, options.streams)))
    return fuzz(options.model, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
