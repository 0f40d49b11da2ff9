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
from typing import Literal, Protocol

from engine.speculation.report import SpeculationReport
from engine.tokenizer.protocol import Tokenizer
from engine.types import EngineLoad, SamplingParams, StepReport, Submit, TokenEvent
from server.admission import num_to_shed
from server.errors import ApiError
from server.forecast import Ask
from server.gate import Arrival, Gate
from server.generation import Generation
from server.metrics import Metrics
from server.open_requests import OpenRequests
from server.stream import Stream
from server.tokens import INLINE_SIZE

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
EngineState = Literal["ok", "engine stale", "engine dead"]


class EngineClient:
    def __init__(
        self,
        make_engine: EngineFactory,
        tokenizer: Tokenizer,
        gate: Gate,
        metrics: Metrics,
        *,
        stale_s: float,
        stuck_s: float,
    ) -> None:
        self.tokenizer = tokenizer
        self.gate = gate
        self.load = EngineLoad()
        self.draining = False
        self.parked_since_s: float | None = None  # while an apply has taken the core away
        self._make_engine = make_engine
        self._metrics = metrics
        self._stale_s = stale_s
        self._stuck_s = stuck_s
        self._engine: EngineThread | None = None
        self._seq_ids = itertools.count(1)
        self._open = OpenRequests(gate)

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
        self.fail_all(_shutting_down())

    async def drain(self, grace_s: float) -> None:
        """Refuse new requests and wait for the open ones; after `grace_s` abort what is left."""
        self.draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._open.wait_idle()
        except TimeoutError:
            self.fail_all(_shutting_down())

    @property
    def heartbeat_age_s(self) -> float:
        return 0.0 if self._engine is None else self._engine.heartbeat_age_s()

    @property
    def parked_s(self) -> float:
        """How long requests have been waiting for the core that an apply builds."""
        return 0.0 if self.parked_since_s is None else time.monotonic() - self.parked_since_s

    def engine_state(self) -> EngineState:
        if self._engine is None or not self._engine.is_alive():
            return "engine dead"
        return "engine stale" if self._engine.heartbeat_age_s() > self._stale_s else "ok"

    async def speculation(self) -> SpeculationReport:
        """What the engine thread says of speculation; raises a 503 where it does not answer."""
        if self._engine is not None and self._engine.is_alive():
            inquiry = self._engine.speculation()
            try:
                async with asyncio.timeout(self._stale_s):
                    return await asyncio.wrap_future(inquiry)
            except TimeoutError:
                raise _stuck() from None
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    raise  # the client went away
        raise ApiError(503, "The engine has stopped.", code="engine_stopped")

    def check(self) -> None:
        """Look for what no event tells of: a dead or stuck engine, a device in trouble."""
        if self._engine is not None and not self._engine.is_alive():
            # None may wait for ever.
            self.fail_all(ApiError(500, "The engine has stopped."))
            self._open.streams.clear()
        elif self.heartbeat_age_s > self._stuck_s:
            # They keep their places, and the engine its blocks, until the step comes back.
            self.fail_all(_stuck())
        self.gate.look()
        num_too_many = num_to_shed(self._open.load(), self.gate.condition, self.gate.limits)
        if num_too_many:
            self._open.shed(num_too_many, above_priority=None)

    def fail_all(self, error: ApiError) -> None:
        for generation in list(self._open.generations):
            generation.fail(error)

    # One request

    def open(self, arrival: Arrival, num_sequences: int) -> Generation:
        """Reserve places for a request; raises the 400, 429 or 503 that refuses it."""
        if self.draining:
            raise self.gate.refuse("shutting_down", arrival, num_sequences)
        state = self.engine_state()
        if state == "engine dead":
            raise self.gate.refuse("engine_dead", arrival, num_sequences)
        if state == "engine stale":
            raise self.gate.refuse("engine_stale", arrival, num_sequences)
        if self.parked_s > self.gate.limits.max_ttft_s:
            raise self.gate.refuse("applying", arrival, num_sequences)
        ask = arrival.ask(num_sequences)
        self._open.make_room(ask)
        if len(arrival.body) > INLINE_SIZE:  # less is encoded sooner than a decision is made
            self.gate.decide(arrival, ask, self._open.load, is_final=False)
        generation = Generation(self, arrival, num_sequences)
        self._open.add(generation)
        return generation

    def turn_away(self, arrival: Arrival, num_sequences: int) -> ApiError | None:
        """What `open` raises, of a newcomer for whom nobody else has to go; None: ask it."""
        if (
            self.draining
            or self.parked_since_s is not None
            or self.engine_state() != "ok"
            or self._open.outranks(arrival.priority)
            or self.gate.is_promised(arrival)
        ):
            return None
        ask = arrival.ask(num_sequences)
        try:
            self.gate.decide(arrival, ask, self._open.load, is_final=False)
        except ApiError as error:
            return error
        return None

    def confirm(
        self, generation: Generation, prompts: list[list[int]], choices: list[list[SamplingParams]]
    ) -> float:
        """Decide once more, with the prompts' lengths; return the predicted time to first token.

        It lacks the correction that was learned from earlier requests. Raises the 429 or 503 that
        refuses the request.
        """
        arrival = generation.arrival
        ask = Ask(
            rank_s=arrival.rank_s,
            num_sequences=len(prompts) * len(choices[0]),
            prompt_lengths=tuple(map(len, prompts)),
            max_tokens=max(params.max_tokens for row in choices for params in row),
            ignore_eos=choices[0][0].ignore_eos,
            priority=arrival.priority,
        )
        seen = self.gate.decide(
            arrival, ask, lambda: self._open.load(without=generation), is_final=True
        )
        return seen.ttft_s / self.gate.costs.costs.ttft_scale

    def next_seq_id(self) -> int:
        return next(self._seq_ids)

    def submit(self, generation: Generation, stream: Stream, message: Submit) -> None:
        assert self._engine is not None
        self._open.streams[stream.seq_id] = (generation, stream)
        self._metrics.prompt_tokens.inc(stream.num_prompt_tokens)
        self._engine.submit(message)

    def abort(self, seq_id: int) -> None:
        assert self._engine is not None
        self._engine.abort(seq_id)
        self._open.note_end()

    def note_expired(self, generation: Generation) -> None:
        num_open = sum(stream.finish_reason is None for stream in generation.streams)
        self.gate.note_expired(generation.arrival, num_open + generation.num_reserved)

    def close(self, generation: Generation) -> None:
        self._open.remove(generation)

    @property
    def num_open(self) -> int:
        """Sequences that hold a place; 0 when every one has been ended by the engine."""
        return self._open.num_sequences

    # The engine's reports

    def _dispatch(self, report: StepReport) -> None:
        now_s = time.monotonic()
        self.load = report.load
        self._metrics.observe_step(report)
        if report.step_costs is not None:
            self.gate.costs.renew(report.step_costs)
        if report.num_step_tokens:
            self._learn_step(report)
        for event in report.events:
            entry = self._open.streams.get(event.seq_id)
            if entry is None:
                continue
            generation, stream = entry
            was_open = stream.finish_reason is None
            try:
                generation.push(stream, event)
            except Exception:  # one stream's trouble must not end the others
                logger.exception("stream %d failed", event.seq_id)
                generation.fail(ApiError(500, "The answer could not be decoded."))
            if event.token_ids and stream.last_token_s is None:
                # The prediction is about the last of the request's choices.
                is_last = all(
                    one is stream or one.last_token_s is not None for one in generation.streams
                )
                self.gate.costs.observe_first_token(
                    stream.num_prompt_tokens,
                    event.num_cached_tokens,
                    generation.plain_ttft_s if is_last else 0.0,
                    now_s - stream.submitted_s,
                )
            self._metrics.observe_event(stream, event, now_s)
            if event.finish_reason is not None:
                self._end(stream, event, now_s)
            elif was_open and stream.finish_reason == "stop":
                self.abort(stream.seq_id)  # a stop string: the engine does not know of it

    def _learn_step(self, report: StepReport) -> None:
        costs = self.gate.costs
        costs.observe_step(report.num_step_tokens, report.step_s)
        if report.num_decoding:
            num_verified = report.num_decoding + report.num_drafted
            costs.observe_decode(report.num_decoding, report.num_emitted, num_verified)

    def _end(self, stream: Stream, event: TokenEvent, now_s: float) -> None:
        self._open.end(stream.seq_id)
        duration_s = now_s - stream.submitted_s
        reason = stream.finish_reason or event.finish_reason or "error"
        if reason in ("stop", "length") and stream.num_tokens:
            self.gate.costs.observe_end(stream.num_tokens)
        self._metrics.observe_end("error" if event.finish_reason == "error" else reason, duration_s)


def _stuck() -> ApiError:
    message = "The engine does not come back from a step."
    return ApiError(503, message, code="engine_stale", retry_after_s=10.0)


def _shutting_down() -> ApiError:
    return ApiError(503, "The server is shutting down.", code="shutting_down", retry_after_s=10.0)
