"""Requests that a server with the real model refuses: the exact outcome of each."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.server_process import ServerProcess

MODEL = "smollm2-135m"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
PATHS = ("/v1/chat/completions", "/v1/completions")
JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error in OpenAI's envelope."""
    document = response.json()
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "smollm2-135m",}',
        b"\x00\x01\x02",
        b'{"model": "\xff\xfe"}',
        b'{"model": "smollm2-135m", "prompt": "\xc3("}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"messages": ' * 20_000,
        b"[]",
        b"null",
        b'"text"',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_body_that_is_no_request_is_400(server: ServerProcess, path: str, body: bytes) -> None:
    response = httpx.post(server.url + path, content=body, headers=JSON)
    assert response.status_code == 400
    assert error_of(response)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "changes", "param"),
    [
        *((path, {"max_tokens": "many"}, "max_tokens") for path in PATHS),
        *((path, {"max_tokens": 1.5}, "max_tokens") for path in PATHS),
        *((path, {"temperature": "hot"}, "temperature") for path in PATHS),
        *((path, {"temperature": -1}, "temperature") for path in PATHS),
        *((path, {"temperature": 2.5}, "temperature") for path in PATHS),
        *((path, {"top_p": 1.5}, "top_p") for path in PATHS),
        *((path, {"n": 0}, "n") for path in PATHS),
        *((path, {"n": 100_000}, "n") for path in PATHS),
        *((path, {"stop": ["a", "b", "c", "d", "e"]}, "stop") for path in PATHS),
        *((path, {"logit_bias": {"x": 1}}, "logit_bias") for path in PATHS),
        *((path, {"logit_bias": {"9999999": 1}}, "logit_bias") for path in PATHS),
        *((path, {"seed": 2**70}, "seed") for path in PATHS),
        *((path, {"stream": "yes"}, "stream") for path in PATHS),
        *((path, {"no_such_field": 1}, "no_such_field") for path in PATHS),
        (PATHS[0], {"response_format": {"type": "json_object"}}, "response_format"),
        (PATHS[0], {"tools": [{"type": "function"}]}, "tools"),
        (PATHS[0], {"top_logprobs": 50, "logprobs": True}, "top_logprobs"),
        (PATHS[0], {"messages": "Hi"}, "messages"),
        (PATHS[0], {"messages": []}, "messages"),
        (PATHS[1], {"best_of": 4}, "best_of"),
        (PATHS[1], {"suffix": "end"}, "suffix"),
        (PATHS[1], {"prompt": 5}, "prompt"),
        (PATHS[1], {"prompt": []}, "prompt"),
        (PATHS[1], {"prompt": [99_999_999]}, "prompt"),
        (PATHS[1], {"prompt": [-1]}, "prompt"),
        (PATHS[1], {"logprobs": 50}, "logprobs"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_field_that_cannot_be_honoured_is_a_400_that_names_it(
    server: ServerProcess, path: str, changes: dict[str, Any], param: str
) -> None:
    base = CHAT if path == PATHS[0] else TEXT
    for stream in (False, True):
        body = base | {"stream": stream} | changes
        response = httpx.post(server.url + path, json=body)
        assert response.status_code == 400
        error = error_of(response)
        assert error["param"].split(".")[0].split("[")[0] == param
        assert param in error["message"]


@pytest.mark.parametrize("path", PATHS)
def test_a_huge_body_is_413(server: ServerProcess, path: str) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x" * (9 << 20)}).encode()
    response = httpx.post(server.url + path, content=body, headers=JSON)
    assert response.status_code == 413
    error_of(response)


def test_a_huge_body_of_unknown_length_is_413(server: ServerProcess) -> None:
    pieces = (b"x" * (1 << 20) for _ in range(12))
    response = httpx.post(f"{server.url}/v1/completions", content=pieces, headers=JSON)
    assert response.status_code == 413


def test_a_context_that_is_too_short_is_a_400(server: ServerProcess) -> None:
    client = server.client()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 20_000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word", max_tokens=1_000_000)
    assert caught.value.code == "context_length_exceeded"


def test_an_unknown_model_is_404(server: ServerProcess) -> None:
    with pytest.raises(openai.NotFoundError):
        server.client().completions.create(model="another", prompt="Hi")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v1/nothing", 404)],
)
def test_wrong_methods_and_paths_have_the_envelope(
    server: ServerProcess, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    error_of(response)


def test_the_server_still_works_afterwards(server: ServerProcess) -> None:
    server.wait_idle()
    answer = server.client().completions.create(
        model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8
    )
    assert "Paris" in answer.choices[0].text


def test_the_key_is_asked_for_everywhere_but_health_and_metrics(
    start_server: Callable[..., ServerProcess],
) -> None:
    server = start_server("--api-key", "secret", "--served-model-name", MODEL)
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/v1/models"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/version"),
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            response = httpx.request(method, server.url + path, headers=headers)
            assert response.status_code == 401
            error_of(response)
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/metrics").status_code == 200
    answer = server.client(api_key="secret").completions.create(model=MODEL, prompt="Hi")
    assert answer.usage.completion_tokens >= 1
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="wrong").models.list()


@pytest.mark.parametrize(
    "options",
    [
        ["--device", "cuda"],
        ["--model", "/no/such/folder"],
        ["--quantization", "int3"],
        ["--kv-memory", "lots"],
        ["--kv-memory", "1000", "--max-model-len", "1024"],
        ["--max-model-len", "100000"],
        ["--port", "99999"],
        ["--threads", "0"],
        ["--api-key-file", "/no/such/file"],
        ["--no-such-option"],
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_work_is_one_line_and_exit_code_2(
    default_model_path: Path, options: list[str]
) -> None:
    command = [sys.executable, "-m", "server", "--model", str(default_model_path), *options]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert len(lines) == 1, done.stderr
    assert options[0].lstrip("-") in lines[0] or options[-1] in lines[0]
