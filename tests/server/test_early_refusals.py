"""Refusals before aiohttp builds a request: the usual answers, and to nobody else."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from server.engine_client import EngineClient
from server.http import CLIENT
from tests.server.fake_engine import MODEL, FakeEngine, Served, run, serve, wait_for

PATH = "/v1/completions"
CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 5}
CHAT_BODY: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Answer(msgspec.Struct):
    status: int
    headers: dict[str, str]
    body: Any

    @property
    def code(self) -> str:
        code: str = self.body["error"]["code"]
        return code


class Client:
    """One connection that stays open."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, body: Any, path: str = PATH, **headers: str) -> None:
        self.writer.write(request(body, path, **headers))

    async def answer(self) -> Answer:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)).decode()
        status_line, *lines = head.strip().split("\r\n")
        headers = {name: value for name, _, value in (line.partition(": ") for line in lines)}
        body = await self.reader.readexactly(int(headers["Content-Length"]))
        return Answer(int(status_line.split()[1]), headers, json.loads(body))

    async def ask(self, body: Any, path: str = PATH, **headers: str) -> Answer:
        self.send(body, path, **headers)
        return await self.answer()


def request(body: Any, path: str = PATH, **headers: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Host": "x", "Content-Type": "application/json"} | headers
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of each request that came the usual way as far as the engine client."""
    calls: list[int] = []
    really_open = EngineClient.open

    def open_(self: EngineClient, arrival: Any, num_sequences: int) -> Any:
        calls.append(num_sequences)
        return really_open(self, arrival, num_sequences)

    monkeypatch.setattr(EngineClient, "open", open_)
    return calls


@asynccontextmanager
async def overloaded(
    opened: list[int], **settings: Any
) -> AsyncIterator[tuple[Served, Client, list[asyncio.Task[Any]]]]:
    """A server whose two places are taken and that has refused one request the usual way."""
    engine = FakeEngine(max_sequences=1)
    options = {"headers": {"Authorization": "Bearer secret"}}
    async with serve(engine, max_sequences=1, max_queue=1, **settings) as served:
        engine.hold()
        busy = [asyncio.create_task(served.post(PATH, BODY, **options)) for _ in range(2)]
        await wait_for(lambda: len(engine.submits) == 2)
        client = Client(*await asyncio.open_connection("127.0.0.1", served.port))
        try:
            client.send(BODY | {"seed": 1}, Authorization="Bearer secret")
            assert (await client.answer()).code == "queue_full"
            opened.clear()
            yield served, client, busy
        finally:
            engine.hold(False)
            await asyncio.gather(*busy)
            client.writer.close()


def test_an_early_refusal_is_the_usual_one(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened) as (served, client, _):
            for path, body in ((PATH, BODY), (CHAT, CHAT_BODY)):
                early = await client.ask(body | {"seed": 2}, path, **{"x-request-id": "mine"})
                assert not opened
                whole = request(body | {"seed": 3}, path, **{"x-request-id": "mine"})
                client.writer.write(whole[:-5])  # what comes too slowly goes the usual way
                await asyncio.sleep(0.2)
                client.writer.write(whole[-5:])
                usual = await client.answer()
                assert opened == [1]
                opened.clear()
                assert (early.status, early.body) == (usual.status, usual.body)
                assert early.status == 429
                assert set(early.headers) == set(usual.headers)
                same = ("Content-Type", "Content-Length", "Server", "x-request-id")
                for name in same:
                    assert early.headers[name] == usual.headers[name], name
                wait_ms = int(early.headers["retry-after-ms"])
                assert 0 < wait_ms / 1000 <= int(early.headers["Retry-After"])
            decisions = served.app[CLIENT].gate.decisions()
            assert [seen.reason for seen in decisions[:4]] == ["queue_full"] * 4
            async with served.http.get(served.url + "/metrics") as response:
                count = 'fulcrum_admission_decisions_total{model_name="toy",reason="queue_full"}'
                assert f"{count} 5.0" in await response.text()

    run(main())


def test_a_body_right_behind_its_headers_is_refused_with_them(opened: list[int]) -> None:
    """As httpx sends them, and so the openai package."""

    async def main() -> None:
        async with overloaded(opened) as (_, client, _):
            head, _, data = request(BODY | {"seed": 14}).partition(b"\r\n\r\n")
            client.writer.write(head + b"\r\n\r\n")
            await asyncio.sleep(0.01)
            client.writer.write(data)
            assert ((await client.answer()).status, opened) == (429, [])

    run(main())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "toy"', 400, "invalid_json"),
        (b"\xff", 400, "invalid_json"),
        (BODY | {"no_such_field": 1}, 400, "unknown_field"),
        (BODY | {"model": "other"}, 404, "model_not_found"),
        (BODY | {"timeout": -1}, 400, None),
        (BODY | {"stop": ["a"] * 9}, 400, None),
        (BODY | {"n": 100}, 400, "too_many_sequences"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_an_overload_too(
    opened: list[int], body: Any, status: int, code: str | None
) -> None:
    async def main() -> None:
        async with overloaded(opened) as (_, client, _):
            answer = await client.ask(body)
            assert answer.status == status
            assert code is None or answer.code in (code, None)
            assert "Retry-After" not in answer.headers

    run(main())


def test_only_holders_of_the_key_are_told_of_the_overload(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened, api_key="secret") as (_, client, _):
            for given in ("Bearer wrong", "Basic secret", ""):
                assert (await client.ask(BODY, Authorization=given)).status == 401
            answer = await client.ask(BODY | {"seed": 4}, Authorization="Bearer secret")
            assert (answer.status, answer.code, opened) == (429, "queue_full", [])

    run(main())


def test_a_body_over_the_limit_and_one_of_another_type_are_no_refusals(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened, max_body_bytes=200) as (_, client, _):
            answer = await client.ask(BODY, **{"Content-Type": "text/plain"})
            assert answer.status == 415
            assert (await client.ask(BODY | {"prompt": "x" * 200})).status == 413

    run(main())


def test_a_place_that_gets_free_is_had_at_once(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened) as (served, client, busy):
            assert (await client.ask(BODY | {"seed": 5})).status == 429
            served.engine.hold(False)
            await asyncio.gather(*busy)
            assert (await client.ask(BODY | {"seed": 6})).status == 200

    run(main())


def test_who_comes_again_as_told_gets_in(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened) as (served, client, busy):
            early = await client.ask(BODY | {"seed": 7})
            assert (early.status, opened) == (429, [])
            served.engine.hold(False)
            await asyncio.gather(*busy)
            await asyncio.sleep(int(early.headers["retry-after-ms"]) / 1000)
            assert (await client.ask(BODY | {"seed": 7})).status == 200
            assert served.app[CLIENT].gate.decisions()[0].was_promised

    run(main())


def test_higher_priority_gets_in_and_equal_priority_does_not(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened) as (served, client, busy):
            assert (await client.ask(BODY | {"seed": 8, "priority": 0})).code == "queue_full"
            client.send(BODY | {"seed": 9, "priority": -1})
            done, _ = await asyncio.wait(busy, return_when=asyncio.FIRST_COMPLETED, timeout=3)
            ((status, answer),) = (task.result() for task in done)
            assert (status, answer["error"]["code"]) == (429, "shed")
            served.engine.hold(False)
            assert (await client.answer()).status == 200

    run(main())


def test_requests_that_come_together_are_answered_in_order(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened) as (_, client, _):
            client.writer.write(request(BODY | {"seed": 10}) + HEALTH + request(BODY))
            assert [(await client.answer()).status for _ in range(3)] == [429, 200, 429]
            # Parts of two requests in one piece, the first of which is refused.
            whole = request(BODY | {"seed": 11})
            client.writer.write(whole + HEALTH[:9])
            assert (await client.answer()).status == 429
            client.writer.write(HEALTH[9:])
            assert (await client.answer()).status == 200

    run(main())


def test_a_connection_takes_any_number_of_refusals(
    opened: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.overload._GATHER_S", 0.0)

    async def main() -> None:
        async with overloaded(opened) as (_, client, _):
            for number in range(100):
                assert (await client.ask(BODY | {"seed": number})).status == 429
            client.writer.write(HEALTH + HEALTH)  # aiohttp's parser counts what it still waits for
            assert [(await client.answer()).status for _ in range(2)] == [200, 200]

    run(main())


def test_who_was_refused_may_keep_the_connection_or_close_it(opened: list[int]) -> None:
    async def main() -> None:
        async with overloaded(opened, header_timeout_s=0.3) as (_, client, _):
            assert (await client.ask(BODY | {"seed": 12})).status == 429
            await asyncio.sleep(1.0)  # as long as no headers begin to come
            assert (await client.ask(BODY | {"seed": 13}, Connection="close")).status == 429
            assert await asyncio.wait_for(client.reader.read(), 2) == b""

    run(main())
