"""Streams of a server with the real model: their exact shape, and clients that behave badly."""

import itertools
import json
import socket
import time
from typing import Any

import httpx
import pytest

from tests.server_process import ServerProcess

MODEL = "smollm2-135m"
CHAT = {"messages": [{"role": "user", "content": "Name three colours."}]}
COMPLETION = {"prompt": "Three colours are"}


def stream_events(server: ServerProcess, path: str, body: dict[str, Any]) -> list[str]:
    """The data of every event of a stream."""
    body = {"model": MODEL, "temperature": 0, "max_tokens": 12, "stream": True} | body
    with httpx.stream("POST", f"{server.url}/v1/{path}", json=body, timeout=60) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def stream_chunks(server: ServerProcess, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    *events, last = stream_events(server, path, body)
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def test_chat_chunks_have_openais_shape(server: ServerProcess) -> None:
    chunks = stream_chunks(server, "chat/completions", CHAT)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert (
        len({(chunk["id"], chunk["created"], chunk["system_fingerprint"]) for chunk in chunks}) == 1
    )
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] in ("stop", "length")
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    ("path", "body"), [("chat/completions", CHAT), ("completions", COMPLETION)]
)
def test_usage_comes_in_a_chunk_of_its_own_when_asked(
    server: ServerProcess, path: str, body: dict[str, Any]
) -> None:
    options = {"stream_options": {"include_usage": True}}
    *chunks, last = stream_chunks(server, path, body | options)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    usage = last["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_streamed_text_is_the_text_of_one_answer(server: ServerProcess) -> None:
    client = server.client()
    settings: dict[str, Any] = {"model": MODEL, "seed": 5, "max_tokens": 40}
    question = [{"role": "user", "content": "Answer in emoji and in Japanese: what is rain?"}]
    whole = client.chat.completions.create(messages=question, **settings).choices[0]
    chunks = list(client.chat.completions.create(messages=question, stream=True, **settings))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.message.content
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason


def test_completion_chunks_have_openais_shape(server: ServerProcess) -> None:
    chunks = stream_chunks(server, "completions", COMPLETION)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}


def test_every_choice_of_a_stream_ends_once(server: ServerProcess) -> None:
    chunks = stream_chunks(
        server, "completions", COMPLETION | {"n": 4, "temperature": 1, "seed": 1}
    )
    ends = [
        chunk["choices"][0]["index"]
        for chunk in chunks
        if chunk["choices"][0]["finish_reason"] is not None
    ]
    assert sorted(ends) == [0, 1, 2, 3]


def open_stream(server: ServerProcess, max_tokens: int, receive_buffer: int = 0) -> socket.socket:
    """Send a streaming request over a bare socket and leave its answer unread."""
    body = json.dumps(
        {"model": MODEL, "stream": True, "max_tokens": max_tokens, "ignore_eos": True}
        | {"prompt": "Write on and on:", "logprobs": 5}
    ).encode()
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", server.port))
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return client


def wait_running(server: ServerProcess, count: int) -> None:
    deadline_s = time.monotonic() + 10
    while server.metrics()["fulcrum_requests_running"] < count:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_client_that_goes_away_frees_its_blocks(server: ServerProcess) -> None:
    before = server.wait_idle()
    client = open_stream(server, max_tokens=1500)
    assert client.recv(16)
    wait_running(server, 1)
    client.close()
    after = server.wait_idle(timeout_s=1.0)
    generated = after["fulcrum_generated_tokens_total"] - before["fulcrum_generated_tokens_total"]
    assert generated < 1000


def test_a_client_that_goes_away_before_the_answer_frees_its_blocks(server: ServerProcess) -> None:
    server.wait_idle()
    body = {"model": MODEL, "prompt": "Write on:", "max_tokens": 1500, "ignore_eos": True, "n": 3}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.5)
    server.wait_idle(timeout_s=1.0)


def test_slow_readers_hold_up_nobody(server: ServerProcess) -> None:
    server.wait_idle()
    # With logprobs an event is about 300 bytes: far more than these buffers hold.
    slow = [open_stream(server, max_tokens=1000, receive_buffer=2048) for _ in range(3)]
    wait_running(server, 3)
    times: list[float] = []
    stream = server.client().completions.create(
        model=MODEL,
        prompt="A fast reader",
        max_tokens=64,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _ in stream:
        times.append(time.monotonic())
    assert len(times) >= 32
    assert max(b - a for a, b in itertools.pairwise(times)) < 1.0
    assert httpx.get(f"{server.url}/health", timeout=1).status_code == 200
    for client in slow:
        client.close()
    server.wait_idle(timeout_s=2.0)
