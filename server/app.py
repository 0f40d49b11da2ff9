"""The aiohttp application: routes, middlewares, and the engine's start and stop around it all.

`__main__` runs it with the real engine, the tests with a scripted one.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server import (
    access,
    auth,
    chat,
    completions,
    control,
    models,
    openapi,
    operations,
    page,
    speculation,
)
from server.connection import CONNECTIONS, Connections
from server.engine_client import EngineClient, EngineFactory
from server.errors import ApiError
from server.forecast import Limits
from server.gate import Gate
from server.http import (
    CLIENT,
    METRICS,
    MODEL,
    POLLER,
    REQUEST_ID,
    SETTINGS,
    USAGE,
    Settings,
    too_large,
)
from server.metrics import Metrics
from server.overload import OVERLOAD, Overload
from server.served import ServedModel
from server.telemetry.poller import Poller

logger = logging.getLogger("fulcrum")

_WATCH_INTERVAL_S = 0.5


def create_app(
    model: ServedModel,
    settings: Settings,
    make_engine: EngineFactory,
    optimizer: control.Optimizer | None = None,
) -> web.Application:
    """An app that starts its engine with `make_engine(on_report)` and stops it at the end.

    Without an `optimizer` the control plane's endpoints answer 404.
    """
    middlewares: list[Middleware] = [_answer]
    if settings.api_key is not None:
        middlewares.append(auth.require_key(settings.api_key))
    app = web.Application(middlewares=middlewares, client_max_size=settings.max_body_bytes)
    metrics = Metrics(model.name, lambda: app[CLIENT].load)
    poller = Poller(settings.telemetry)
    limits = Limits(
        max_sequences=settings.max_sequences,
        max_queue=settings.max_queue,
        max_step_tokens=settings.max_step_tokens,
        num_blocks=model.num_kv_blocks,
        block_size=model.kv_block_size,
        max_ttft_s=settings.max_ttft_s,
    )
    gate = Gate(limits, metrics, poller.sample)
    metrics.register_telemetry(gate, poller)
    app[MODEL] = model
    app[SETTINGS] = settings
    app[METRICS] = metrics
    app[CONNECTIONS] = Connections()
    app[POLLER] = poller
    app[CLIENT] = EngineClient(
        make_engine,
        model.tokenizer,
        gate,
        metrics,
        stale_s=settings.health_stale_s,
        stuck_s=settings.stuck_step_s,
    )
    app[OVERLOAD] = Overload(app[CLIENT], model, settings)
    app.on_response_prepare.append(_set_request_id)
    app.cleanup_ctx.append(_telemetry)
    app.cleanup_ctx.append(_engine)
    app.cleanup_ctx.append(_watchdog)
    if optimizer is not None:
        control.set_up(app, optimizer)
    app.add_routes(page.ROUTES)
    app.add_routes(
        [
            web.post("/v1/chat/completions", chat.chat_completions),
            web.post("/v1/completions", completions.completions),
            web.get("/v1/models", models.list_models),
            web.get("/v1/models/{model:.+}", models.get_model),
            web.post("/tokenize", operations.tokenize),
            web.post("/detokenize", operations.detokenize),
            web.get("/health", operations.health),
            web.get("/metrics", operations.metrics),
            web.get("/version", operations.version),
            web.get("/v1/telemetry", operations.telemetry),
            web.get("/v1/speculation", speculation.speculation),
            web.get("/openapi.json", openapi.openapi),
        ]
    )
    return app


async def _telemetry(app: web.Application) -> AsyncIterator[None]:
    app[POLLER].start()
    yield
    await asyncio.to_thread(app[POLLER].stop)


async def _engine(app: web.Application) -> AsyncIterator[None]:
    app[CLIENT].start()
    yield
    await app[CLIENT].stop()


async def _watchdog(app: web.Application) -> AsyncIterator[None]:
    """Now and then look for what no event tells of: a dead engine, clients that stand still."""
    settings = app[SETTINGS]

    async def watch() -> None:
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            try:
                app[CLIENT].check()
                app[CONNECTIONS].check(settings.header_timeout_s, settings.stalled_reader_s)
            except Exception:  # one look's trouble must not be the last look
                logger.exception("the watchdog failed once")

    task = asyncio.create_task(watch())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _set_request_id(request: web.Request, response: web.StreamResponse) -> None:
    if REQUEST_ID in request:
        response.headers["x-request-id"] = request[REQUEST_ID]


@web.middleware
async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: a request id, errors in OpenAI's envelope, one line in the access log."""
    began_s = time.monotonic()
    request[REQUEST_ID] = request_id = access.request_id(request.headers)
    status = 499  # nginx's number for a client that went away
    try:
        response = await _guarded(request, handler)
        if request.transport is not None:
            status = response.status
    finally:
        if not auth.is_open(request.path):
            duration_s = time.monotonic() - began_s
            access.log(
                request.method, request.path, status, duration_s, request_id, request.get(USAGE)
            )
    return response


async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except ApiError as error:
        return _error_response(error)
    except web.HTTPRequestEntityTooLarge:
        return _error_response(too_large(request.app[SETTINGS].max_body_bytes))
    except web.HTTPException as error:
        response = _error_response(_http_error(request, error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    except Exception:
        logger.exception("unexpected error in %s %s", request.method, request.path)
        return _error_response(ApiError(500, "Internal server error."))


def _http_error(request: web.Request, error: web.HTTPException) -> ApiError:
    if error.status == 404:
        return ApiError(404, f"There is no '{request.path:.100}' here.", code="unknown_url")
    if error.status == 405:
        return ApiError(
            405, f"'{request.path}' does not take {request.method}.", code="method_not_allowed"
        )
    return ApiError(error.status, error.reason)


def _error_response(error: ApiError) -> web.Response:
    response = web.Response(body=error.body(), status=error.status, content_type="application/json")
    response.headers.update(error.headers())
    if error.status in (408, 413):
        response.force_close()  # the rest of the body would come before another request
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
