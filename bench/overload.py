"""Offers a server a multiple of what it can do: `python -m bench.overload [-- SERVER OPTIONS]`.

It starts its own server, finds the concurrency of the highest goodput in a closed loop, and then
lets requests arrive at random at a multiple of that rate. Who is refused comes again once, when
the server said so. The best concurrency is measured again afterwards, and goodput is held against
the mean of both: a shared machine is not as fast at all times. It exits with 1 where admitted
requests got their first token too late, coming again failed too often, goodput fell, or memory
grew.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import msgspec
import uvloop

from bench.client import Outcome, Target, complete
from bench.local_server import LocalServer
from bench.prompts import PromptSource

_MIN_RETRY_SHARE = 0.90
_MIN_GOODPUT_SHARE = 0.95
_MAX_GROWTH_BYTES = 32 << 20
# What the server promised is measured on the server; the way to the client comes on top.
_TTFT_TOLERANCE_S = 0.25
_TAIL_S = 5.0  # arrivals in it have no time to be done and count for nothing


class Offered(msgspec.Struct):
    """What became of the requests of the open loop."""

    first: list[Outcome] = []
    retries: list[Outcome] = []
    num_not_due: int = 0  # told to come again after the end
    rss_bytes: list[int] = []


async def closed_loop(
    session: aiohttp.ClientSession,
    target: Target,
    source: PromptSource,
    options: Any,
    width: int,
    begin_index: int,
) -> float:
    """Output tokens per second that `width` clients get, each sending one after the other."""
    end_s = time.perf_counter() + options.baseline_s
    outcomes: list[Outcome] = []

    async def client(number: int) -> None:
        index = begin_index + number
        while time.perf_counter() < end_s:
            prompt = source.prompt(index, options.prompt_words)
            outcome = await complete(session, target, prompt)
            outcomes.append(outcome)
            if outcome.error is None:
                index += width
            else:  # refused: the same again when the server said so
                await asyncio.sleep(outcome.retry_after_s or 1.0)

    began_s = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(width)))
    took_s = time.perf_counter() - began_s
    return sum(outcome.output_tokens for outcome in outcomes if outcome.error is None) / took_s


async def open_loop(
    session: aiohttp.ClientSession,
    target: Target,
    source: PromptSource,
    options: Any,
    rate_per_s: float,
    server: LocalServer,
) -> Offered:
    """Random arrivals at that rate; each comes again once where it was refused."""
    offered = Offered()
    end_s = time.perf_counter() + options.duration_s
    draw = random.Random(options.seed)
    tasks: set[asyncio.Task[None]] = set()

    async def request(index: int) -> None:
        prompt = source.prompt(index, options.prompt_words)
        outcome = await complete(session, target, prompt)
        offered.first.append(outcome)
        if outcome.status not in (429, 503) or outcome.retry_after_s is None:
            return
        wait_s = outcome.sent_at_s + outcome.end_to_end_s + outcome.retry_after_s
        if wait_s > end_s:
            offered.num_not_due += 1
            return
        await asyncio.sleep(wait_s - time.perf_counter())
        offered.retries.append(await complete(session, target, prompt))

    async def watch_memory() -> None:
        while True:
            offered.rss_bytes.append(server.rss_bytes)
            await asyncio.sleep(1.0)

    watcher = asyncio.create_task(watch_memory())
    index = 0
    next_s = time.perf_counter()
    while next_s < end_s:
        await asyncio.sleep(max(0.0, next_s - time.perf_counter()))
        task = asyncio.create_task(request(index))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        index += 1
        next_s += draw.expovariate(rate_per_s)
    while tasks:
        await asyncio.wait(tasks)
    watcher.cancel()
    return offered


async def measure(options: argparse.Namespace, server: LocalServer) -> dict[str, Any]:
    target = Target(
        url=server.url + "/v1",
        model=options.model,
        max_tokens=options.output_tokens,
        ignore_eos=True,
    )
    source = PromptSource(None, options.seed)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300)
    ) as session:
        levels: dict[int, float] = {}

        async def level(width: int, turn: int) -> float:
            begin_index = (1 << 24) * (width + 1) + (turn << 20)
            return await closed_loop(session, target, source, options, width, begin_index)

        for width in options.concurrency:
            levels[width] = await level(width, turn=0)
            print(f"concurrency {width}: {levels[width]:.1f} tok/s", file=sys.stderr)
        best = max(levels, key=levels.__getitem__)
        rate_per_s = options.factor * levels[best] / options.output_tokens
        began_s = time.perf_counter()
        offered = await open_loop(session, target, source, options, rate_per_s, server)
        end_s = began_s + options.duration_s
        again = await level(best, turn=1)
        print(f"concurrency {best}, afterwards: {again:.1f} tok/s", file=sys.stderr)
    reference = (levels[best] + again) / 2
    return summarize(options, levels, again, reference, offered, began_s, end_s)


def tokens_between(outcomes: list[Outcome], begin_s: float, end_s: float) -> float:
    """Output tokens that arrived in that time, each chunk at its own time."""
    total = 0.0
    for outcome in outcomes:
        times = outcome.chunk_times_s
        if outcome.error is None and times:
            inside = sum(begin_s <= outcome.sent_at_s + at_s < end_s for at_s in times)
            total += outcome.output_tokens * inside / len(times)
    return total


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def summarize(
    options: argparse.Namespace,
    levels: dict[int, float],
    best_again: float,
    reference: float,
    offered: Offered,
    began_s: float,
    end_s: float,
) -> dict[str, Any]:
    everything = offered.first + offered.retries
    admitted = [outcome for outcome in everything if outcome.status == 200]
    ttft_s = [outcome.first_chunk_s for outcome in admitted if outcome.chunk_times_s]
    goodput = tokens_between(everything, began_s + _TAIL_S, end_s) / (options.duration_s - _TAIL_S)
    refused = [outcome for outcome in everything if outcome.status == 429]
    succeeded = sum(outcome.error is None for outcome in offered.retries)
    settled = offered.rss_bytes[len(offered.rss_bytes) // 3 :] or [0]
    return {
        "levels": levels,
        "best_level_again": best_again,
        "statuses": dict(Counter(outcome.status for outcome in everything)),
        "errors": sorted({o.error for o in admitted if o.error is not None}),
        "num_offered": len(offered.first),
        "num_refused": len(refused),
        "num_without_time": sum(outcome.retry_after_s is None for outcome in refused),
        "num_retries": len(offered.retries),
        "num_not_due": offered.num_not_due,
        "retry_share": succeeded / len(offered.retries) if offered.retries else 1.0,
        "ttft_median_s": quantile(ttft_s, 0.5),
        "ttft_p99_s": quantile(ttft_s, 0.99),
        "ttft_max_s": max(ttft_s, default=0.0),
        "goodput_tok_s": goodput,
        "goodput_share": goodput / reference,
        "rss_growth_bytes": settled[-1] - settled[0],
    }


def verdict(options: argparse.Namespace, seen: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(what, how much of how much, whether it holds) of each promise."""
    others = set(seen["statuses"]) - {200, 429}
    return [
        (
            "TTFT of admitted requests, 99th percentile",
            f"{seen['ttft_p99_s']:.2f} s of {options.max_ttft_s:g} s",
            seen["ttft_p99_s"] <= options.max_ttft_s + _TTFT_TOLERANCE_S,
        ),
        (
            "refused requests that came again and got in",
            f"{seen['retry_share']:.1%} of {seen['num_retries']}",
            seen["retry_share"] >= _MIN_RETRY_SHARE and seen["num_without_time"] == 0,
        ),
        (
            "goodput against the best concurrency",
            f"{seen['goodput_tok_s']:.1f} tok/s, {seen['goodput_share']:.1%}",
            seen["goodput_share"] >= _MIN_GOODPUT_SHARE,
        ),
        (
            "memory growth over the last two thirds",
            f"{seen['rss_growth_bytes'] / 1e6:.1f} MB",
            seen["rss_growth_bytes"] <= _MAX_GROWTH_BYTES,
        ),
        (
            "statuses other than 200 and 429, broken answers",
            str(sorted(others) + seen["errors"]),
            not others and not seen["errors"],
        ),
        (
            "free + held blocks = total, none held",
            str(seen["books_balance"]),
            seen["books_balance"],
        ),
    ]


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--factor", type=float, default=4.0, help="of the capacity (%(default)s)")
    add("--duration-s", type=float, default=60.0, help="of the overload (%(default)s)")
    add("--baseline-s", type=float, default=12.0, help="of each concurrency (%(default)s)")
    add("--concurrency", default="8,16,32", help="levels of the baseline (%(default)s)")
    add("--prompt-words", type=int, default=64)
    add("--output-tokens", type=int, default=64)
    add("--max-sequences", type=int, default=16)
    add("--max-ttft-s", type=float, default=4.0)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the figures to this file as well")
    add("server", nargs="*", help="further options of the server, after --")
    options = parser.parse_args(arguments)
    options.concurrency = [int(part) for part in options.concurrency.split(",")]
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    server_options = [
        *("--model", options.model, "--max-sequences", str(options.max_sequences)),
        *("--max-ttft-s", str(options.max_ttft_s)),
        # Little of both, so that all of the cache has been touched before memory is looked at.
        *("--max-model-len", "2048", "--kv-memory", "100MB", *options.server),
    ]
    with LocalServer(server_options) as server:
        seen = uvloop.run(measure(options, server))
        seen["telemetry"] = httpx.get(f"{server.url}/v1/telemetry").json()
        seen["books_balance"] = server.books_balance()
    print(
        f"{options.factor:g} times the capacity for {options.duration_s:g} s: "
        f"{seen['num_offered']} requests, {seen['num_refused']} refusals, "
        f"{seen['num_not_due']} told to come again after the end; TTFT median "
        f"{seen['ttft_median_s']:.2f} s, highest {seen['ttft_max_s']:.2f} s"
    )
    rows = verdict(options, seen)
    for what, how_much, holds in rows:
        print(f"{'ok  ' if holds else 'MISS'}  {what}: {how_much}")
    if options.json:
        options.json.write_text(json.dumps(seen, indent=2))
    return 0 if all(holds for _, _, holds in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
