"""Clients that stand still while they send, and what never reaches a handler."""

import asyncio
import gzip
import json
import time
from typing import Any

import pytest

from server.connection import CONNECTIONS
from tests.server.fake_engine import MODEL, FakeEngine, Served, run, serve, wait_for

TEXT = "/v1/completions"
BODY = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


async def exchange(served: Served, *parts: bytes, pause_s: float = 0.1) -> tuple[bytes, float]:
    """Send the parts with a pause after each; the answer, and when the server closed."""
    began_s = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)

    async def read() -> bytes:
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""  # closed on a client that was still sending

    answer = asyncio.create_task(read())
    for part in parts:
        if not answer.done():  # else the server has had enough
            writer.write(part)
            await asyncio.sleep(pause_s)
    await asyncio.wait_for(answer, 10)
    took_s = time.monotonic() - began_s
    writer.close()
    return answer.result(), took_s


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


@pytest.mark.parametrize("sent", [b"", b"POST /v1/completions HTTP/1.1\r\nHo"])
def test_headers_that_do_not_come_end_the_connection(sent: bytes) -> None:
    async def main() -> None:
        async with serve(header_timeout_s=0.5) as served:
            answer, took_s = await exchange(served, sent)
            assert error_of(answer)[0] == 408
            assert 0.4 < took_s < 2

    run(main())


def test_headers_that_drip_end_the_connection_too() -> None:
    async def main() -> None:
        async with serve(header_timeout_s=0.5) as served:
            drips = [b"GET /health HTTP/1.1\r\n", *(b"X-%d: y\r\n" % i for i in range(30))]
            answer, took_s = await exchange(served, *drips)
            assert not answer or error_of(answer)[0] == 408
            assert took_s < 2

    run(main())


def test_a_second_request_on_a_connection_has_its_own_time() -> None:
    async def main() -> None:
        async with serve(header_timeout_s=0.6) as served:
            whole = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
            answer, took_s = await exchange(served, whole, whole, whole, b"GET /", pause_s=0.4)
            assert answer.count(b"200 OK") == 3
            assert b"408 Request Timeout" in answer
            assert took_s > 1.6

    run(main())


def test_a_body_right_behind_its_headers_is_not_taken_for_headers_that_drip() -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.1), header_timeout_s=0.5) as served:
            connections = served.app[CONNECTIONS]
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            await wait_for(lambda: len(connections) == 1)
            (connection,) = connections
            data = json.dumps(BODY | {"max_tokens": 15}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            # As where both were read before the handler could begin.
            connection.data_received(head + b"Content-Length: %d\r\n\r\n" % len(data))
            connection.data_received(data)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), 5)
            assert answer == b"HTTP/1.1 200 OK\r\n"
            writer.close()

    run(main())


def test_an_idle_connection_that_has_been_used_stays_open() -> None:
    async def main() -> None:
        async with serve(header_timeout_s=0.2) as served:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"}")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reader.read(), 1.2)
            writer.close()

    run(main())


def test_a_body_that_drips_is_a_408() -> None:
    async def main() -> None:
        async with serve(body_timeout_s=0.5) as served:
            head = (
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
                b"Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(head)
            for _ in range(4):
                writer.write(b"x")
                await asyncio.sleep(0.2)
            answer = await asyncio.wait_for(reader.readuntil(b"}}"), 2)
            assert error_of(answer)[0] == 408
            assert b"Connection: close" in answer
            writer.close()

    run(main())


def test_a_body_that_unpacks_beyond_the_limit_is_a_413_and_ends_the_connection() -> None:
    async def main() -> None:
        async with serve(max_body_bytes=1 << 20) as served:
            data = gzip.compress(b" " * (20 << 20))
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            rest = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
            answer, _ = await exchange(served, head + rest + data)
            assert error_of(answer)[0] == 413
            assert b"Connection: close" in answer

    run(main())


def test_a_large_body_that_comes_steadily_may_take_longer_than_the_time_out() -> None:
    async def main() -> None:
        async with serve(body_timeout_s=0.3) as served:
            data = json.dumps(BODY).encode().ljust(60_000)

            async def slowly() -> Any:
                for start in range(0, len(data), 6000):
                    yield data[start : start + 6000]
                    await asyncio.sleep(0.08)

            headers = {"Content-Type": "application/json"}
            async with served.http.post(
                served.url + TEXT, data=slowly(), headers=headers
            ) as response:
                assert response.status == 200

    run(main())


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"nonsense\r\n\r\n",
        b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"".join(b"X-%d: y\r\n" % i for i in range(200)) + b"\r\n",
    ],
)
def test_what_is_no_http_or_has_too_much_of_it_is_a_400_in_the_envelope(sent: bytes) -> None:
    async def main() -> None:
        async with serve() as served:
            answer, _ = await exchange(served, sent)
            status, error = error_of(answer)
            assert (status, error["type"]) == (400, "invalid_request_error")
            assert (await served.post(TEXT, BODY))[0] == 200

    run(main())


def test_a_body_that_cannot_be_decoded_is_a_400_and_fills_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def main() -> None:
        async with serve() as served:
            data = b"this is no gzip"
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            rest = b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
            answer, _ = await exchange(served, head + rest + data)
            assert error_of(answer)[0] == 400

    run(main())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_an_expectation_that_is_not_known_is_a_417_in_the_envelope() -> None:
    async def main() -> None:
        async with serve() as served:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: %b\r\n"
            answer, _ = await exchange(served, head % b"miracles" + b"Content-Length: 0\r\n\r\n")
            assert error_of(answer)[0] == 417
            body = json.dumps(BODY).encode()
            rest = b"Content-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n"
            known = head % b"100-continue" + rest % len(body) + b"\r\n"
            answer, _ = await exchange(served, known, body)
            assert answer.startswith(b"HTTP/1.1 100 Continue")
            assert b"200 OK" in answer

    run(main())
