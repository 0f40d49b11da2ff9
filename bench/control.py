"""Promises of the control plane against reality: `python -m bench.control preview|load|fuzz`.

preview: see bench/control_preview.py. load: levels and cache dtypes are applied under
streams, whose tokens must be complete; the longest pause of any client is stated. fuzz:
schemathesis on the server's own description, no 500 and no hang. Each starts a server of its own
on 127.0.0.1. Run it on an idle machine.
"""

import argparse
import asyncio
import itertools
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from bench.client import Outcome, Target, complete
from bench.control_preview import measure_previews
from bench.http_json import get_json
from bench.layout import lay_out
from bench.local_server import LocalServer
from bench.preview_cases import Setting, preview_table
from bench.prompts import PromptSource

_ENDED = ("done", "failed", "rolled_back")
_PAUSED = ("previewing", "building", "checking", "switching", "measuring")
_LEVELS = ("none", "int8", "int4")
_DTYPES = ("bf16", "int8")
_SPECULATIONS = ("off", "auto")


async def _apply(session: aiohttp.ClientSession, url: str, setting: dict[str, Any]) -> Any:
    """Apply and wait for the end; the status with its receipt."""
    status = await get_json(session, f"{url}/v1/optimizations/apply", setting)
    while status["state"] not in _ENDED:
        await asyncio.sleep(0.05)
        status = await get_json(session, f"{url}/v1/optimizations/apply/{status['id']}")
    return status


async def apply_under_load(model: str, num_streams: int) -> int:
    """Apply levels and cache dtypes under streams; returns the number of what went wrong."""
    steps: list[dict[str, Any]] = [
        {"quantization": "int8"},
        {"quantization": "none"},
        {"quantization": "int4"},
        {"kv_dtype": "int8"},
        {"kv_dtype": "bf16"},
        {"speculation": "off"},
        {"speculation": "auto"},
    ]
    options = ["--model", model, "--quantization", "int4", "--kv-memory", "256MiB"]
    head = ("applied", "state", "mode", "build s", "switch s")
    rows = [(*head, *(f"{state}, pause ms" for state in _PAUSED))]
    with LocalServer(options) as server:
        async with aiohttp.ClientSession() as session:
            name = (await get_json(session, f"{server.url}/v1/models"))["data"][0]["id"]
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
                        *(f"{1e3 * receipt['pauses_s'].get(s, 0):.0f}" for s in _PAUSED),
                    )
                )
                await asyncio.sleep(1)
            stop.set()
            await asyncio.gather(*tasks)
    print(lay_out(rows))
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


def _settings() -> list[Setting]:
    """SmolLM2 with every level, KV dtype and drafting, and Gemma 3 with two levels."""
    small = [
        Setting("smollm2-135m", level, dtype, speculation)
        for level in _LEVELS
        for dtype in _DTYPES
        for speculation in _SPECULATIONS
    ]
    return [*small, *(Setting("gemma3-270m", level, "bf16", "off") for level in ("int8", "int4"))]


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.control", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    preview = commands.add_parser("preview", help="previews against reality")
    preview.add_argument("--model", help="only these settings' model; default: all")
    preview.add_argument("--quantization", choices=_LEVELS, help="only this level")
    preview.add_argument("--kv-dtype", choices=_DTYPES, help="only this one")
    preview.add_argument("--speculation", choices=_SPECULATIONS, help="only this one")
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
            setting
            for setting in _settings()
            if options.model in (None, setting.model)
            and options.quantization in (None, setting.quantization)
            and options.kv_dtype in (None, setting.kv_dtype)
            and options.speculation in (None, setting.speculation)
        ]
        cases = asyncio.run(measure_previews(settings))
        print(preview_table(cases))
        if options.json:
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(cases), indent=2))
        return 0
    if options.command == "load":
        return min(1, asyncio.run(apply_under_load(options.model, options.streams)))
    return fuzz(options.model, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
