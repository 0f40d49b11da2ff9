"""Weights' level and the cache's dtype change under streams of real clients; none loses a token."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.server_process import ServerProcess

NUM_STREAMS = 4
NUM_TOKENS = 160
WAIT_S = 60.0


def _apply(server: ServerProcess, **setting: object) -> dict[str, object]:
    answer = httpx.post(f"{server.url}/v1/optimizations/apply", json=setting, timeout=WAIT_S)
    assert answer.status_code == 202, answer.text
    status: dict[str, object] = answer.json()
    busy = httpx.post(f"{server.url}/v1/optimizations/apply", json=setting, timeout=WAIT_S)
    assert busy.status_code == 409
    deadline_s = time.monotonic() + WAIT_S
    while status["state"] not in ("done", "failed", "rolled_back"):
        assert time.monotonic() < deadline_s, status
        time.sleep(0.05)
        url = f"{server.url}/v1/optimizations/apply/{status['id']}"
        status = httpx.get(url, timeout=WAIT_S).json()
    return status


def test_streams_are_complete_through_two_applies(
    start_server: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    receipts = tmp_path / "receipts.jsonl"
    server = start_server("--receipts", str(receipts), "--kv-memory", "256MiB")
    client = server.client()
    model = client.models.list().data[0].id
    counts: dict[int, tuple[int, str | None]] = {}
    has_begun = threading.Barrier(NUM_STREAMS + 1)

    def read(index: int) -> None:
        stream = client.completions.create(
            model=model,
            prompt=f"{index} The river",
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        tokens, reason, is_first = 0, None, True
        for chunk in stream:
            if is_first:
                has_begun.wait(WAIT_S)
                is_first = False
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
            elif chunk.choices[0].finish_reason:
                reason = chunk.choices[0].finish_reason
        counts[index] = (tokens, reason)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(NUM_STREAMS)]
    for thread in threads:
        thread.start()
    has_begun.wait(WAIT_S)
    fingerprint = httpx.get(f"{server.url}/version").json()["system_fingerprint"]
    first = _apply(server, quantization="int8")
    second = _apply(
        server,
        quantization="int4",
        kv_dtype="int8",
        kv_memory="128MiB",
        max_model_len=2048,
        max_sequences=16,
    )
    for thread in threads:
        thread.join(WAIT_S)
    assert counts == dict.fromkeys(range(NUM_STREAMS), (NUM_TOKENS, "length"))
    for status in (first, second):
        assert status["state"] == "done", status
        assert status["receipt"]["longest_pause_s"] < 2.0  # type: ignore[index]
    assert len(receipts.read_text().splitlines()) == 2
    assert httpx.get(f"{server.url}/version").json()["system_fingerprint"] != fingerprint
    card = httpx.get(f"{server.url}/v1/models").json()["data"][0]
    assert card["max_model_len"] == 2048
    metrics = server.wait_idle()
    limits = httpx.get(f"{server.url}/v1/telemetry").json()["limits"]
    assert (limits["max_sequences"], limits["kv_blocks"]) == (16, metrics["fulcrum_kv_blocks"])
    overview = httpx.get(f"{server.url}/v1/optimizations", timeout=WAIT_S).json()
    assert overview["today"]["setting"]["kv_dtype"] == "int8"
    memory = overview["today"]["memory"]
    assert metrics["fulcrum_memory_bytes"] == sum(memory.values())
    assert server.terminate() == 0
