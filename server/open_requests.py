"""Who is in, and who has to go: the open requests, and the sequences that the engine has of them.

One `OpenRequests` lives on the event loop. The engine client keeps it, and asks it for the load
that admission decides by.
"""

import asyncio
from collections import Counter

from server.admission import Load
from server.forecast import Ask, OpenSequence, forecast
from server.gate import Gate
from server.generation import Generation
from server.stream import Stream


class OpenRequests:
    def __init__(self, gate: Gate) -> None:
        self.streams: dict[int, tuple[Generation, Stream]] = {}  # by sequence, until it ends
        self.generations: set[Generation] = set()
        self._num_by_priority: Counter[int] = Counter()
        self._gate = gate
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, generation: Generation) -> None:
        self.generations.add(generation)
        self._num_by_priority[generation.arrival.priority] += 1
        self._idle.clear()

    def remove(self, generation: Generation) -> None:
        self.generations.remove(generation)
        self._num_by_priority[generation.arrival.priority] -= 1
        self.note_end()
        if not self.generations:
            self._idle.set()

    def end(self, seq_id: int) -> None:
        """Take out a sequence that the engine is done with."""
        del self.streams[seq_id]
        self.note_end()

    def note_end(self) -> None:
        """A sequence gives up its place."""
        self._gate.note_end(len(self.streams))

    async def wait_idle(self) -> None:
        """Wait until every request is closed."""
        await self._idle.wait()

    @property
    def num_sequences(self) -> int:
        """Sequences that hold a place; 0 when every one has been ended by the engine."""
        return len(self.streams) + sum(one.num_reserved for one in self.generations)

    def load(self, without: Generation | None = None) -> Load:
        return Load(
            sequences=[
                OpenSequence(
                    generation.rank_s,
                    stream.num_prompt_tokens,
                    stream.num_events and max(1, stream.num_tokens),
                    stream.max_tokens,
                    stream.ignore_eos,
                )
                for generation, stream in self.streams.values()
                if stream.finish_reason is None
            ],
            num_reserved=sum(
                num_reserved
                for generation in self.generations
                # Nearly all have submitted what they reserved.
                if (num_reserved := generation.num_reserved)
                and generation is not without
                and not generation.has_failed
            ),
        )

    def outranks(self, priority: int) -> bool:
        """Whether a request of that priority goes before one that is open."""
        return any(count and other > priority for other, count in self._num_by_priority.items())

    def make_room(self, ask: Ask) -> None:
        """Shed waiting requests of lower priority where they keep `ask` or its own bound out."""
        if not self.outranks(ask.priority):
            return
        condition = self._gate.condition
        load, limits = self.load(), self._gate.limits.scaled(condition.factor)
        if condition.status == "draining" or ask.num_sequences > limits.capacity:
            return  # it is refused in any case
        num_missing = load.num_open + ask.num_sequences - limits.capacity
        # Those that are overtaken wait longer: as many go as come in, once the last is too late.
        last = Ask(rank_s=max((seq.rank_s for seq in load.sequences), default=0.0))
        costs = self._gate.costs.costs
        if forecast(last, load.sequences, costs, limits).ttft_s > limits.max_ttft_s:
            num_missing = max(num_missing, ask.num_sequences)
        if num_missing > 0:
            self.shed(num_missing, above_priority=ask.priority)

    def shed(self, num_sequences: int, *, above_priority: int | None) -> None:
        """End waiting requests, the lowest priority and then the youngest first, until so many
        sequences are gone."""
        waiting = [
            generation
            for generation in self.generations
            if generation.is_waiting
            and (above_priority is None or generation.arrival.priority > above_priority)
        ]
        waiting.sort(key=lambda one: (one.arrival.priority, one.arrival.arrived_at_s))
        costs, limits = self._gate.costs.costs, self._gate.limits
        while num_sequences > 0 and waiting:
            generation = waiting.pop()
            count = generation.num_reserved + len(generation.streams)
            work_s = forecast(Ask(rank_s=0, num_sequences=count), (), costs, limits).work_s
            generation.fail(self._gate.shed(generation.arrival, count, work_s))
            num_sequences -= count
