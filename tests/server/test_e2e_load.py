"""A server with the real model under load: overload, preemption, shutdown, start-up time."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server_process import ServerProcess

MODEL = "smollm2-135m"
NAME = ("--served-model-name", MODEL)


def post_all(server: ServerProcess, bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    """Send all requests at once and return their answers in order."""

    async def send() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client:
            url = f"{server.url}/v1/completions"
            return await asyncio.gather(*(client.post(url, json=body) for body in bodies))

    return asyncio.run(send())


def body(index: int, max_tokens: int) -> dict[str, Any]:
    """Sampled, so that every sequence takes a way of its own; every other one is greedy."""
    return {
        "model": MODEL,
        "prompt": f"Story number {index}. Once upon a time",
        "max_tokens": max_tokens,
        "temperature": index % 2,
        "seed": index,
        "ignore_eos": True,
    }


def test_preemption_under_64_requests_changes_no_text(
    server: ServerProcess, start_server: Callable[..., ServerProcess]
) -> None:
    # Three blocks a sequence in the end, of which one is taken and one kept free at its start:
    # the third has to come from others.
    bodies = [body(index, 60) for index in range(64)]
    roomy = [response.json()["choices"][0]["text"] for response in post_all(server, bodies)]
    # With so little memory the last of them would wait longer than admission lets them.
    options = ("--max-model-len", "128", "--kv-memory", "20MB", "--max-ttft-s", "3600")
    small = start_server(*NAME, *options)
    answers = post_all(small, bodies)
    assert [answer.status_code for answer in answers] == [200] * 64
    assert [answer.json()["choices"][0]["text"] for answer in answers] == roomy
    assert all(answer.json()["usage"]["completion_tokens"] == 60 for answer in answers)
    metrics = small.wait_idle()
    assert metrics["fulcrum_preemptions_total"] > 0


def test_a_flood_beyond_the_queue_is_429_and_the_rest_is_answered(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(*NAME, "--max-sequences", "2", "--max-queue", "4")
    answers = post_all(server, [body(index, 24) for index in range(40)])
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 4
    for answer in answers:
        if answer.status_code == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert answer.json()["error"]["type"] == "rate_limit_error"
        else:
            assert answer.json()["usage"]["completion_tokens"] == 24
    server.wait_idle()
    assert post_all(server, [body(0, 1)])[0].status_code == 200


def start_streams(server: ServerProcess, count: int, max_tokens: int) -> list[Any]:
    """Streams that have each delivered a first chunk."""
    streams = [
        server.client().completions.create(
            model=MODEL,
            prompt=f"{index} is a number that",
            max_tokens=max_tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        for index in range(count)
    ]
    for stream in streams:
        next(stream)
    return streams


def test_sigterm_lets_running_streams_finish_and_exits_with_0(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(*NAME)
    streams = start_streams(server, 4, 120)
    server.process.terminate()
    time.sleep(0.2)
    try:
        refused = httpx.post(f"{server.url}/v1/completions", json=body(0, 1), timeout=5)
        assert refused.status_code == 503
    except httpx.TransportError:
        pass  # no longer listening: as good an answer
    for stream in streams:
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
        assert reasons[-1] == "length"
        assert set(reasons[:-1]) == {None}
    assert server.process.wait(10) == 0


def test_sigterm_ends_what_outlasts_the_grace_time(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(*NAME, "--grace-s", "0.5")
    (stream,) = start_streams(server, 1, 4000)
    started_s = time.monotonic()
    server.process.terminate()
    reasons: list[str | None] = []
    try:
        reasons = [chunk.choices[0].finish_reason for chunk in stream]
    except Exception as error:  # an error event is raised by the client
        reasons = [f"error: {error}"]
    assert reasons[-1] is not None
    assert "length" not in reasons
    assert server.process.wait(10) == 0
    assert time.monotonic() - started_s < 5


def test_a_second_sigterm_exits_at_once(start_server: Callable[..., ServerProcess]) -> None:
    server = start_server(*NAME)
    start_streams(server, 1, 4000)
    server.process.terminate()
    time.sleep(0.3)
    assert server.process.poll() is None
    started_s = time.monotonic()
    server.process.terminate()
    server.process.wait(10)
    assert time.monotonic() - started_s < 2


def first_token_s(server: ServerProcess) -> float:
    """Seconds from the start of the process to the first answer, however often it refuses."""
    request = {"model": MODEL, "prompt": "Hello", "max_tokens": 1}
    while True:
        try:
            answer = httpx.post(f"{server.url}/v1/completions", json=request, timeout=10)
            break
        except httpx.TransportError:
            assert time.monotonic() - server.started_at_s < 30, server.log
            time.sleep(0.02)
    assert answer.status_code == 200
    return time.monotonic() - server.started_at_s


def test_first_token_within_4_s_of_the_start(start_server: Callable[..., ServerProcess]) -> None:
    start_server(*NAME).kill()  # the file is in the page cache now
    times: list[float] = []
    # Best of a few: what else the machine does may cost more than the start itself.
    while not times or (min(times) >= 4.0 and len(times) < 4):
        server = start_server(*NAME, ready=False)
        times.append(first_token_s(server))
        server.kill()
    assert min(times) < 4.0


def test_the_start_up_table_says_what_is_served(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server(*NAME, "--threads", "1", "--max-model-len", "512")
    for word in (MODEL, "int", "KV", "512", "threads", str(server.port)):
        assert word in server.log, server.log


@pytest.mark.parametrize(
    "quantization", ["none", "int8", "int4", "fp8", "int8-channel", "int4-g64"]
)
def test_every_quantization_answers(
    start_server: Callable[..., ServerProcess], quantization: str
) -> None:
    server = start_server(*NAME, "--quantization", quantization)
    answer = server.client().completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in answer.choices[0].text
