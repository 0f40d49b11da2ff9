"""What the checks of bench.faults share: a small server, one whose steps heed a file, clients."""

import asyncio
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx

from bench.client import Outcome, Target, complete
from bench.local_server import LocalServer

MODEL = "smollm2-135m"
CLIENT_S = 60.0  # a client that waits longer hangs
SMALL = ("--max-model-len", "2048", "--kv-memory", "100MB")

Check = tuple[str, bool]  # what was seen, whether it is what should be


def body(max_tokens: int = 8) -> dict[str, Any]:
    return {"model": MODEL, "prompt": "Once upon a time", "max_tokens": max_tokens}


def post(server: LocalServer, max_tokens: int = 8) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body(max_tokens), timeout=CLIENT_S)


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
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=CLIENT_S)
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
            [*SMALL, *options], module="bench.faulty_server", environment=environment
        ) as s:
            yield s, fault
