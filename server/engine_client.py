"""The event loop's side of the engine: admission, submission, and the reports of each step.

One `EngineClient` lives as long as the app. The engine thread calls it through a single
`call_soon_threadsafe` per step; everything else runs on the event loop.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

import msgspec

from engine.speculation.report import SpeculationReport
from engine.tokenizer.protocol import Tokenizer
from engine.types import EngineLoad, StepReport, Submit, TokenEvent
from server.admission import Limits, Reject, admit
from server.errors import ApiError
from server.generation import Generation
from server.metrics import Metrics
from server.stream import Stream

logger = logging.getLogger("fulcrum")


class EngineThread(Protocol):
    """What the server asks of the engine."""

    def start(self) -> None: ...
    def submit(self, message: Submit, /) -> None: ...
    def abort(self, seq_id: int, /) -> None: ...
    def stop(self, grace_s: float, /) -> object: ...
    def heartbeat_age_s(self) -> float: ...
    def is_alive(self) -> bool: ...
    def speculation(self) -> Future[SpeculationReport]: ...


EngineFactory = Callable[[Callable[[StepReport], None]], EngineThread]


class Health(msgspec.Struct, frozen=True):
    status: str  # "ok", "draining", "engine stale" or "engine dead"
    heartbeat_age_s: float


class EngineClient:
    def __init__(
        self,
        make_engine: EngineFactory,
        tokenizer: Tokenizer,
        limits: Limits,
        metrics: Metrics,
        *,
        stale_s: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.limits = limits
        self.load = EngineLoad()
        self.draining = False
        self._make_engine = make_engine
        self._metrics = metrics
        self._stale_s = stale_s
        self._engine: EngineThread | None = None
        self._seq_ids = itertools.count(1)
        self._streams: dict[int, tuple[Generation, Stream]] = {}
        self._generations: set[Generation] = set()
        self._num_open = 0  # sequences reserved, or not yet ended by the engine
        self._mean_duration_s = 1.0
        self._idle = asyncio.Event()
        self._idle.set()

    # The engine's life

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def on_report(report: StepReport) -> None:
            loop.call_soon_threadsafe(self._dispatch, report)

        self._engine = self._make_engine(on_report)
        self._engine.start()

    async def stop(self) -> None:
        """End every sequence, then the engine thread."""
        assert self._engine is not None
        await asyncio.to_thread(self._engine.stop, 0.0)
        self.fail_all(ApiError(503, "The server is shutting down.", code="shutting_down"))

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and wait for the open ones; after `grace_s` abort what is left."""
        self.draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            self.fail_all(ApiError(503, "The server is shutting down.", code="shutting_down"))

    def health(self) -> Health:
        if self._engine is None or not self._engine.is_alive():
            return Health("engine dead", 0.0)
        age_s = self._engine.heartbeat_age_s()
        if age_s > self._stale_s:
            return Health("engine stale", age_s)
        return Health("draining" if self.draining else "ok", age_s)

    async def speculation(self) -> SpeculationReport:
        """What the engine thread says of speculation; raises a 503 where it has ended."""
        if self._engine is not None and self._engine.is_alive():
            inquiry = self._engine.speculation()
            try:
                return await asyncio.wrap_future(inquiry)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the client went away
        raise ApiError(503, "The engine has stopped.", code="engine_stopped")

    def check_engine(self) -> None:
        """Fail every open request if the engine thread is gone: none may wait for ever."""
        if self._engine is not None and not self._engine.is_alive():
            self.fail_all(ApiError(500, "The engine has stopped."))
            self._num_open -= len(self._streams)
            self._streams.clear()

    def fail_all(self, error: ApiError) -> None:
        for generation in list(self._generations):
            generation.fail(error)

    # One request

    def open(self, num_sequences: int) -> Generation:
        """Reserve places for a request; raises the 400, 429 or 503 that refuses it."""
        if self.draining:
            raise ApiError(
                503, "The server is shutting down.", code="shutting_down", retry_after_s=10
            )
        if self._engine is None or not self._engine.is_alive():
            raise ApiError(503, "The engine has stopped.", code="engine_stopped")
        decision = admit(self._num_open, num_sequences, self._mean_duration_s, self.limits)
        if isinstance(decision, Reject):
            if decision.status == 429:
                self._metrics.rejected.inc(num_sequences)
            raise _refusal(decision, num_sequences, self.limits)
        self._num_open += num_sequences
        generation = Generation(self, num_sequences)
        self._generations.add(generation)
        self._idle.clear()
        return generation

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    def submit(self, generation: Generation, stream: Stream, message: Submit) -> None:
        assert self._engine is not None
        self._streams[stream.seq_id] = (generation, stream)
        self._metrics.prompt_tokens.inc(stream.num_prompt_tokens)
        self._engine.submit(message)

    def abort(self, seq_id: int) -> None:
        assert self._engine is not None
        self._engine.abort(seq_id)

    def close(self, generation: Generation, num_unused: int) -> None:
        self._num_open -= num_unused
        self._generations.discard(generation)
        if not self._generations:
            self._idle.set()

    @property
    def num_open(self) -> int:
        """Sequences that hold a place; 0 when every one has been ended by the engine."""
        return self._num_open

    # The engine's reports

    def _dispatch(self, report: StepReport) -> None:
        now_s = time.monotonic()
        self.load = report.load
        self._metrics.observe_step(report)
        for event in report.events:
            entry = self._streams.get(event.seq_id)
            if entry is None:
                continue
            generation, stream = entry
            was_open = stream.finish_reason is None
            try:
                generation.push(stream, event)
            except Exception:  # one stream's trouble must not end the others
                logger.exception("stream %d failed", event.seq_id)
                generation.fail(ApiError(500, "The answer could not be decoded."))
            self._metrics.observe_event(stream, event, now_s)
            if event.finish_reason is not None:
                self._end(stream, event, now_s)
            elif was_open and stream.finish_reason == "stop":
                self.abort(stream.seq_id)  # a stop string: the engine does not know of it

    def _end(self, stream: Stream, event: TokenEvent, now_s: float) -> None:
        del self._streams[stream.seq_id]
        self._num_open -= 1
        duration_s = now_s - stream.submitted_s
        self._mean_duration_s += 0.1 * (duration_s - self._mean_duration_s)
        reason = stream.finish_reason or event.finish_reason or "error"
        self._metrics.observe_end("error" if event.finish_reason == "error" else reason, duration_s)


def _refusal(decision: Reject, num_sequences: int, limits: Limits) -> ApiError:
    if decision.status == 400:
        return ApiError(
            400,
            f"The request asks for {num_sequences} sequences; this server takes at most "
            f"{limits.capacity} at once.",
            param="n",
        )
    return ApiError(
        decision.status,
        "The queue is full. Try again later.",
        code="queue_full",
        retry_after_s=decision.retry_after_s,
    )
