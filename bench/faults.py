"""Mistreats servers and checks the outcome of each fault: `python -m bench.faults [--only NAME]`.

Each check starts a server of its own. Without a hung client, with no block lost: the table says
what was to happen and whether it did, and the program exits with 1 where something did not.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import msgspec
import uvloop

from bench.client import Outcome, Target, complete
from bench.fuzz import FuzzResult, generated_requests, random_bytes
from bench.local_server import LocalServer

MODEL = "smollm2-135m"
_HANG_S = 3.0
_CLIENT_S = 60.0  # a client that waits longer hangs
_MAX_GROWTH_BYTES = 32 << 20
_SMALL = ("--max-model-len", "2048", "--kv-memory", "100MB")

Check = tuple[str, bool]  # what was seen, whether it is what should be


def body(max_tokens: int = 8) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Once upon a time", "max_tokens": max_tokens}


def post(server: LocalServer, max_tokens: int = 8) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body(max_tokens), timeout=_CLIENT_S)


def health(server: LocalServer, check: str = "") -> int:
    return httpx.get(f"{server.url}/health{check}", timeout=5).status_code


def wait_health(server: LocalServer, status: int, timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while health(server) != status:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.05)
    return True


async def streams(server: LocalServer, count: int, max_tokens: int) -> list[Outcome]:
    """Streams at once, each read to its end."""
    target = Target(url=server.url + "/v1", model=MODEL, max_tokens=max_tokens, ignore_eos=True)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=_CLIENT_S)
    ) as session:
        return await asyncio.gather(
            *(complete(session, target, f"{number} is a number") for number in range(count))
        )


@contextmanager
def faulty(*options: str) -> Iterator[tuple[LocalServer, Path]]:
    """A server whose steps heed a file."""
    with tempfile.TemporaryDirectory() as folder:
        fault = Path(folder) / "fault"
        fault.write_text("")
        environment = {"FULCRUM_BENCH_FAULT": str(fault)}
        with LocalServer(
            [*_SMALL, *options], module="bench.faulty_server", environment=environment
        ) as s:
            yield s, fault


def stuck_step() -> Check:
    """A step that hangs: readiness fails, liveness stays, new requests 503, then all goes on."""

    async def scene(server: LocalServer, fault: Path) -> tuple[bool, list[Outcome]]:
        await asyncio.to_thread(fault.write_text, "hang")
        waiting = asyncio.create_task(streams(server, 4, 16))
        drained = await asyncio.to_thread(wait_health, server, 503)
        refused = await asyncio.to_thread(post, server)
        alive = await asyncio.to_thread(health, server, "?check=live")
        await asyncio.sleep(_HANG_S)
        await asyncio.to_thread(fault.write_text, "")
        outcomes = await waiting
        told = refused.status_code == 503 and "Retry-After" in refused.headers
        return drained and told and alive == 200, outcomes

    with faulty("--health-stale-s", "1") as (server, fault):
        drained, outcomes = uvloop.run(scene(server, fault))
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        holds = drained and not errors and wait_health(server, 200) and server.books_balance()
        return f"drained {drained}, {len(outcomes) - len(errors)} of 4 answered after it", holds


def failed_step() -> Check:
    """An exception in a kernel call: that request gets a 500, the next one an answer."""
    with faulty() as (server, fault):
        fault.write_text("raise")
        failed = post(server).status_code
        fault.write_text("")
        after = post(server).status_code
        holds = (failed, after) == (500, 200) and server.books_balance() and health(server) == 200
        return f"{failed}, then {after}", holds


def dead_engine() -> Check:
    """Failures in a row end the engine: 503 for all that follows, liveness stays."""
    with faulty() as (server, fault):
        fault.write_text("raise")
        statuses = [post(server).status_code for _ in range(5)]
        drained = wait_health(server, 503)
        alive = health(server, "?check=live"), health(server, "?check=engine")
        holds = statuses == [500, 500, 500, 503, 503] and drained and alive == (200, 503)
        return f"{statuses}, live and engine {alive}", holds


def full_disk() -> Check:
    """Standard error on a full disk: requests are answered all the same."""
    with open("/dev/full", "wb") as full, LocalServer(_SMALL, stderr=full) as server:
        statuses = {post(server).status_code for _ in range(20)}
        return f"{statuses}", statuses == {200} and server.books_balance()


def disconnects() -> Check:
    """1,000 clients go away, before or amid their answers: no block stays held."""

    async def leave(server: LocalServer) -> None:
        port = int(server.url.rpartition(":")[2])
        data = msgspec.json.encode(body(200) | {"stream": True})
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        request = head + b"Content-Length: %d\r\n\r\n" % len(data) + data

        async def one(number: int) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            await asyncio.sleep(number % 7 * 0.05)
            writer.transport.abort()

        for start in range(0, 1000, 100):
            await asyncio.gather(*(one(number) for number in range(start, start + 100)))

    with LocalServer([*_SMALL, "--max-ttft-s", "1000"]) as server:
        post(server)
        before = server.rss_bytes
        uvloop.run(leave(server))
        balance = server.books_balance()
        growth = server.rss_bytes - before
        after = post(server).status_code
        holds = balance and after == 200 and growth < 4 * _MAX_GROWTH_BYTES
        return f"books balance {balance}, then {after}, memory {growth / 1e6:+.0f} MB", holds


def sigterm() -> Check:
    """SIGTERM under load: every stream ends properly within the grace time, exit code 0."""

    async def scene(server: LocalServer) -> list[Outcome]:
        task = asyncio.create_task(streams(server, 16, 64))
        await asyncio.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        return await task

    with LocalServer(_SMALL) as server:
        outcomes = uvloop.run(scene(server))
        code = server.process.wait(40)
        whole = sum(outcome.error is None for outcome in outcomes)
        return f"{whole} of 16 streams whole, exit code {code}", whole == 16 and code == 0


def sigkill() -> Check:
    """SIGKILL under load: no client hangs, and a new server can have the port at once."""

    async def scene(server: LocalServer) -> tuple[list[Outcome], float]:
        task = asyncio.create_task(streams(server, 16, 1000))
        await asyncio.sleep(1.0)
        killed_s = time.monotonic()
        server.process.kill()
        return await task, time.monotonic() - killed_s

    with LocalServer(_SMALL) as server:
        port = server.url.rpartition(":")[2]
        outcomes, took_s = uvloop.run(scene(server))
        server.process.wait(10)
        with LocalServer([*_SMALL, "--port", port]) as again:
            after = post(again).status_code
        errors = sum(outcome.error is not None for outcome in outcomes)
        seen = f"{errors} of 16 clients told within {took_s:.1f} s, then {after} on the same port"
        return seen, errors == 16 and took_s < 5 and after == 200


def slowloris() -> Check:
    """200 clients that drip headers or bodies: all are cut, others are answered meanwhile."""

    async def drip(port: int, start: bytes) -> float:
        began_s = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answer = asyncio.create_task(read_all(reader))
        writer.write(start)
        while not answer.done() and time.monotonic() - began_s < 60:
            writer.write(b"a")
            await asyncio.sleep(0.5)
        writer.close()
        return time.monotonic() - began_s

    async def scene(server: LocalServer) -> tuple[list[float], float]:
        port = int(server.url.rpartition(":")[2])
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX: "
        with_body = head + b"y\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
        drips = [drip(port, start) for start in (head, with_body) for _ in range(100)]
        task = asyncio.ensure_future(asyncio.gather(*drips))
        await asyncio.sleep(1.0)
        began_s = time.monotonic()
        response = await asyncio.to_thread(post, server, 1)
        answer_s = time.monotonic() - began_s
        assert response.status_code == 200, response.text
        return await task, answer_s

    with LocalServer([*_SMALL, "--header-timeout-s", "3", "--body-timeout-s", "3"]) as server:
        times_s, answer_s = uvloop.run(scene(server))
        seen = f"all cut within {max(times_s):.1f} s, another client answered in {answer_s:.2f} s"
        return seen, max(times_s) < 15 and answer_s < 5 and server.books_balance()


def fuzz(duration_s: float) -> Check:
    """Random bytes and schemathesis: no 5xx, no hang, memory flat."""
    with LocalServer([*_SMALL, "--header-timeout-s", "3", "--body-timeout-s", "3"]) as server:
        port = int(server.url.rpartition(":")[2])
        # First a little of both: what the process needs for them once is no growth.
        generated_requests(server.url, min(15.0, duration_s / 4))
        uvloop.run(random_bytes(port, MODEL, 3.0))
        before = server.rss_bytes
        results: list[FuzzResult] = [
            generated_requests(server.url, duration_s),
            uvloop.run(random_bytes(port, MODEL, duration_s)),
        ]
        growth = server.rss_bytes - before
        failures = [failure for result in results for failure in result.failures]
        for failure in failures[:5]:
            print(f"      {failure}", file=sys.stderr)
        holds = not failures and growth < _MAX_GROWTH_BYTES and server.books_balance()
        counts = ", ".join(str(dict(sorted(result.statuses.items()))) for result in results)
        return f"{counts}; {len(failures)} failures, memory {growth / 1e6:+.1f} MB", holds


def telemetry_cost() -> Check:
    """Reading the sensors takes less than 0.5 % of a core."""
    with LocalServer(_SMALL) as server:
        begin = httpx.get(f"{server.url}/v1/telemetry").json()
        began_s = time.monotonic()
        time.sleep(10)
        end = httpx.get(f"{server.url}/v1/telemetry").json()
        share = (end["cpu_s"] - begin["cpu_s"]) / (time.monotonic() - began_s)
        per_s = (end["num_samples"] - begin["num_samples"]) / 10
        return f"{share:.2%} of a core at {per_s:.1f} samples/s", share < 0.005 and per_s > 1.5


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""


CHECKS: dict[str, Callable[[], Check]] = {
    "stuck step": stuck_step,
    "failed step": failed_step,
    "dead engine": dead_engine,
    "full disk": full_disk,
    "1000 disconnects": disconnects,
    "SIGTERM": sigterm,
    "SIGKILL": sigkill,
    "slowloris": slowloris,
    "telemetry cost": telemetry_cost,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    parser.add_argument("--only", choices=[*CHECKS, "fuzz"], help="this check alone")
    parser.add_argument("--fuzz-s", type=float, default=60.0, help="of each kind (%(default)s)")
    options = parser.parse_args(arguments)
    checks = CHECKS | {"fuzz": lambda: fuzz(options.fuzz_s)}
    num_missed = 0
    for name, check in checks.items():
        if options.only not in (None, name):
            continue
        seen, holds = check()
        num_missed += not holds
        print(f"{'ok  ' if holds else 'MISS'}  {name}: {seen}", flush=True)
    return 1 if num_missed else 0


if __name__ == "__main__":
    sys.exit(main())
