"""Signals, threads, and the log of a server that runs as a process of its own."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import MODEL

ROOT = Path(__file__).parents[2]


@contextmanager
def process(grace_s: float, log_format: str = "text") -> Iterator[tuple[Any, str]]:
    """A running fake server and its address."""
    command = [sys.executable, "-m", "tests.server.fake_server", str(grace_s), log_format]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@contextmanager
def open_stream(address: str, max_tokens: int) -> Iterator[Iterator[str]]:
    """The events of a stream whose first one has come."""
    body = {"model": MODEL, "prompt": "secret words", "max_tokens": max_tokens, "stream": True}
    with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=10) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        yield lines


def test_after_sigterm_running_streams_finish_and_new_requests_are_503() -> None:
    with process(grace_s=10) as (running, address), open_stream(address, 60) as events:
        assert httpx.get(f"{address}/health").status_code == 200
        running.terminate()
        deadline_s = time.monotonic() + 1
        while httpx.get(f"{address}/health").status_code == 200:
            assert time.monotonic() < deadline_s
        assert httpx.get(f"{address}/health?check=live").status_code == 200
        refused = httpx.post(f"{address}/v1/completions", json={"model": MODEL, "prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        *_, end, done = events
        assert json.loads(end.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        assert running.wait(5) == 0


def test_after_the_grace_time_a_stream_ends_with_an_error_event() -> None:
    with process(grace_s=0.3) as (running, address), open_stream(address, 4000) as events:
        running.terminate()
        began_s = time.monotonic()
        *_, last = events
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert running.wait(5) == 0
        assert time.monotonic() - began_s < 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's scheduling policies")
def test_the_event_loop_and_not_the_engine_wakes_up_without_preempting_others() -> None:
    with process(grace_s=0) as (running, address):
        assert httpx.get(address).is_success  # the page is read by a thread that starts now
        threads = map(int, os.listdir(f"/proc/{running.pid}/task"))
        policies = {thread: os.sched_getscheduler(thread) for thread in threads}
        assert policies.pop(running.pid) == os.SCHED_BATCH
        assert set(policies.values()) == {os.SCHED_OTHER}  # the engine's among them


def test_a_second_signal_exits_at_once() -> None:
    with process(grace_s=30) as (running, address), open_stream(address, 4000):
        running.terminate()
        time.sleep(0.2)
        assert running.poll() is None
        running.terminate()
        assert running.wait(1) == 128 + 15


def test_without_requests_a_signal_ends_it_soon() -> None:
    with process(grace_s=30) as (running, _):
        running.terminate()
        assert running.wait(3) == 0


def test_a_log_that_nobody_reads_holds_up_neither_requests_nor_the_end() -> None:
    with process(grace_s=1) as (running, address), httpx.Client() as client:
        for _ in range(900):  # beyond what the pipe takes
            began_s = time.monotonic()
            assert client.get(f"{address}/version", headers={"x-request-id": "x" * 100}).is_success
            assert time.monotonic() - began_s < 1
        running.terminate()
        assert running.wait(6) == 0


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_access_log_has_tokens_but_no_text(log_format: str) -> None:
    with process(1, log_format) as (running, address):
        body = {"model": MODEL, "prompt": "secret words", "max_tokens": 5}
        headers = {"x-request-id": "id-1"}
        assert httpx.post(f"{address}/v1/completions", json=body, headers=headers).is_success
        assert httpx.get(f"{address}/health").is_success
        running.terminate()
        _, errors = running.communicate(timeout=5)
    assert "secret" not in errors
    assert "Hello" not in errors
    assert "/health" not in errors
    (line,) = [line for line in errors.splitlines() if "id-1" in line]
    if log_format == "text":
        assert "POST /v1/completions 200" in line
        assert "completion_tokens=5" in line
        return
    assert all(isinstance(json.loads(other), dict) for other in errors.splitlines())
    entry = json.loads(line)
    assert entry["path"] == "/v1/completions"
    assert entry["status"] == 200
    assert entry["completion_tokens"] == 5
    assert entry["duration_ms"] > 0
