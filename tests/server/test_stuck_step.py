"""A step that does not return: what is refused, who is told when, and that all comes back."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from itertools import cycle
from typing import Any

import pytest

from engine.types import Submit
from server.http import CLIENT
from tests.server.fake_engine import MODEL, FakeEngine, ids_of, run, serve

PATHS = ("/v1/completions", "/v1/chat/completions")
BODY: dict[str, Any] = {"model": MODEL, "prompt": "hi", "max_tokens": 5}


def test_a_stuck_step_drains_and_its_return_ends_that() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with serve(engine, health_stale_s=5.0) as served:
            engine.heartbeat_at_s = time.monotonic() - 6
            for check, expected in (("", 503), ("?check=live", 200), ("?check=engine", 503)):
                async with served.http.get(served.url + "/health" + check) as response:
                    assert response.status == expected
                    assert (await response.json())["status"] == "engine stale"
            async with served.http.post(served.url + PATHS[0], json=BODY) as refused:
                assert refused.status == 503
                assert (await refused.json())["error"]["code"] == "engine_stale"
                assert refused.headers["Retry-After"]
            seen = served.app[CLIENT].gate.decisions()[0]
            assert (seen.admitted, seen.reason, seen.retry_after_s) == (False, "engine_stale", 10)
            engine.heartbeat_at_s = None
            assert (await served.post(PATHS[0], BODY))[0] == 200

    run(main())


@pytest.mark.parametrize("path", PATHS)
def test_a_step_that_stays_stuck_ends_open_requests_and_gives_their_places_back_later(
    path: str,
) -> None:
    may_step = threading.Event()

    def script(submit: Submit) -> Iterator[int]:
        yield from ids_of("ab")
        may_step.wait(20)
        yield from cycle(ids_of("c"))

    async def main() -> None:
        engine = FakeEngine(script)
        async with serve(engine, health_stale_s=1.0, stuck_step_s=2.0) as served:
            body: dict[str, Any] = {"model": MODEL, "max_tokens": 1000}
            body |= {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}
            del body["messages" if path == PATHS[0] else "prompt"]
            data = json.dumps(body | {"stream": True}).encode()
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            await reader.readuntil(b"data: ")  # it has begun
            engine.heartbeat_at_s = time.monotonic()
            began_s = time.monotonic()
            whole = asyncio.create_task(served.post(path, body))
            late = asyncio.create_task(served.post(path, body | {"stream": True}))
            async with served.http.get(served.url + "/v1/speculation") as response:
                assert response.status == 200
            events = (await reader.read()).split(b"data: ")  # until the server closes
            assert 1.5 < time.monotonic() - began_s < 4
            error = json.loads(events[-1].splitlines()[0])["error"]
            assert (error["code"], error["type"]) == ("engine_stale", "service_unavailable_error")
            writer.close()
            for status, answer in await asyncio.gather(whole, late):
                assert (status, answer["error"]["code"]) == (503, "engine_stale")
            assert served.app[CLIENT].num_open == 3  # the engine still holds them
            may_step.set()
            engine.heartbeat_at_s = None
            await served.wait_idle()
            assert len(engine.aborted) == 3
            assert (await served.post(path, body | {"max_tokens": 5}))[0] == 200

    run(main())


def test_the_policy_of_an_engine_that_does_not_answer_is_a_503() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.speculation = Future  # type: ignore[method-assign,assignment]
        async with (
            serve(engine, health_stale_s=1.0) as served,
            served.http.get(served.url + "/v1/speculation") as response,
        ):
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "engine_stale"

    run(main())
