"""Endpoints beside generation: tokenize, detokenize, health, metrics, version."""

import asyncio
import importlib.metadata
from contextlib import suppress

import msgspec
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from server import protocol, telemetry_report
from server.chat import encode_messages
from server.errors import ApiError, invalid
from server.http import CLIENT, METRICS, MODEL, POLLER, check_model, json_response, read_body
from server.protocol import DetokenizeRequest, TokenizeRequest
from server.tokens import run_sized

_TOKENIZE = msgspec.json.Decoder(TokenizeRequest)
_DETOKENIZE = msgspec.json.Decoder(DetokenizeRequest)
SPECULATION_TIMEOUT_S = 1.0  # that a scrape waits for the engine to come out of a step


async def tokenize(request: web.Request) -> web.Response:
    """Ids of a text, or of a conversation as the chat endpoint would encode it."""
    raw = await read_body(request)
    body = protocol.decode(_TOKENIZE, raw)
    model = request.app[MODEL]
    check_model(model, body.model)
    prompt = body.prompt
    if (prompt is None) == (body.messages is None):
        raise invalid("prompt", "Send either 'prompt' or 'messages'.")
    if prompt is not None:
        text = prompt
        tokens = await run_sized(
            len(raw),
            lambda: model.tokenizer.encode(
                text, add_bos=body.add_special_tokens, parse_special=False
            ),
        )
    else:
        tokens = await encode_messages(
            model,
            body.messages or [],
            len(raw),
            add_generation_prompt=body.add_generation_prompt,
        )
    return json_response(
        {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens}
    )


async def detokenize(request: web.Request) -> web.Response:
    """Text of ids, control tokens by their spelling."""
    body = protocol.decode(_DETOKENIZE, await read_body(request))
    model = request.app[MODEL]
    check_model(model, body.model)

    def decode() -> str:
        if any(not 0 <= token_id < model.tokenizer.vocab_size for token_id in body.tokens):
            raise invalid(
                "tokens", f"'tokens' holds an id that is not below {model.tokenizer.vocab_size}."
            )
        return model.tokenizer.decode(body.tokens, skip_special=False)

    return json_response({"prompt": await run_sized(len(body.tokens), decode)})


async def health(request: web.Request) -> web.Response:
    """Whether new requests should come here.

    With `?check=live`, whether the process answers; with `?check=engine`, whether steps return.
    """
    answer = telemetry_report.health(request.app[CLIENT], request.app[POLLER])
    is_healthy = answer.status in ("ok", "degraded")
    check = request.query.get("check")
    if check == "engine":
        is_healthy = not answer.status.startswith("engine")
    return json_response(answer, 200 if is_healthy or check == "live" else 503)


async def telemetry(request: web.Request) -> web.Response:
    """What was sensed, what follows from it, and what was decided about requests and why."""
    return json_response(telemetry_report.report(request.app[CLIENT], request.app[POLLER]))


async def metrics(request: web.Request) -> web.Response:
    """All metrics; those of speculation are older where the engine is in a long step, or ended."""
    with suppress(TimeoutError, ApiError):
        async with asyncio.timeout(SPECULATION_TIMEOUT_S):
            request.app[METRICS].take_speculation(await request.app[CLIENT].speculation())
    body = request.app[METRICS].render()
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})


def package_version() -> str:
    """The installed version; a source tree that was never installed has none."""
    try:
        return importlib.metadata.version("fulcrum")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


async def version(request: web.Request) -> web.Response:
    model = request.app[MODEL]
    return json_response(
        {
            "version": package_version(),
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
    )
