"""What all handlers share of HTTP: the app's keys, reading a body, writing JSON."""

import msgspec
from aiohttp import web

from server.engine_client import EngineClient
from server.errors import ApiError
from server.metrics import Metrics
from server.protocol import Usage
from server.served import ServedModel


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side was asked to do; the engine's settings are `EngineConfig`."""

    api_key: str | None = None
    max_body_bytes: int = 8 << 20
    max_sequences: int = 64
    max_queue: int = 256
    grace_s: float = 30.0
    health_stale_s: float = 10.0
    stalled_reader_s: float = 60.0


CLIENT = web.AppKey("CLIENT", EngineClient)
METRICS = web.AppKey("METRICS", Metrics)
MODEL = web.AppKey("MODEL", ServedModel)
SETTINGS = web.AppKey("SETTINGS", Settings)

REQUEST_ID = web.RequestKey("REQUEST_ID", str)
USAGE = web.RequestKey("USAGE", Usage)  # for the access log


async def read_body(request: web.Request) -> bytes:
    """The body; raises a 413 over the limit and a 415 if it does not claim to be JSON."""
    limit = request.app[SETTINGS].max_body_bytes
    if request.content_length is not None and request.content_length > limit:
        raise too_large(limit)
    # A page in a browser may send any other type across origins without asking first.
    if request.content_type != "application/json":
        raise ApiError(415, "The body must be JSON: send 'Content-Type: application/json'.")
    try:
        return await request.read()
    except web.RequestPayloadError:
        raise ApiError(400, "The body could not be decoded as its headers say.") from None


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
