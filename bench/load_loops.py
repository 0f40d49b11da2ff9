"""Clients in a closed loop and arrivals in an open one, and what a server gave in either.

Used by bench.overload. Both are measured by the same rule: output tokens count by the time at which
they arrive, in a window that begins once the lanes have filled and ends with the last new request.
What is answered after it counts for nothing, and its time neither.
"""

import asyncio
import random
import time

import msgspec

from bench.client import Outcome
from bench.local_server import LocalServer
from bench.loopback import LoopbackClient
from bench.prompts import PromptSource

SETTLE_S = 5.0  # until a loop is measured: all begin at once, and lanes and queue have to fill
_REFUSED = (429, 503)


class Stretch(msgspec.Struct):
    """What became of the requests of a loop, whose window is given in perf_counter's seconds."""

    begin_s: float
    end_s: float
    first: list[Outcome] = []
    retries: list[Outcome] = []
    num_not_due: int = 0  # told to come again after the end
    rss_bytes: list[int] = []
    server_cores: float = 0.0  # processor time by time, over the window
    client_cores: float = 0.0

    @property
    def outcomes(self) -> list[Outcome]:
        return self.first + self.retries

    @property
    def goodput_tok_s(self) -> float:
        """Output tokens of complete answers by second of the window."""
        total = 0.0
        for outcome in self.outcomes:
            times = outcome.chunk_times_s
            if outcome.error is None and times:
                inside = sum(self.begin_s <= outcome.sent_at_s + at < self.end_s for at in times)
                total += outcome.output_tokens * inside / len(times)
        return total / (self.end_s - self.begin_s)

    @property
    def num_mean_open(self) -> float:
        """Answers under way, on average over the window."""
        open_s = 0.0
        for outcome in self.outcomes:
            if outcome.chunk_times_s:
                began_s = max(self.begin_s, outcome.sent_at_s + outcome.first_chunk_s)
                ended_s = min(self.end_s, outcome.sent_at_s + outcome.chunk_times_s[-1])
                open_s += max(0.0, ended_s - began_s)
        return open_s / (self.end_s - self.begin_s)


class Loops:
    """Sends the loops' requests to one server; no prompt is sent twice but by a retry."""

    def __init__(
        self,
        server: LocalServer,
        client: LoopbackClient,
        source: PromptSource,
        prompt_words: int,
    ) -> None:
        self._server = server
        self._complete = client.complete
        self._source = source
        self._prompt_words = prompt_words
        self._num_prompts = 0

    async def closed(self, width: int, duration_s: float) -> Stretch:
        """`width` clients, each sending one request after the other."""
        stretch, watcher = self._begin(duration_s)

        async def client() -> None:
            prompt = self._next_prompt()
            while time.perf_counter() < stretch.end_s:
                outcome = await self._complete(prompt)
                stretch.first.append(outcome)
                if outcome.error is None:
                    prompt = self._next_prompt()
                else:  # refused: the same again when the server said so
                    left_s = stretch.end_s - time.perf_counter()
                    await asyncio.sleep(min(outcome.retry_after_s or 1.0, left_s))

        await asyncio.gather(*(client() for _ in range(width)))
        await watcher
        return stretch

    async def open(self, rate_per_s: float, duration_s: float, draw: random.Random) -> Stretch:
        """Random arrivals at that rate; each comes again once where it was refused."""
        # Made before it begins: what the clients compute meanwhile, the server lacks.
        arrivals: list[tuple[float, str]] = []
        arrives_s = 0.0
        while arrives_s < duration_s:
            arrivals.append((arrives_s, self._next_prompt()))
            arrives_s += draw.expovariate(rate_per_s)
        stretch, watcher = self._begin(duration_s)
        began_s = stretch.end_s - duration_s

        async def request(prompt: str) -> None:
            outcome = await self._complete(prompt)
            stretch.first.append(outcome)
            if outcome.status not in _REFUSED or outcome.retry_after_s is None:
                return
            come_at_s = outcome.sent_at_s + outcome.end_to_end_s + outcome.retry_after_s
            if come_at_s > stretch.end_s:
                stretch.num_not_due += 1
                return
            await asyncio.sleep(come_at_s - time.perf_counter())
            stretch.retries.append(await self._complete(prompt))

        async with asyncio.TaskGroup() as requests:
            for at_s, prompt in arrivals:
                await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
                requests.create_task(request(prompt))
        await watcher
        return stretch

    def _begin(self, duration_s: float) -> tuple[Stretch, asyncio.Task[None]]:
        now_s = time.perf_counter()
        stretch = Stretch(now_s + SETTLE_S, now_s + duration_s)
        return stretch, asyncio.create_task(self._watch(stretch))

    async def _watch(self, stretch: Stretch) -> None:
        """Note memory each second, and processor time, to the end of the window."""
        await asyncio.sleep(stretch.begin_s - time.perf_counter())
        server_s, client_s = self._server.cpu_s, time.process_time()
        while (left_s := stretch.end_s - time.perf_counter()) > 0:
            stretch.rss_bytes.append(self._server.rss_bytes)
            await asyncio.sleep(min(1.0, left_s))
        window_s = stretch.end_s - stretch.begin_s
        stretch.server_cores = (self._server.cpu_s - server_s) / window_s
        stretch.client_cores = (time.process_time() - client_s) / window_s

    def _next_prompt(self) -> str:
        self._num_prompts += 1
        return self._source.prompt(self._num_prompts, self._prompt_words)
