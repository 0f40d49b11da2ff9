"""One client's connection: aiohttp's protocol, guarded against clients that stand still.

aiohttp waits for ever for the end of a request's headers and for a reader that reads nothing. Each
`Connection` keeps book of both; the app's watchdog calls `check` now and then. `run.py` listens.
"""

import asyncio
import logging
import socket
import time
from typing import Any

from aiohttp import web
from aiohttp.http import RawRequestMessage

from server.errors import ApiError
from server.overload import OVERLOAD, Overload

logger = logging.getLogger("fulcrum")

BACKLOG = 1024
_KEEPALIVE_S = 75.0  # longer than the 60 s that reverse proxies keep theirs
_LINGER_S = 5.0  # for the rest of a body that nobody wants
# Beyond aiohttp's limits of 8190 bytes for each line and header.
_MAX_HEADERS = 100
_MAX_GATHERED_BYTES = 64 << 10


class Connections(set["Connection"]):
    """All open connections of an app."""

    def check(self, header_timeout_s: float, stalled_reader_s: float) -> None:
        now_s = time.monotonic()
        for connection in list(self):
            connection.check(now_s, header_timeout_s, stalled_reader_s)


CONNECTIONS = web.AppKey("CONNECTIONS", Connections)


class Connection(web.RequestHandler):
    """Errors that never reach a handler have OpenAI's envelope here, too."""

    __slots__ = (
        "_connections",
        "_gathered",
        "_headers_since_s",
        "_overload",
        "_socket",
        "_stalled_since_s",
        "_unsent_bytes",
    )

    def __init__(
        self,
        manager: web.Server,
        connections: Connections,
        overload: Overload,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._connections = connections
        self._overload = overload
        self._gathered = b""  # received in an overload, and not looked at yet
        # Kept apart from aiohttp's `transport`, which is gone while a close waits for the reader.
        self._socket: asyncio.Transport | None = None
        self._headers_since_s: float | None = None  # since when a request has been incomplete
        self._stalled_since_s: float | None = None
        self._unsent_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self._socket = self.transport
        self._headers_since_s = time.monotonic()
        self._connections.add(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.discard(self)
        self._socket = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not data:  # aiohttp goes on with what it has received before
            self._receive(data)
        elif self._gathered:
            self._gathered += data
            if len(self._gathered) > _MAX_GATHERED_BYTES:
                self._receive_gathered()
        elif self._awaits_headers() and self._overload.is_on:
            self._gathered = data
            self._overload.gather(self._receive_gathered)
        else:
            self._receive(data)

    def _receive_gathered(self) -> None:
        gathered, self._gathered = self._gathered, b""
        if gathered and self._socket is not None:
            self._receive(gathered)

    def _receive(self, data: bytes) -> None:
        num_requests = self._request_count
        if self._awaits_headers():
            # The task that serves the connection sleeps on, unless there is something to serve.
            sleeping, self._waiter = self._waiter, None
            super().data_received(data)
            self._waiter = sleeping
            if self._messages and not self._refuse_early(data):
                assert sleeping is not None
                sleeping.set_result(None)
        else:
            super().data_received(data)
        if self._request_count != num_requests:
            self._headers_since_s = None
        elif data and self._headers_since_s is None and self._awaits_headers():
            self._headers_since_s = time.monotonic()

    def _awaits_headers(self) -> bool:
        """Whether what comes now is no body, not even of a request that is about to be handled."""
        return self._waiter is not None and not self._waiter.done()

    def _refuse_early(self, data: bytes) -> bool:
        """Whether the request was refused, here and now; else it is served the usual way."""
        message = self._messages[0][0]
        transport, parser = self.transport, self._parser
        if (
            len(self._messages) > 1
            or not isinstance(message, RawRequestMessage)
            or transport is None
            or parser is None
            or transport.get_write_buffer_size()  # whoever reads slowly is waited for there
        ):
            return False
        remote = None if self.peername is None else str(self.peername[0])
        response = self._overload.refusal(message, data, remote)
        if response is None:
            return False
        self._messages.clear()
        parser.message_consumed()
        transport.write(response)
        self._next_keepalive_close_time = self._loop.time() + _KEEPALIVE_S
        return True

    def check(self, now_s: float, header_timeout_s: float, stalled_reader_s: float) -> None:
        """Close the connection if its client has been standing still for too long."""
        if self._socket is None:
            return
        since_s = self._headers_since_s
        if since_s is not None and now_s - since_s > header_timeout_s:
            self._headers_since_s = None
            self._refuse_slow_headers()
        self._check_reader(self._socket, now_s, stalled_reader_s)

    def _refuse_slow_headers(self) -> None:
        if self.transport is not None and not self._request_in_progress:
            error = ApiError(408, "The request's headers took too long.", code="request_timeout")
            body = error.body()
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\n"
                b"Connection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        self.force_close()

    def _check_reader(self, transport: asyncio.Transport, now_s: float, stalled_s: float) -> None:
        # While a write waits, between requests, or as the connection closes nothing is added: what
        # is unsent can only shrink, unless the reader stands still.
        num_bytes = transport.get_write_buffer_size()
        must_shrink = self.writing_paused or not self._request_in_progress or transport.is_closing()
        if not num_bytes or not must_shrink or num_bytes < self._unsent_bytes:
            self._stalled_since_s = None
        elif self._stalled_since_s is None:
            self._stalled_since_s = now_s
        elif now_s - self._stalled_since_s > stalled_s:
            logger.warning("closing a connection whose reader stalled for %.0f s", stalled_s)
            transport.abort()
        self._unsent_bytes = num_bytes

    def log_exception(self, *args: Any, **options: Any) -> None:
        """As aiohttp does; but a body that cannot be decoded, told by a 400, fills no log."""
        if not isinstance(options.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **options)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """As aiohttp does; what it raised before any handler, as a 417, gets the envelope."""
        if isinstance(resp, web.HTTPException):
            resp = _answer(ApiError(resp.status, resp.reason))
        return await super().finish_response(request, resp, start_time)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp could not parse, or what no handler caught."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer was begun and cannot become another one")
        if status >= 500:
            logger.error("unexpected error outside the handlers", exc_info=exc)
        text = {400: "The request is no valid HTTP."}.get(status, "Internal server error.")
        error = ApiError(status, text, code="bad_request" if status == 400 else None)
        return _answer(error)


def _answer(error: ApiError) -> web.Response:
    response = web.Response(body=error.body(), status=error.status, content_type="application/json")
    response.force_close()
    return response


class Site(web.SockSite):
    """Listens on a bound socket with guarded connections."""

    def __init__(self, runner: web.AppRunner, bound: socket.socket) -> None:
        super().__init__(runner, bound, backlog=BACKLOG)
        self._app = runner.app

    async def start(self) -> None:
        await web.BaseSite.start(self)
        server = self._runner.server
        assert isinstance(server, web.Server)
        loop = asyncio.get_running_loop()
        connections, overload = self._app[CONNECTIONS], self._app[OVERLOAD]

        def connect() -> Connection:
            return Connection(
                server,
                connections,
                overload,
                loop=loop,
                keepalive_timeout=_KEEPALIVE_S,
                lingering_time=_LINGER_S,
                max_headers=_MAX_HEADERS,
                access_log=None,
            )

        self._server = await loop.create_server(connect, sock=self._sock, backlog=self._backlog)
