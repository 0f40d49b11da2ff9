"""Clients that go away, drip or send nonsense: checks of bench.faults."""

import asyncio
import sys
import time

import msgspec
import uvloop

from bench.fault_scenes import MODEL, SMALL, Check, body, post
from bench.fuzz import FuzzResult, generated_requests, random_bytes
from bench.local_server import LocalServer

_MAX_GROWTH_BYTES = 32 << 20


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

    with LocalServer([*SMALL, "--max-ttft-s", "1000"]) as server:
        post(server)
        before = server.rss_bytes
        uvloop.run(leave(server))
        balance = server.books_balance()
        growth = server.rss_bytes - before
        after = post(server).status_code
        holds = balance and after == 200 and growth < 4 * _MAX_GROWTH_BYTES
        return f"books balance {balance}, then {after}, memory {growth / 1e6:+.0f} MB", holds


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

    with LocalServer([*SMALL, "--header-timeout-s", "3", "--body-timeout-s", "3"]) as server:
        times_s, answer_s = uvloop.run(scene(server))
        seen = f"all cut within {max(times_s):.1f} s, another client answered in {answer_s:.2f} s"
        return seen, max(times_s) < 15 and answer_s < 5 and server.books_balance()


def fuzz(duration_s: float) -> Check:
    """Random bytes and schemathesis: no 5xx, no hang, memory flat."""
    with LocalServer([*SMALL, "--header-timeout-s", "3", "--body-timeout-s", "3"]) as server:
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


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionError:
        return b""
