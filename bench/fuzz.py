"""Random bytes and generated requests against a server's HTTP surface; used by bench.faults.

Requests come from schemathesis, over the server's own OpenAPI document.
"""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import httpx
import msgspec
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

# What changes the server itself has a bench of its own.
_LEFT_OUT = "/v1/optimizations"
_BATCH = 40
_ANSWER_S = 20.0  # a connection without an answer for so long hangs


class FuzzResult(msgspec.Struct):
    statuses: Counter[int]
    failures: list[str]


def description(url: str) -> dict[str, Any]:
    """The server's own OpenAPI document; generations are kept short, so that many fit the time."""
    document: dict[str, Any] = httpx.get(f"{url}/openapi.json").json()
    for path in list(document["paths"]):
        if path.startswith(_LEFT_OUT):
            del document["paths"][path]
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        properties = document["components"]["schemas"][name]["properties"]
        for field in ("max_tokens", "max_completion_tokens", "n"):
            if field in properties:
                properties[field] = {"type": "integer", "minimum": -1, "maximum": 4}
    return document


def generated_requests(url: str, duration_s: float) -> FuzzResult:
    """Send what schemathesis makes of the description; note 5xx, hangs and bare errors."""
    result = FuzzResult(Counter(), [])
    schema = schemathesis.openapi.from_dict(description(url))
    operations = [operation.ok() for operation in schema.get_all_operations()]
    end_s = time.monotonic() + duration_s
    with httpx.Client(base_url=url, timeout=_ANSWER_S) as client:

        def send(case: Any) -> None:
            if time.monotonic() > end_s:
                return
            try:
                kwargs = case.as_transport_kwargs(base_url=url)
                kwargs.pop("cookies", None)
                response = client.request(**kwargs)
            except (
                httpx.InvalidURL,
                httpx.UnsupportedProtocol,
                UnicodeError,
                TypeError,
                ValueError,
            ):
                return  # no HTTP client can send it
            except httpx.HTTPError as error:
                result.failures.append(f"{case.method} {case.path}: {type(error).__name__}")
                return
            result.statuses[response.status_code] += 1
            if response.status_code >= 500:
                result.failures.append(f"{case.method} {case.path}: {response.text[:200]}")
            elif response.status_code >= 400 and "error" not in response.json():
                result.failures.append(f"{case.method} {case.path}: no envelope")

        seed = 0
        while time.monotonic() < end_s:
            for operation in operations:
                seed += 1
                check = settings(
                    max_examples=_BATCH,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )(given(case=operation.as_strategy())(send))
                check()
    return result


def random_request(draw: random.Random, model: str) -> bytes:
    """Bytes of no meaning, or a valid request with some of its bytes changed, cut or repeated."""
    if draw.random() < 0.3:
        return draw.randbytes(draw.randrange(1, 2000))
    body = b'{"model":"%b","prompt":"hello","max_tokens":2,"stream":%b}' % (
        model.encode(),
        draw.choice([b"true", b"false"]),
    )
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = bytearray(head + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
    for _ in range(draw.choice([0, 1, 1, 2, 5, 20])):
        position = draw.randrange(len(data))
        kind = draw.randrange(3)
        if kind == 0:
            data[position] = draw.randrange(256)
        elif kind == 1:
            del data[position : position + draw.randrange(1, 30)]
        else:
            data[position:position] = data[position : position + draw.randrange(1, 60)]
        data = data or bytearray(b"\0")
    return bytes(data)


async def random_bytes(port: int, model: str, duration_s: float, width: int = 16) -> FuzzResult:
    """Connections that send such requests; each must get an answer or an end."""
    result = FuzzResult(Counter(), [])
    end_s = time.monotonic() + duration_s

    async def client(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end_s:
            data = random_request(draw, model)
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                # Its status is enough: what was broken may be the wish to close after it.
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n"), _ANSWER_S)
            except asyncio.IncompleteReadError as end:
                answer = end.partial
            except (ConnectionError, asyncio.LimitOverrunError):
                answer = b""
            except TimeoutError:
                result.failures.append(f"no end after {data[:200]!r}")
                answer = b""
            finally:
                writer.close()
            head = answer.split(b"\r\n", 1)[0].split()
            status = int(head[1]) if len(head) > 1 and head[1].isdigit() else 0
            result.statuses[status] += 1
            if status >= 500:
                result.failures.append(f"{answer!r} after {data[:200]!r}")

    await asyncio.gather(*(client(seed) for seed in range(width)))
    return result
