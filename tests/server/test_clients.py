"""Clients that go away, read slowly or come in numbers; and an event loop that never waits."""

import asyncio
import json
import socket
import time
from itertools import chain, repeat
from typing import Any

import pytest

from server.connection import CONNECTIONS
from server.http import CLIENT
from tests.server.fake_engine import (
    EOS,
    MODEL,
    WORD_IDS,
    FakeEngine,
    Served,
    ids_of,
    run,
    serve,
    wait_for,
)

TEXT = "/v1/completions"
ENDLESS: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 4000}


async def open_socket(served: Served, body: dict[str, Any], buffer: int = 0) -> socket.socket:
    """Send a request over a bare socket and read nothing."""
    data = json.dumps(body).encode()
    client = socket.socket()
    if buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", served.port))
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    await loop.sock_sendall(client, f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return client


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("held", [True, False])
def test_a_client_that_goes_away_has_its_sequences_aborted(stream: bool, held: bool) -> None:
    async def main() -> None:
        engine = FakeEngine(step_s=0.005)
        async with serve(engine) as served:
            engine.hold(held)  # held: it goes away before the first token
            client = await open_socket(served, ENDLESS | {"stream": stream, "n": 3})
            await wait_for(lambda: len(engine.submits) == 3)
            await asyncio.sleep(0.02)
            client.close()
            await served.wait_idle(timeout_s=0.5)
            assert sorted(engine.aborted) == sorted(s.seq_id for s in engine.submits)

    run(main())


def test_a_slow_reader_holds_up_nobody_and_is_cut_in_the_end() -> None:
    async def main() -> None:
        # The slow ones get 20 KB a token, far beyond every buffer on the way.
        big = WORD_IDS["x" * 20_000]
        engine = FakeEngine(
            lambda s: repeat(big) if len(s.prompt_ids) > 2 else chain(ids_of("ab"), repeat(EOS)),
            step_s=0.001,
        )
        async with serve(engine, stalled_reader_s=0.5) as served:
            slow = [
                await open_socket(served, ENDLESS | {"prompt": "slow", "stream": True}, 4096)
                for _ in range(3)
            ]
            await wait_for(lambda: len(engine.submits) == 3)
            connections = served.app[CONNECTIONS]
            await wait_for(lambda: sum(one.writing_paused for one in connections) == 3)
            for _ in range(20):
                began_s = time.monotonic()
                status, _ = await served.post(TEXT, ENDLESS)
                assert status == 200
                assert time.monotonic() - began_s < 0.3
            await served.wait_idle(timeout_s=3.0)
            await wait_for(lambda: not any(one.writing_paused for one in connections))
            assert len(engine.aborted) == 3
            for client in slow:
                client.close()

    run(main())


def test_a_reader_of_a_whole_answer_that_stalls_is_cut_too() -> None:
    async def main() -> None:
        big = WORD_IDS["x" * 20_000]
        engine = FakeEngine(lambda s: chain(repeat(big, 1000), repeat(EOS)))
        async with serve(engine, stalled_reader_s=0.5) as served:
            client = await open_socket(served, ENDLESS, 4096)
            connections = served.app[CONNECTIONS]
            await wait_for(lambda: any(one.writing_paused for one in connections))
            await wait_for(lambda: not connections)
            client.close()

    run(main())


def test_a_reader_that_stalls_over_the_last_bytes_of_an_answer_is_cut_too() -> None:
    async def main() -> None:
        big = WORD_IDS["x" * 20_000]
        engine = FakeEngine(lambda s: chain(repeat(big, 1000), repeat(EOS)))
        async with serve(engine, stalled_reader_s=0.5) as served:
            connections = served.app[CONNECTIONS]
            client = socket.create_connection(("127.0.0.1", served.port))
            await wait_for(lambda: len(connections) == 1)
            (connection,) = connections
            assert connection.transport is not None
            # As if the rest were small: no write waits for it, and the request is over.
            connection.transport.set_write_buffer_limits(high=1 << 30)
            data = json.dumps(ENDLESS).encode()
            head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            await served.wait_idle()
            await wait_for(lambda: not connections)
            client.close()

    run(main())


def test_a_reader_that_is_slow_but_reads_gets_everything() -> None:
    async def main() -> None:
        big = WORD_IDS["x" * 20_000]
        engine = FakeEngine(lambda s: chain(repeat(big, 400), repeat(EOS)))
        async with serve(engine) as served:
            body = ENDLESS | {"stream": True}
            async with served.http.post(served.url + TEXT, json=body) as response:
                await asyncio.sleep(0.3)
                text = await response.text()
            events = [event.removeprefix("data: ") for event in text.split("\n\n")]
            assert events[-2] == "[DONE]"
            choices = [json.loads(event)["choices"][0] for event in events[:-2]]
            assert sum(len(choice["text"]) for choice in choices) == 400 * 20_000
            assert choices[-1]["finish_reason"] == "stop"

    run(main())


def test_the_event_loop_never_waits() -> None:
    async def main() -> None:
        gaps: list[float] = []

        async def heartbeat() -> None:
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(0.001)
                gaps.append(time.monotonic() - before_s)

        engine = FakeEngine(step_s=0.01)
        original = engine.stop
        engine.stop = lambda grace_s: (time.sleep(0.2), original(grace_s))  # type: ignore[method-assign,func-returns-value,return-value,assignment]
        async with serve(engine) as served:
            tokenizer = served.app[CLIENT].tokenizer

            def slow_encode(text: str, **options: Any) -> list[int]:
                time.sleep(0.2)  # a long text, as a tokenizer without the GIL would take it
                return ids_of("x")

            tokenizer.encode = slow_encode  # type: ignore[method-assign]
            task = asyncio.create_task(heartbeat())
            body = ENDLESS | {"max_tokens": 30, "prompt": "x" * 10_000}
            answers = [served.post(TEXT, body) for _ in range(8)]
            answers += [served.post("/tokenize", {"prompt": "x" * 10_000}) for _ in range(2)]
            assert {status for status, _ in await asyncio.gather(*answers)} == {200}
        task.cancel()
        assert max(gaps) < 0.1

    run(main())


def test_health_answers_at_once_while_32_streams_run() -> None:
    async def main() -> None:
        async with serve(FakeEngine(step_s=0.005)) as served:
            clients = [await open_socket(served, ENDLESS | {"stream": True}) for _ in range(32)]
            await wait_for(lambda: len(served.engine.submits) == 32)
            times = []
            for _ in range(20):
                began_s = time.monotonic()
                async with served.http.get(served.url + "/health") as response:
                    assert response.status == 200
                times.append(time.monotonic() - began_s)
            for client in clients:
                client.close()
            assert sorted(times)[-2] < 0.05

    run(main())


def test_100_requests_at_once_are_all_answered() -> None:
    async def main() -> None:
        async with serve(FakeEngine(max_sequences=16)) as served:
            bodies = [ENDLESS | {"max_tokens": 1 + i % 7} for i in range(100)]
            answers = await asyncio.gather(*(served.post(TEXT, body) for body in bodies))
            used = [answer["usage"]["completion_tokens"] for _, answer in answers]
            assert used == [body["max_tokens"] for body in bodies]

    run(main())


def test_an_engine_that_dies_ends_every_request() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serve(engine) as served:
            engine.hold()
            requests = [asyncio.create_task(served.post(TEXT, ENDLESS)) for _ in range(3)]
            await wait_for(lambda: len(engine.submits) == 3)
            engine.die()
            assert [status for status, _ in await asyncio.gather(*requests)] == [500] * 3
            assert (await served.post(TEXT, ENDLESS))[0] == 503
            async with served.http.get(served.url + "/health") as response:
                assert response.status == 503

    run(main())


def test_a_stream_that_cannot_be_decoded_ends_alone() -> None:
    async def main() -> None:
        # An id beyond the vocabulary makes the toy detokenizer raise.
        engine = FakeEngine(lambda s: repeat(9999) if len(s.prompt_ids) > 2 else repeat(97))
        async with serve(engine) as served:
            good = asyncio.create_task(served.post(TEXT, ENDLESS))
            status, answer = await served.post(TEXT, ENDLESS | {"prompt": "bad"})
            assert (status, answer["error"]["type"]) == (500, "server_error")
            assert (await good)[0] == 200

    run(main())
