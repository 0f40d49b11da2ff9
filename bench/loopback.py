"""A client for many requests a second to a server on this machine; bench.overload uses it.

Client and server share the processors: what the client takes, the server lacks. It speaks no more
HTTP than the server under test does, which costs a fraction of what a general client does.
"""

import asyncio
import time
from typing import cast

import msgspec

from bench.client import Answer, Outcome, Target


class LoopbackClient:
    """Keeps connections open and opens as many as there are requests under way."""

    def __init__(self, target: Target, port: int) -> None:
        self._target = target
        self._port = port
        self._head = (
            f"POST /v1/{target.path.rpartition('/v1/')[2]} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._idle: list[_Connection] = []
        self._encode = msgspec.json.Encoder().encode

    async def complete(self, prompt: str) -> Outcome:
        """Send one request and read its answer; never raise for what the server does."""
        body = self._encode(self._target.body(prompt))
        answer = Answer()
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            request = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
            if await connection.ask(request, answer):
                self._idle.append(connection)
        except OSError as failure:
            answer.error = f"{type(failure).__name__}: {failure}"
        return answer.outcome()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, "127.0.0.1", self._port)
        return connection


class _Connection(asyncio.Protocol):
    """One answer at a time: a head, then a body of known length or in chunks."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._end: asyncio.Future[bool] | None = None
        self._rest = b""  # not parsed yet
        self._headers: dict[str, str] | None = None
        self._line = b""  # of an event, incomplete

    async def ask(self, request: bytes, answer: Answer) -> bool:
        """Whether another request may follow on the connection."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._answer, self._headers, self._line = answer, None, b""
        self._end = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._end

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class

    def connection_lost(self, error: Exception | None) -> None:
        self._finish(may_go_on=False)

    def data_received(self, data: bytes) -> None:
        arrived_at_s = time.perf_counter()
        self._rest += data
        try:
            while self._answer is not None and self._parse(self._answer, arrived_at_s):
                pass
        except (ValueError, IndexError, msgspec.DecodeError) as failure:
            if self._answer is not None:
                self._answer.error = f"{type(failure).__name__}: {failure}"
            self.close()

    def _parse(self, answer: Answer, arrived_at_s: float) -> bool:
        """Take the next part of the answer; false where it is not there yet."""
        if self._headers is None:
            head, found, rest = self._rest.partition(b"\r\n\r\n")
            if not found:
                return False
            status_line, *lines = head.decode("latin-1").split("\r\n")
            answer.status = int(status_line.split(" ")[1])
            pairs = (line.partition(":") for line in lines)
            self._headers = {name.lower(): value.strip() for name, _, value in pairs}
            self._rest = rest
            return True
        if "content-length" in self._headers:
            length = int(self._headers["content-length"])
            if len(self._rest) < length:
                return False
            answer.refuse(self._headers, self._rest[:length].decode(errors="replace"))
            self._rest = self._rest[length:]
            return self._finish(may_go_on=True)
        size, found, rest = self._rest.partition(b"\r\n")
        length = int(size, 16) if found else 0
        if not found or len(rest) < length + 2:
            return False
        self._rest = rest[length + 2 :]
        if not length:
            return self._finish(may_go_on=True)
        *events, self._line = (self._line + rest[:length]).split(b"\n")
        for event in events:
            if event.startswith(b"data:"):
                answer.push(arrived_at_s, event[5:].strip())
        return True

    def _finish(self, *, may_go_on: bool) -> bool:
        if self._end is not None and not self._end.done():
            self._end.set_result(may_go_on)
        self._answer = None
        return False
