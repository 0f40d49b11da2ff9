"""One streamed request to an OpenAI-compatible server, and when each of its chunks arrived.

Used by bench.serve and bench.speculate. It relies on nothing but what OpenAI's streaming format
promises.
"""

import itertools
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import msgspec


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The server under test and what every request to it has in common."""

    url: str  # up to and including /v1
    model: str
    endpoint: str = "completions"  # or "chat"
    max_tokens: int = 128
    ask_usage: bool = True
    ignore_eos: bool = False
    extra: dict[str, Any] = {}

    @property
    def path(self) -> str:
        """URL of the endpoint."""
        return self.url.rstrip("/") + (
            "/chat/completions" if self.endpoint == "chat" else "/completions"
        )

    def body(self, prompt: str) -> dict[str, Any]:
        """Request for `prompt`. Fields beyond OpenAI's are sent only when asked for."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
        }
        if self.endpoint == "chat":
            body["messages"] = [{"role": "user", "content": prompt}]
        else:
            body["prompt"] = prompt
        if self.ask_usage:
            body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return body | self.extra


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What one request gave. Times are seconds after it was sent."""

    sent_at_s: float
    end_to_end_s: float
    chunk_times_s: tuple[float, ...] = ()  # of the chunks that carry text
    chunk_chars: tuple[int, ...] = ()  # of each of them
    prompt_tokens: int | None = None  # None: the server gave no usage
    cached_tokens: int | None = None
    output_tokens: int = 0  # from usage, else the number of chunks with text
    text: str = ""
    fulcrum: dict[str, Any] | None = None  # what a Fulcrum server adds to usage when asked
    status: int = 200
    retry_after_s: float | None = None  # of a refusal
    error: str | None = None

    @property
    def first_chunk_s(self) -> float:
        """Time to the first token."""
        return self.chunk_times_s[0]

    @property
    def gaps_s(self) -> list[float]:
        """Times between successive chunks."""
        times = self.chunk_times_s
        return [later - earlier for earlier, later in itertools.pairwise(times)]

    @property
    def time_per_token_s(self) -> float | None:
        """Mean time of an output token after the first; None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.chunk_times_s[-1] - self.first_chunk_s) / (self.output_tokens - 1)


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None
    fulcrum: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


def _text(chunk: _Chunk) -> str:
    parts = []
    for choice in chunk.choices:
        delta = choice.delta or _Delta()
        parts += [choice.text, delta.reasoning_content, delta.content]
    return "".join(part for part in parts if part)


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """Yield (arrival time, data) of each SSE event with data.

    All events that one read of the socket returns carry the time of that read.
    """
    rest = b""
    async for piece in response.content.iter_any():
        arrived_at_s = time.perf_counter()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield arrived_at_s, line[5:].strip()


class Answer:
    """One request's answer as it comes in: feed it each SSE event, then take the `outcome`."""

    def __init__(self) -> None:
        self.sent_at_s = time.perf_counter()
        self.status = 0
        self.retry_after_s: float | None = None
        self.error: str | None = None
        self._times: list[float] = []
        self._texts: list[str] = []
        self._usage: _Usage | None = None
        self._is_done = False

    def push(self, arrived_at_s: float, data: bytes) -> bool:
        """Take the data of an event; true after the last one. Raises msgspec.DecodeError."""
        if data == b"[DONE]":
            self._is_done = True
            return True
        chunk = _decode_chunk(data)
        if chunk.error is not None:
            self.error = f"error in the stream: {chunk.error}"
            return True
        self._usage = chunk.usage or self._usage
        if text := _text(chunk):
            self._times.append(arrived_at_s - self.sent_at_s)
            self._texts.append(text)
        return False

    def refuse(self, headers: Mapping[str, str], text: str) -> None:
        """Take an answer that is no stream; names of headers are given in small letters."""
        self.retry_after_s = _retry_after_s(headers)
        self.error = f"HTTP {self.status}: {text[:200]}"

    def outcome(self) -> Outcome:
        error, usage = self.error, self._usage
        if error is None and not self._is_done:
            error = "the stream ended without data: [DONE]"
        if error is None and not self._times:
            error = "the stream held no text"
        details = usage.prompt_tokens_details if usage else None
        return Outcome(
            sent_at_s=self.sent_at_s,
            end_to_end_s=time.perf_counter() - self.sent_at_s,
            chunk_times_s=tuple(self._times),
            chunk_chars=tuple(map(len, self._texts)),
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=details.cached_tokens if details else None,
            output_tokens=usage.completion_tokens if usage else len(self._times),
            text="".join(self._texts),
            fulcrum=usage.fulcrum if usage else None,
            status=self.status,
            retry_after_s=self.retry_after_s,
            error=error,
        )


async def complete(session: aiohttp.ClientSession, target: Target, prompt: str) -> Outcome:
    """Send one request, read its stream to the end, and never raise for what the server does."""
    answer = Answer()
    try:
        async with session.post(target.path, json=target.body(prompt)) as response:
            answer.status = response.status
            if response.status != 200:
                answer.refuse(response.headers, await response.text())
            else:
                async for arrived_at_s, data in _events(response):
                    if answer.push(arrived_at_s, data):
                        break
    except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError) as failure:
        answer.error = f"{type(failure).__name__}: {failure}"
    return answer.outcome()


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """The time to wait as OpenAI's SDKs read it: the header in milliseconds goes first."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
    return None
