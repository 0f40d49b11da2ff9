"""All sequences of one HTTP request, from admission to their last token.

The endpoints open a `Generation`, submit prompts to it, read deltas and close it; closing aborts
what still runs, which is how a client that goes away frees its blocks.
"""

import asyncio
import time
from collections import Counter
from itertools import zip_longest
from typing import TYPE_CHECKING

from msgspec import UNSET

from engine.types import SamplingParams, Submit, TokenEvent
from server.errors import ApiError
from server.gate import Arrival
from server.protocol import FulcrumOptions, FulcrumUsage, PromptTokensDetails, Usage
from server.stream import Delta, Stream

if TYPE_CHECKING:
    from server.engine_client import EngineClient


class Generation:
    """Mutable, on the event loop only. Made by `EngineClient.open`, which reserved its places."""

    def __init__(self, client: "EngineClient", arrival: Arrival, num_sequences: int) -> None:
        self.arrival = arrival
        self.rank_s = arrival.rank_s
        self.streams: list[Stream] = []
        self.plain_ttft_s = 0.0  # as predicted at admission, uncorrected; 0: it was not
        self._client = client
        self._num_reserved = num_sequences
        self._deadline: asyncio.TimerHandle | None = None
        if arrival.timeout_s is not None:
            left_s = arrival.arrived_at_s + arrival.timeout_s - time.monotonic()
            self._deadline = asyncio.get_running_loop().call_later(left_s, self._expire)
        self._num_choices = 1
        self._num_unfinished = 0
        self._ready: list[Stream] = []
        self._wake: asyncio.Future[None] | None = None
        self._only_at_end = False
        self._error: ApiError | None = None
        self._closed = False

    def submit(
        self,
        prompts: list[list[int]],
        choices: list[list[SamplingParams]],
        *,
        stops: tuple[str, ...] = (),
        hide_output: bool = False,
        options: FulcrumOptions | None = None,
    ) -> None:
        """Send every prompt to the engine, once for each of its choices' parameters.

        Raises the 429 or 503 of a request that turns out to be too much, now that its length is
        known.
        """
        if self._error is not None:
            raise self._error
        self.plain_ttft_s = self._client.confirm(self, prompts, choices)
        arrival = self.arrival
        options = options or FulcrumOptions()
        self._num_choices = len(choices[0])
        for prompt, params_by_choice in zip(prompts, choices, strict=True):
            prompt_ids = tuple(prompt)
            for params in params_by_choice:
                stream = Stream(
                    len(self.streams),
                    self._client.next_seq_id(),
                    self._client.tokenizer.detokenizer(),
                    stops=stops,
                    min_tokens=params.min_tokens,
                    num_prompt_tokens=len(prompt_ids),
                    hide_output=hide_output,
                )
                stream.submitted_s = arrival.arrived_at_s
                stream.max_tokens = params.max_tokens
                stream.ignore_eos = params.ignore_eos
                self.streams.append(stream)
                self._num_unfinished += 1
                self._num_reserved -= 1  # the client keeps the place until the engine is done
                message = Submit(
                    stream.seq_id,
                    prompt_ids,
                    params,
                    arrival.arrived_at_s,
                    arrival.priority,
                    drafter=options.speculation,
                    wants_draft_stats=options.usage,
                )
                self._client.submit(self, stream, message)

    async def take(self) -> list[Delta]:
        """Wait for what is new, at most one delta per choice; empty when all have finished."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self._num_unfinished == 0:
                return []
            await self._wait()
        ready, self._ready = self._ready, []
        return [stream.take() for stream in ready]

    async def take_all(self) -> list[Delta]:
        """Wait for the end and return each choice whole."""
        self._only_at_end = True
        while self._num_unfinished and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error
        return [stream.take() for stream in self.streams]

    def push(self, stream: Stream, event: TokenEvent) -> None:
        """Apply one event; called by the client as the engine's report comes in."""
        if self._closed or stream.finish_reason is not None:
            return
        if event.finish_reason == "error":
            self.fail(ApiError(500, f"The engine failed: {event.error or 'unknown error'}."))
            return
        if event.finish_reason == "abort":
            # Nobody asked for it while the request is open: the server is going down.
            self.fail(ApiError(503, "The server is shutting down.", code="shutting_down"))
            return
        had_delta = stream.has_delta
        stream.push(event)
        if not had_delta:
            self._ready.append(stream)
        if stream.finish_reason is not None:
            self._num_unfinished -= 1
        if not self._only_at_end or self._num_unfinished == 0:
            self._notify()

    def fail(self, error: ApiError) -> None:
        """End the request with an error, after what is already visible."""
        if self._error is None and not self._closed:
            self._error = error
            if self._deadline is not None:
                self._deadline.cancel()
            self._abort_unfinished()
            self._notify()

    @property
    def num_reserved(self) -> int:
        """Places whose sequences are not submitted yet."""
        return self._num_reserved

    @property
    def has_failed(self) -> bool:
        """Whether it ended with an error, so that what it reserved is not used any more."""
        return self._error is not None

    @property
    def is_waiting(self) -> bool:
        """Whether nothing of it has been computed as far as its client can tell."""
        return self._error is None and not any(stream.num_events for stream in self.streams)

    def _expire(self) -> None:
        """End the request at its own `timeout`: with what there is, else with an error."""
        self._client.note_expired(self)
        if not any(stream.num_tokens for stream in self.streams):
            message = "The request's 'timeout' was over before its first token."
            self.fail(ApiError(504, message, param="timeout", code="timeout", is_final=True))
            return
        for stream in self.streams:
            if stream.finish_reason is None:
                if not stream.has_delta:
                    self._ready.append(stream)
                stream.cut("length")
                self._num_unfinished -= 1
                self._client.abort(stream.seq_id)
        self._notify()

    def close(self) -> None:
        """Abort what still runs and give back unused places. Safe to call twice."""
        if self._closed:
            return
        if self._deadline is not None:
            self._deadline.cancel()
        self._abort_unfinished()
        self._closed = True
        self._client.close(self)

    def usage(self, options: FulcrumOptions | None = None) -> Usage:
        """Tokens so far; a prompt counts once, however many choices it has.

        With what it cost, where `options` ask for that.
        """
        first_choices = self.streams[:: self._num_choices]
        num_prompt = sum(stream.num_prompt_tokens for stream in first_choices)
        num_output = sum(stream.num_tokens for stream in self.streams)
        num_cached = sum(stream.num_cached_tokens for stream in first_choices)
        return Usage(
            num_prompt,
            num_output,
            num_prompt + num_output,
            PromptTokensDetails(num_cached),
            self._costs(num_cached) if options is not None and options.usage else UNSET,
        )

    def _costs(self, num_cached: int) -> FulcrumUsage:
        begun = [stream for stream in self.streams if stream.first_token_s is not None]
        prefill_s = decode_s = 0.0
        for stream in begun:
            assert stream.first_token_s is not None
            assert stream.newest_token_s is not None
            prefill_s = max(prefill_s, stream.first_token_s - stream.submitted_s - stream.queued_s)
            decode_s = max(decode_s, stream.newest_token_s - stream.first_token_s)
        queue_s = max((stream.queued_s for stream in self.streams), default=0.0)
        drafts = [stream.drafts for stream in self.streams if stream.drafts is not None]
        by_position = [summary.accepted_by_position for summary in drafts]
        drafters: Counter[str] = Counter()
        for summary in drafts:
            drafters.update(summary.drafters)
        return FulcrumUsage(
            queue_ms=round(1e3 * queue_s, 3),
            prefill_ms=round(1e3 * prefill_s, 3),
            decode_ms=round(1e3 * decode_s, 3),
            cached_tokens=num_cached,
            num_steps=sum(summary.num_steps for summary in drafts),
            drafted_tokens=sum(summary.num_drafted for summary in drafts),
            accepted_tokens=sum(summary.num_accepted for summary in drafts),
            accepted_by_position=[sum(counts) for counts in zip_longest(*by_position, fillvalue=0)],
            drafters=dict(drafters),
        )

    def _abort_unfinished(self) -> None:
        for stream in self.streams:
            if stream.finish_reason is None:
                stream.finish_reason = "abort"
                self._client.abort(stream.seq_id)

    async def _wait(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        try:
            await self._wake
        finally:
            self._wake = None

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
