"""Mistreats servers and checks the outcome of each fault: `python -m bench.faults [--only NAME]`.

Each check starts a server of its own. Without a hung client, with no block lost: the table says
what was to happen and whether it did, and the program exits with 1 where something did not.
"""

import argparse
import asyncio
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import uvloop

from bench.client import Outcome
from bench.client_faults import disconnects, fuzz, slowloris
from bench.fault_scenes import SMALL, Check, faulty, health, post, streams, wait_health
from bench.local_server import LocalServer

_HANG_S = 3.0


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


def lost_step() -> Check:
    """A step that stays stuck: open requests are told, SIGTERM works, all comes back with it."""

    async def scene(server: LocalServer, fault: Path) -> tuple[list[Outcome], float, int]:
        begun = asyncio.create_task(streams(server, 4, 1000))
        await asyncio.sleep(1.0)
        await asyncio.to_thread(fault.write_text, "hang")
        hung_s = time.monotonic()
        whole = asyncio.create_task(asyncio.to_thread(post, server))
        outcomes, status = await begun, (await whole).status_code
        return outcomes, time.monotonic() - hung_s, status

    async def end(server: LocalServer) -> list[Outcome]:
        task = asyncio.create_task(streams(server, 1, 16))
        await asyncio.sleep(0.5)
        server.process.terminate()
        return await task

    options = ("--health-stale-s", "1", "--stuck-step-s", "3", "--grace-s", "1")
    with faulty(*options) as (server, fault):
        outcomes, told_s, status = uvloop.run(scene(server, fault))
        num_told = sum(outcome.error is not None for outcome in outcomes)
        fault.write_text("")
        is_back = wait_health(server, 200) and server.books_balance() and post(server).is_success
        fault.write_text("hang")
        began_s = time.monotonic()
        (last,) = uvloop.run(end(server))
        code = server.process.wait(30)
        ended_s = time.monotonic() - began_s
        seen = (
            f"{num_told} of 4 streams and a {status} within {told_s:.1f} s, back {is_back}, "
            f"exit code {code} after {ended_s:.1f} s"
        )
        is_told = num_told == 4 and status == 503 and told_s < 8 and last.error is not None
        return seen, is_told and is_back and code == 0 and ended_s < 15


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
    with open("/dev/full", "wb") as full, LocalServer(SMALL, stderr=full) as server:
        statuses = {post(server).status_code for _ in range(20)}
        return f"{statuses}", statuses == {200} and server.books_balance()


def sigterm() -> Check:
    """SIGTERM under load: every stream ends properly within the grace time, exit code 0."""

    async def scene(server: LocalServer) -> list[Outcome]:
        task = asyncio.create_task(streams(server, 16, 64))
        await asyncio.sleep(1.0)
        server.process.send_signal(signal.SIGTERM)
        return await task

    with LocalServer(SMALL) as server:
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

    with LocalServer(SMALL) as server:
        port = server.url.rpartition(":")[2]
        outcomes, took_s = uvloop.run(scene(server))
        server.process.wait(10)
        with LocalServer([*SMALL, "--port", port]) as again:
            after = post(again).status_code
        errors = sum(outcome.error is not None for outcome in outcomes)
        seen = f"{errors} of 16 clients told within {took_s:.1f} s, then {after} on the same port"
        return seen, errors == 16 and took_s < 5 and after == 200


def telemetry_cost() -> Check:
    """Reading the sensors takes less than 0.5 % of a core."""
    with LocalServer(SMALL) as server:
        begin = httpx.get(f"{server.url}/v1/telemetry").json()
        began_s = time.monotonic()
        time.sleep(10)
        end = httpx.get(f"{server.url}/v1/telemetry").json()
        share = (end["cpu_s"] - begin["cpu_s"]) / (time.monotonic() - began_s)
        per_s = (end["num_samples"] - begin["num_samples"]) / 10
        return f"{share:.2%} of a core at {per_s:.1f} samples/s", share < 0.005 and per_s > 1.5


CHECKS: dict[str, Callable[[], Check]] = {
    "stuck step": stuck_step,
    "lost step": lost_step,
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
