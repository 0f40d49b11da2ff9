"""Server-sent events: sends a generation to its client as the tokens come, and only that.

The endpoints give a `Framer` that turns deltas into bytes. A write waits for its own reader
alone; `connection.py` cuts readers that have not taken anything for too long.
"""

import asyncio
import logging
from typing import Protocol

from aiohttp import web

from server.errors import ApiError
from server.generation import Generation
from server.stream import Delta
from server.tokens import CHARS_PER_LOGPROB, run_sized

logger = logging.getLogger("fulcrum")

DONE = b"data: [DONE]\n\n"
_HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # reverse proxies must not collect events
}


class Framer(Protocol):
    """Bytes of one answer's events."""

    def begin(self) -> bytes: ...
    def frame(self, delta: Delta) -> bytes: ...
    def end(self) -> bytes: ...


async def stream_events(
    request: web.Request, generation: Generation, framer: Framer
) -> web.StreamResponse:
    """Send all events; an error before the first one is raised, a later one is an event."""
    deltas = await generation.take()
    response = web.StreamResponse(headers=_HEADERS)
    await response.prepare(request)
    try:
        await _send_deltas(response, generation, framer, deltas)
        await response.write_eof()
    except ConnectionError:
        logger.debug("the client went away while being written to")
    return response


async def _frame_all(framer: Framer, deltas: list[Delta]) -> bytes:
    def frame_all() -> bytes:
        return b"".join(map(framer.frame, deltas))

    num_logprobs = sum(delta.num_logprobs for delta in deltas)
    return await run_sized(num_logprobs * CHARS_PER_LOGPROB, frame_all)


async def _send_deltas(
    response: web.StreamResponse, generation: Generation, framer: Framer, deltas: list[Delta]
) -> None:
    try:
        data = framer.begin()
        while deltas:
            data += await _frame_all(framer, deltas)
            if data:
                await response.write(data)
            data = b""
            deltas = await generation.take()
        await response.write(framer.end())
    except ApiError as error:
        response.force_close()  # its status said that all is well
        await response.write(error.event())
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        logger.exception("a stream failed")
        await response.write(ApiError(500, "Internal server error.").event())
