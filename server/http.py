"""What all handlers share of HTTP: the app's keys, reading a body, writing JSON."""

import asyncio
import hashlib
import math
import time
from collections.abc import Mapping

import msgspec
from aiohttp import web

from server.engine_client import EngineClient
from server.errors import ApiError, invalid
from server.gate import Arrival
from server.metrics import Metrics
from server.protocol import GenerationRequest, Usage
from server.served import ServedModel
from server.telemetry.poller import Poller, TelemetryMode

# A body may take longer than its time-out as long as it comes this fast, as Apache has it.
_MIN_BODY_BYTES_PER_S = 16 << 10
_MAX_PRIORITY = 100
_MAX_TIMEOUT_S = 86_400


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side was asked to do; the engine's settings are `EngineConfig`."""

    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    max_sequences: int = 64
    max_queue: int = 256
    grace_s: float = 30.0
    health_stale_s: float = 10.0
    stuck_step_s: float = 60.0
    stalled_reader_s: float = 60.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    max_ttft_s: float = 30.0
    max_step_tokens: int = 512
    telemetry: TelemetryMode = "auto"


CLIENT = web.AppKey("CLIENT", EngineClient)
METRICS = web.AppKey("METRICS", Metrics)
POLLER = web.AppKey("POLLER", Poller)
MODEL = web.AppKey("MODEL", ServedModel)
SETTINGS = web.AppKey("SETTINGS", Settings)

REQUEST_ID = web.RequestKey("REQUEST_ID", str)
USAGE = web.RequestKey("USAGE", Usage)  # for the access log


async def read_body(request: web.Request) -> bytes:
    """The body; raises a 408 if it comes too slowly, a 413 over the limit, a 415 if no JSON."""
    limit = request.app[SETTINGS].max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise too_large(limit)
    # A page in a browser may send any other type across origins without asking first.
    if request.content_type != "application/json":
        raise ApiError(415, "The body must be JSON: send 'Content-Type: application/json'.")
    if request.content.is_eof() and request.content.exception() is None:
        # Most bodies come with their headers, within aiohttp's buffer, and need no time-out.
        whole = request.content.read_nowait()
        if len(whole) > limit:
            raise too_large(limit)
        return whole
    body = bytearray()
    began_s = asyncio.get_running_loop().time()
    try:
        async with asyncio.timeout(request.app[SETTINGS].body_timeout_s) as deadline:
            ends_s = deadline.when() or math.inf
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > limit:
                    raise too_large(limit)
                deadline.reschedule(max(ends_s, began_s + len(body) / _MIN_BODY_BYTES_PER_S))
    except web.RequestPayloadError:
        raise ApiError(400, "The body could not be decoded as its headers say.") from None
    except TimeoutError:
        raise ApiError(408, "The request's body took too long.", code="request_timeout") from None
    return bytes(body)


def arrival(
    headers: Mapping[str, str], remote: str | None, raw: bytes, body: GenerationRequest
) -> Arrival:
    """What admission asks of a request; raises a 400 for a priority or time-out out of range."""
    priority = body.priority or 0
    if abs(priority) > _MAX_PRIORITY:
        raise invalid(
            "priority", f"'priority' must be between -{_MAX_PRIORITY} and {_MAX_PRIORITY}."
        )
    if body.timeout is not None and not 0 < body.timeout <= _MAX_TIMEOUT_S:
        raise invalid("timeout", f"'timeout' must be above 0 and at most {_MAX_TIMEOUT_S} seconds.")
    # Who honours a Retry-After with a call of its own gives it another x-request-id, and counts
    # attempts anew.
    attempt = headers.get("x-stainless-retry-count")
    sender = (remote, headers.get("Authorization"))
    return Arrival(
        sender=hashlib.blake2b(repr(sender).encode(), digest_size=16).hexdigest(),
        body=raw,
        arrived_at_s=time.monotonic(),
        priority=priority,
        timeout_s=body.timeout,
        is_retry=None if attempt is None else attempt != "0",
    )


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")


def json_response(value: object, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )


def check_model(model: ServedModel, name: str | None) -> None:
    """Raise a 404 unless `name` is the model that is served, or left out where it may be."""
    if name is not None and name != model.name:
        raise ApiError(
            404,
            f"The model '{name:.100}' does not exist; this server has '{model.name}'.",
            param="model",
            code="model_not_found",
        )
