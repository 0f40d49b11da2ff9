"""Offers a server a multiple of what it can do: `python -m bench.overload [-- SERVER OPTIONS]`.

It finds the concurrency of the highest goodput in a closed loop. Then stretches of that closed loop
and of overload take turns: requests that arrive at random at a multiple of that rate, and come
again once, when the server said so, where they were refused. A shared machine is not as fast at all
times: the goodput of each overload is held against the mean of the baselines before and after it,
and the median of these shares is judged. Each baseline with the overload that follows has a server
of its own, since what an overload has promised to those who are still to come would weigh on the
next stretch. The clients, who would be on other machines, wait for their turn on a processor rather
than take it from a thread of the server at once.

It exits with 1 where admitted requests got their first token too late, coming again failed too
often, goodput fell, or memory grew, over all overloads together.
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import uvloop

from bench.client import Target
from bench.load_loops import SETTLE_S, Loops, Stretch
from bench.local_server import LocalServer
from bench.loopback import LoopbackClient
from bench.options import levels, positive
from bench.prompts import PromptSource

_MIN_RETRY_SHARE = 0.90
_MIN_GOODPUT_SHARE = 0.95
_MAX_GROWTH_BYTES = 32 << 20
# What the server promised is measured on the server; the way to the client comes on top.
_TTFT_TOLERANCE_S = 0.25


@contextlib.contextmanager
def waiting_for_turns() -> Iterator[None]:
    """Have this thread wake up without preempting others."""
    if sys.platform != "linux":
        yield
        return
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, param)


def on_a_server(
    options: argparse.Namespace, play: Callable[[Loops], Awaitable[list[Stretch]]]
) -> tuple[list[Stretch], dict[str, Any]]:
    """Start a server, let `play` send it its stretches, and look at what is left of them."""
    server_options = [
        *("--model", options.model, "--max-sequences", str(options.max_sequences)),
        *("--max-ttft-s", str(options.max_ttft_s)),
        # Little of both, so that all of the cache has been touched before memory is looked at.
        *("--max-model-len", "2048", "--kv-memory", "100MB", *options.server),
    ]

    async def run() -> list[Stretch]:
        target = Target(
            url=server.url + "/v1",
            model=options.model,
            max_tokens=options.output_tokens,
            ignore_eos=True,
        )
        client = LoopbackClient(target, server.port)
        source = PromptSource(None, options.seed)
        try:
            return await play(Loops(server, client, source, options.prompt_words))
        finally:
            client.close()

    # Not around the server's start: its threads would inherit it.
    with LocalServer(server_options) as server, waiting_for_turns():
        stretches = uvloop.run(run())
        telemetry = httpx.get(f"{server.url}/v1/telemetry").json()
        left = {"telemetry": telemetry, "books_balance": server.books_balance()}
    return stretches, left


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Find the best concurrency, then take turns."""

    async def each_level(loops: Loops) -> list[Stretch]:
        return [await loops.closed(width, options.baseline_s) for width in options.concurrency]

    by_level = {
        width: stretch.goodput_tok_s
        for width, stretch in zip(
            options.concurrency, on_a_server(options, each_level)[0], strict=True
        )
    }
    for width, goodput in by_level.items():
        _tell(f"concurrency {width}: {goodput:.1f} tok/s")
    best = max(by_level, key=by_level.__getitem__)
    rate_per_s = options.factor * by_level[best] / options.output_tokens
    draw = random.Random(options.seed)

    async def baseline(loops: Loops) -> list[Stretch]:
        return [await loops.closed(best, options.baseline_s)]

    async def turn(loops: Loops) -> list[Stretch]:
        return [*await baseline(loops), await loops.open(rate_per_s, options.duration_s, draw)]

    baselines: list[Stretch] = []
    overloads: list[Stretch] = []
    lefts: list[dict[str, Any]] = []
    for number in range(options.rounds + 1):
        stretches, left = on_a_server(options, turn if number < options.rounds else baseline)
        lefts.append(left)
        baselines.append(stretches[0])
        overloads += stretches[1:]
        for name, stretch in zip((f"concurrency {best}", "overload"), stretches, strict=False):
            _tell(
                f"{name}: {stretch.goodput_tok_s:.1f} tok/s, {stretch.num_mean_open:.1f} answers "
                f"under way; processors: server {stretch.server_cores:.2f}, "
                f"clients {stretch.client_cores:.2f}"
            )
    return summarize(by_level, baselines, overloads) | {
        "rate_per_s": rate_per_s,
        "telemetry": [left["telemetry"] for left in lefts],
        "books_balance": all(left["books_balance"] for left in lefts),
    }


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def goodput_shares(baselines: list[Stretch], overloads: list[Stretch]) -> list[float]:
    """Goodput of each overload against the mean of the baselines before and after it."""
    return [
        2 * overload.goodput_tok_s / (before.goodput_tok_s + after.goodput_tok_s)
        for before, overload, after in zip(baselines, overloads, baselines[1:], strict=False)
    ]


