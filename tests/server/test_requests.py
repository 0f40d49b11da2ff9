"""Requests that cannot be served: the status, and a message that names the field."""

import asyncio
import json
from typing import Any

import pytest

from tests.server.fake_engine import MODEL, FakeEngine, run, serve, wait_for

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
    TEXT: {"model": MODEL, "prompt": "x", "max_tokens": 2},
}
JSON = {"Content-Type": "application/json"}

BOTH: list[dict[str, Any]] = [
    {"unknown": 1},
    {"temperature": 2.1},
    {"temperature": -0.1},
    {"temperature": "1"},
    {"top_p": 1.01},
    {"top_p": -1},
    {"top_k": -2},
    {"min_p": 2},
    {"repetition_penalty": 0},
    {"presence_penalty": 3},
    {"frequency_penalty": -3},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"99999": 1}},
    {"logit_bias": {"1": 101}},
    {"logit_bias": {"1": "x"}},
    {"max_tokens": -1},
    {"max_tokens": True},
    {"max_tokens": 1.5},
    {"min_tokens": 3},
    {"n": 0},
    {"n": 129},
    {"n": "2"},
    {"seed": 2**64},
    {"seed": 1.5},
    {"stop": ""},
    {"stop": ["a", "b", "c", "d", "e"]},
    {"stop": [1]},
    {"stop": "x" * 2000},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [99999]},
    {"stream": 1},
    {"stream_options": {"include_usage": True}},
    {"store": True},
    {"service_tier": "flex"},
]
CHAT_ONLY: list[dict[str, Any]] = [
    {"messages": []},
    {"messages": "x"},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "robot", "content": "x"}]},
    {"messages": [{"role": "tool", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x", "extra": 1}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
    {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
    {"max_tokens": 0},
    {"max_tokens": None, "max_completion_tokens": 0},
    {"max_completion_tokens": 2, "max_tokens": 2},
    {"top_logprobs": 1},
    {"logprobs": True, "top_logprobs": 21},
    {"logprobs": 1},
    {"response_format": {"type": "json_object"}},
    {"tools": [{"type": "function"}]},
    {"tool_choice": "required"},
    {"functions": [{"name": "f"}]},
    {"modalities": ["audio"]},
    {"audio": {"voice": "x"}},
    {"prediction": {"type": "content"}},
    {"reasoning_effort": "high"},
    {"web_search_options": {}},
]
TEXT_ONLY: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": ["a", 1]},
    {"prompt": ["a", [1]]},
    {"prompt": [-1]},
    {"prompt": [99999]},
    {"prompt": [[1], [99999]]},
    {"prompt": [1.5]},
    {"prompt": None},
    {"logprobs": 21},
    {"logprobs": -1},
    {"logprobs": True},
    {"best_of": 2},
    {"best_of": True},
    {"suffix": "x"},
    {"max_completion_tokens": 5},
]


@pytest.mark.parametrize(
    ("path", "cases"), [(CHAT, BOTH + CHAT_ONLY), (TEXT, BOTH + TEXT_ONLY)], ids=["chat", "text"]
)
def test_a_field_that_cannot_be_honoured_is_a_400_that_names_it(
    path: str, cases: list[dict[str, Any]]
) -> None:
    async def main() -> None:
        async with serve() as served:
            for changes in cases:
                name = list(changes)[-1]
                status, answer = await served.post(path, BASE[path] | changes)
                assert status == 400, changes
                error = answer["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["type"] == "invalid_request_error"
                assert (error["param"] or "").startswith(name), (changes, error)
                assert name in error["message"], (changes, error)
            assert served.engine.submits == []

    run(main())


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_missing_field_is_a_400_that_names_it(path: str) -> None:
    async def main() -> None:
        async with serve() as served:
            for name in set(BASE[path]) - {"max_tokens"}:
                body = {k: v for k, v in BASE[path].items() if k != name}
                status, answer = await served.post(path, body)
                assert (status, answer["error"]["param"]) == (400, name)

    run(main())


def test_values_that_change_nothing_are_accepted() -> None:
    chat = {
        "n": 1,
        "stop": None,
        "tools": None,
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
        "logit_bias": {},
        "logprobs": False,
        "modalities": ["text"],
        "stream": False,
    }
    text = {"best_of": 1, "suffix": None, "echo": False, "logprobs": None, "user": "me"}

    async def main() -> None:
        async with serve() as served:
            for path, fields in ((CHAT, chat), (TEXT, text)):
                for name, value in fields.items():
                    status, answer = await served.post(path, BASE[path] | {name: value})
                    assert status == 200, (name, answer)

    run(main())


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_a_body_that_is_no_request_is_a_400(path: str) -> None:
    bodies = [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "\\ud800"}',
        b'{"tools": ' + b"[" * 500_000,
        b"[" * 500_000,
        b'{"model": "toy"} x',
        b'{"temperature": NaN}',
    ]

    async def main() -> None:
        async with serve() as served:
            for body in bodies:
                async with served.http.post(served.url + path, data=body, headers=JSON) as got:
                    assert got.status == 400, body[:40]
                    assert set(await got.json()) == {"error"}

    run(main())


def test_a_body_over_the_limit_is_a_413() -> None:
    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 1000

    async def main() -> None:
        async with serve(max_body_bytes=10_000) as served:
            for data in (b" " * 10_001, pieces()):
                async with served.http.post(served.url + TEXT, data=data, headers=JSON) as got:
                    assert got.status == 413
                    assert (await got.json())["error"]["code"] == "body_too_large"
            body = json.dumps(BASE[TEXT]).encode().ljust(10_000)
            async with served.http.post(served.url + TEXT, data=body, headers=JSON) as got:
                assert got.status == 200

    run(main())


def test_a_body_that_does_not_claim_to_be_json_is_a_415() -> None:
    async def main() -> None:
        async with serve() as served:
            headers = {"Content-Type": "text/plain"}
            async with served.http.post(served.url + TEXT, data=b"{}", headers=headers) as got:
                assert got.status == 415
                assert (await got.json())["error"]["type"] == "invalid_request_error"

    run(main())


def test_an_unknown_model_path_or_method_has_its_status_and_the_envelope() -> None:
    async def main() -> None:
        async with serve() as served:
            for path in (CHAT, TEXT):
                status, answer = await served.post(path, BASE[path] | {"model": "other"})
                assert (status, answer["error"]["code"]) == (404, "model_not_found")
            for method, path, expected in (
                ("GET", "/v1/models/other", 404),
                ("GET", "/nowhere", 404),
                ("GET", CHAT, 405),
                ("DELETE", "/v1/models", 405),
            ):
                async with served.http.request(method, served.url + path) as got:
                    assert got.status == expected
                    assert set((await got.json())["error"]) == {"message", "type", "param", "code"}
                    assert got.headers["x-request-id"]
                    assert ("Allow" in got.headers) == (expected == 405)

    run(main())


def test_more_sequences_than_the_server_takes_at_once_is_a_400() -> None:
    async def main() -> None:
        async with serve(max_sequences=2, max_queue=2) as served:
            status, answer = await served.post(TEXT, BASE[TEXT] | {"n": 5})
            assert (status, answer["error"]["param"]) == (400, "n")
            status, _ = await served.post(TEXT, BASE[TEXT] | {"n": 4})
            assert status == 200

    run(main())


def test_beyond_the_queue_is_a_429_with_retry_after_and_room_comes_back() -> None:
    async def main() -> None:
        engine = FakeEngine(max_sequences=2)
        async with serve(engine, max_sequences=2, max_queue=3) as served:
            engine.hold()
            url = served.url + TEXT
            requests = [asyncio.create_task(served.post(TEXT, BASE[TEXT])) for _ in range(5)]
            await wait_for(lambda: len(engine.submits) == 5)
            for _ in range(3):
                async with served.http.post(url, json=BASE[TEXT]) as got:
                    assert got.status == 429
                    assert 1 <= int(got.headers["Retry-After"]) <= 60
                    assert (await got.json())["error"]["type"] == "rate_limit_error"
            engine.hold(False)
            assert [status for status, _ in await asyncio.gather(*requests)] == [200] * 5
            assert (await served.post(TEXT, BASE[TEXT]))[0] == 200

    run(main())


def test_a_refused_request_gives_its_places_back() -> None:
    async def main() -> None:
        async with serve(max_sequences=1, max_queue=0) as served:
            for _ in range(3):
                assert (await served.post(TEXT, BASE[TEXT] | {"temperature": 9}))[0] == 400
                assert (await served.post(TEXT, BASE[TEXT] | {"prompt": "x" * 9999}))[0] == 400
            assert (await served.post(TEXT, BASE[TEXT]))[0] == 200

    run(main())


def test_a_body_that_is_not_compressed_as_it_says_is_a_400() -> None:
    async def main() -> None:
        async with serve() as served:
            headers = JSON | {"Content-Encoding": "gzip"}
            async with served.http.post(
                served.url + TEXT, data=b"not gzip", headers=headers
            ) as response:
                assert response.status == 400
                assert "decoded" in (await response.json())["error"]["message"]

    run(main())
