"""Server-sent events: sends a generation to its client as the tokens come, and only that.

The endpoints give a `Framer` that turns deltas into bytes. A write waits for its own reader
alone; the app's watchdog cuts readers that have not taken anything for too long.
"""

import asyncio
import logging
import time
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


class EventWriter:
    """One open response; `blocked_since_s` is set while a write waits for the reader."""

    def __init__(self, request: web.Request) -> None:
        self.blocked_since_s: float | None = None
        self._request = request
        self.response = web.StreamResponse(headers=_HEADERS)

    async def send(self, data: bytes) -> None:
        self.blocked_since_s = time.monotonic()
        await self.response.write(data)
        self.blocked_since_s = None

    async def finish(self) -> None:
        self.blocked_since_s = time.monotonic()
        await self.response.write_eof()
        self.blocked_since_s = None

    def cut(self) -> None:
        """Close the connection at once; aiohttp then cancels the handler."""
        if self._request.transport is not None:
            self._request.transport.abort()


class OpenWriters(set[EventWriter]):
    """The responses that are being streamed; the watchdog looks at them now and then."""

    def cut_stalled(self, stalled_s: float) -> None:
        now_s = time.monotonic()
        for writer in list(self):
            since_s = writer.blocked_since_s
            if since_s is not None and now_s - since_s > stalled_s:
                logger.warning("closing a stream whose reader stalled for %.0f s", now_s - since_s)
                writer.cut()


OPEN_WRITERS = web.AppKey("OPEN_WRITERS", OpenWriters)


async def stream_events(
    request: web.Request, generation: Generation, framer: Framer
) -> web.StreamResponse:
    """Send all events; an error before the first one is raised, a later one is an event."""
    deltas = await generation.take()
    writer = EventWriter(request)
    await writer.response.prepare(request)
    open_writers = request.app[OPEN_WRITERS]
    open_writers.add(writer)
    try:
        await _send_deltas(writer, generation, framer, deltas)
        await writer.finish()
    except ConnectionError:
        logger.debug("the client went away while being written to")
    finally:
        open_writers.discard(writer)
    return writer.response


async def _frame_all(framer: Framer, deltas: list[Delta]) -> bytes:
    def frame_all() -> bytes:
        return b"".join(map(framer.frame, deltas))

    num_logprobs = sum(delta.num_logprobs for delta in deltas)
    return await run_sized(num_logprobs * CHARS_PER_LOGPROB, frame_all)


async def _send_deltas(
    writer: EventWriter, generation: Generation, framer: Framer, deltas: list[Delta]
) -> None:
    try:
        data = framer.begin()
        while deltas:
            data += await _frame_all(framer, deltas)
            if data:
                await writer.send(data)
            data = b""
            deltas = await generation.take()
        await writer.send(framer.end())
    except ApiError as error:
        await writer.send(error.event())
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        logger.exception("a stream failed")
        await writer.send(ApiError(500, "Internal server error.").event())