def summarize(
    by_level: dict[int, float], baselines: list[Stretch], overloads: list[Stretch]
) -> dict[str, Any]:
    first = [outcome for overload in overloads for outcome in overload.first]
    retries = [outcome for overload in overloads for outcome in overload.retries]
    everything = first + retries
    admitted = [outcome for outcome in everything if outcome.status == 200]
    ttft_s = [outcome.first_chunk_s for outcome in admitted if outcome.chunk_times_s]
    refused = [outcome for outcome in everything if outcome.status == 429]
    succeeded = sum(outcome.error is None for outcome in retries)
    settled = [one.rss_bytes[len(one.rss_bytes) // 3 :] or [0] for one in overloads]
    shares = goodput_shares(baselines, overloads)
    return {
        "levels": by_level,
        "statuses": dict(Counter(outcome.status for outcome in everything)),
        "errors": sorted({o.error for o in admitted if o.error is not None}),
        "num_offered": len(first),
        "num_refused": len(refused),
        "num_without_time": sum(outcome.retry_after_s is None for outcome in refused),
        "num_retries": len(retries),
        "num_not_due": sum(overload.num_not_due for overload in overloads),
        "retry_share": succeeded / len(retries) if retries else 1.0,
        "ttft_median_s": quantile(ttft_s, 0.5),
        "ttft_p99_s": quantile(ttft_s, 0.99),
        "ttft_max_s": max(ttft_s, default=0.0),
        "baselines_tok_s": [baseline.goodput_tok_s for baseline in baselines],
        "overloads_tok_s": [overload.goodput_tok_s for overload in overloads],
        "goodput_shares": shares,
        "goodput_share": statistics.median(shares),
        "rss_growth_bytes": sum(rss[-1] - rss[0] for rss in settled),
    }


def verdict(options: argparse.Namespace, seen: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(what, how much of how much, whether it holds) of each promise."""
    others = set(seen["statuses"]) - {200, 429}
    shares = ", ".join(f"{share:.1%}" for share in seen["goodput_shares"])
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
            "goodput against the best concurrency before and after, median",
            f"{seen['goodput_share']:.1%} of {shares}",
            seen["goodput_share"] >= _MIN_GOODPUT_SHARE,
        ),
        (
            "memory growth over the last two thirds of each overload, summed",
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


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add("--factor", type=float, default=4.0, help="of the capacity (%(default)s)")
    add("--rounds", type=positive, default=4, help="overloads, each between two baselines")
    add("--duration-s", type=float, default=20.0, help="of each overload (%(default)s)")
    add("--baseline-s", type=float, default=15.0, help="of each baseline (%(default)s)")
    add("--concurrency", type=levels, default="8,16,32", help="levels to try (%(default)s)")
    add("--prompt-words", type=int, default=64)
    add("--output-tokens", type=int, default=64)
    add("--max-sequences", type=int, default=16)
    add("--max-ttft-s", type=float, default=4.0)
    add("--seed", type=int, default=0)
    add("--json", type=Path, help="write the figures to this file as well")
    add("server", nargs="*", help="further options of the server, after --")
    options = parser.parse_args(arguments)
    if min(options.duration_s, options.baseline_s) <= SETTLE_S:
        parser.error(f"the first {SETTLE_S:g} s of each stretch count for nothing: give it more")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    seen = measure(options)
    print(
        f"{options.factor:g} times the capacity, {options.rounds} times for "
        f"{options.duration_s:g} s: {seen['num_offered']} requests, {seen['num_refused']} "
        f"refusals, {seen['num_not_due']} told to come again after the end; TTFT median "
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
