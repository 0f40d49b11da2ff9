"""How requests are received in an overload: together, and most are refused at once.

What refusing takes is lost to those that were let in. Most of that time the processor waits for
memory, since the engine's steps leave nothing of the event loop's in the caches: so requests wait a
moment for others. Those that are plainly refused for want of room are so before aiohttp builds a
request. All others go the usual way, where all of it is looked at again. Each `Connection` asks the
app's `Overload`.
"""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import SERVER_SOFTWARE, HttpVersion11, RawRequestMessage

from server import access, chat, completions
from server.auth import holds_key
from server.engine_client import EngineClient
from server.errors import ApiError
from server.http import Settings, arrival
from server.protocol import GenerationRequest
from server.served import ServedModel

_READERS: dict[str, Callable[[bytes, ServedModel], tuple[GenerationRequest, int]]] = {
    "/v1/chat/completions": chat.read,
    "/v1/completions": completions.read,
}
# Nobody notices so short a time who is refused or waits for seconds.
_GATHER_S = 0.05


class Overload:
    """Whether there is one, and what becomes of what connections receive meanwhile."""

    def __init__(self, client: EngineClient, model: ServedModel, settings: Settings) -> None:
        self._client = client
        self._model = model
        self._settings = settings
        self._gathered: list[Callable[[], None]] = []

    @property
    def is_on(self) -> bool:
        return self._client.gate.is_overloaded

    def gather(self, handle: Callable[[], None]) -> None:
        """Call `handle` with those of others, soon."""
        if not self._gathered:
            asyncio.get_running_loop().call_later(_GATHER_S, self._handle_gathered)
        self._gathered.append(handle)

    def _handle_gathered(self) -> None:
        gathered, self._gathered = self._gathered, []
        for handle in gathered:
            asyncio.get_running_loop().call_soon(handle)

    def refusal(
        self, message: RawRequestMessage, received: bytes, remote: str | None
    ) -> bytes | None:
        """The whole answer to a request that is refused; None for one that goes the usual way.

        `received` is what completed the message.
        """
        if not self.is_on:
            return None
        read = _READERS.get(message.path)
        body = _whole_body(message, received)
        if read is None or body is None or len(body) > self._settings.max_body_bytes:
            return None
        began_s = time.monotonic()
        api_key = self._settings.api_key
        if api_key is not None and not holds_key(message.headers, api_key):
            return None
        try:
            request, num_sequences = read(body, self._model)
            arrived = arrival(message.headers, remote, body, request)
        except ApiError:
            return None  # what is wrong with it is said the usual way
        error = self._client.turn_away(arrived, num_sequences)
        if error is None:
            return None
        request_id = access.request_id(message.headers)
        duration_s = time.monotonic() - began_s
        access.log(message.method, message.path, error.status, duration_s, request_id)
        return _render(error, request_id)


OVERLOAD = web.AppKey("OVERLOAD", Overload)


def _whole_body(message: RawRequestMessage, received: bytes) -> bytes | None:
    """The body of a request for JSON that keeps its connection, where it came in one piece."""
    headers = message.headers
    if (
        message.method != "POST"
        or message.version != HttpVersion11
        or message.should_close
        or message.chunked
        or message.compression
        or message.upgrade
        or "Expect" in headers
        or headers.get("Content-Type", "").partition(";")[0] != "application/json"
    ):
        return None
    body = received.partition(b"\r\n\r\n")[2]
    return body if headers.get("Content-Length") == str(len(body)) else None


def _render(error: ApiError, request_id: str) -> bytes:
    """The response as aiohttp would write it."""
    body = error.body()
    headers = error.headers() | {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "x-request-id": request_id,
        "Date": rfc822_formatted_time(),
        "Server": SERVER_SOFTWARE,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
