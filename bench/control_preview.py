"""Previews held against reality, a server of its own for each setting: used by `bench.control`.

Memory is what the process has in fact, its whole KV cache written to, before anything else was
done in it. Speed is what a client counts: answers are greedy and so the same each time, and one
with log-probabilities has told beforehand where in the text each token ends. Calibrations and
loads take turns, and what is promised for a load is the mean of the promises right before and
right after it: the machine's speed changes from one minute to the next. Where it did, there are
more turns.
"""

import asyncio
import itertools
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import aiohttp
import msgspec

from bench.client import Outcome, Target, complete
from bench.http_json import get_json
from bench.local_server import LocalServer
from bench.preview_cases import CONCURRENCIES, Case, Setting, preview_table
from bench.prompts import PromptSource
from engine.checkpoint.cache import cache_folder

_MIB = 1 << 20
_PROMPT_WORDS = 100
_LONG_PROMPT_WORDS = 1000
_FILL_WORDS, _FILLS = 250, 2  # of as many streams as there can be: more than the cache holds
_LEARNING_LOADS = 2
_OUTPUT_TOKENS = 128
_LOADS = {1: 4, 8: 1}  # of a turn, by streams: seconds each
_TURNS = 2
_MAX_TURNS = 3
_MAX_DRIFT = 0.08  # of the promise, from before a load to after it
_QUALITY_WAIT_S = 90.0


@contextmanager
def _own_cache() -> Iterator[Path]:
    """A cache folder without calibrations that shares models and qualities with the real one."""
    shared = cache_folder()
    with tempfile.TemporaryDirectory(prefix="fulcrum-bench-cache-") as name:
        folder = Path(name)
        for part in ("packages", "hub", "quality"):
            (shared / part).mkdir(parents=True, exist_ok=True)
            (folder / part).symlink_to(shared / part)
        yield folder


class _Stream(msgspec.Struct, frozen=True):
    """How many tokens of an answer a client had, and when."""

    times_s: list[float]
    num_tokens: list[int]  # received by then

    def received(self, at_s: float) -> int:
        index = bisect_right(self.times_s, at_s)
        return self.num_tokens[index - 1] if index else 0


class _Bench:
    """One server with one setting."""

    def __init__(
        self, session: aiohttp.ClientSession, server: LocalServer, setting: Setting, cache: Path
    ) -> None:
        self._session = session
        self._server = server
        self._setting = setting
        self._cache = cache
        self._model = ""
        self._source = PromptSource(None, seed=1)
        self._num_prompts = 0
        # Every load is of the same texts, each equally often: what drafts gain depends on them,
        # and is known of texts that were served before.
        self._texts = self._fresh(max(CONCURRENCIES), _PROMPT_WORDS)
        self._turns_of_texts = itertools.cycle(self._texts)
        self._token_ends: dict[str, list[int]] = {}  # characters of the answer to each, by token

    async def cases(self) -> list[Case]:
        """Fill the cache, look at the memory, then hold the promises of speed."""
        models = await get_json(self._session, f"{self._server.url}/v1/models")
        self._model = models["data"][0]["id"]
        # A long prompt whose every token is scored fills the largest steps and all their rows.
        await self._load(
            self._fresh(1, _LONG_PROMPT_WORDS),
            extra={"echo": True, "logprobs": 1, "temperature": 1},
        )
        for _ in range(_FILLS):
            await self._load(self._fresh(max(CONCURRENCIES), _FILL_WORDS), max_tokens=8)
        resident_mib = self._server.anonymous_bytes / _MIB
        overview = await get_json(self._session, f"{self._server.url}/v1/optimizations")
        allocated = overview["today"]["memory"]
        await self._wait_for_quality()
        ends = await asyncio.gather(*(self._look_at_tokens(text) for text in self._texts))
        self._token_ends = dict(zip(self._texts, ends, strict=True))
        for _ in range(_LEARNING_LOADS if self._setting.speculation != "off" else 0):
            await self._load(self._texts)
        preview, promises, rounds = await self._take_turns()
        planned = preview["memory"]["components"]
        return [
            Case(
                setting=self._setting,
                concurrency=concurrency,
                **_mean_promise(promises[concurrency]),
                measured=_decode_rate(rounds[concurrency]),
                num_turns=len(promises[concurrency]) - 1,
                basis=preview["speed"]["speculation"],
                planned_mib=preview["memory"]["total_bytes"] / _MIB,
                resident_mib=resident_mib,
                components_mib={
                    name: (planned[name] / _MIB, size / _MIB)
                    for name, size in allocated.items()
                    if name != "runtime"
                },
            )
            for concurrency in CONCURRENCIES
        ]

    async def _take_turns(self) -> tuple[Any, dict[int, list[Any]], dict[int, list[list[_Stream]]]]:
        """The last preview, and by streams the promises with a turn's loads after each but one."""
        rounds: dict[int, list[list[_Stream]]] = {streams: [] for streams in CONCURRENCIES}
        promises: dict[int, list[Any]] = {streams: [] for streams in CONCURRENCIES}
        preview = await self._promise(promises)
        for turn in range(1, _MAX_TURNS + 1):
            for streams in CONCURRENCIES:
                for _ in range(_LOADS[streams]):
                    texts = self._next_texts(streams)
                    outcomes = await self._load(texts)
                    rounds[streams].append(list(map(self._stream, texts, outcomes)))
            preview = await self._promise(promises)
            is_steady = all(_mean_promise(p)["drift"] <= _MAX_DRIFT for p in promises.values())
            if turn >= _TURNS and is_steady:
                break
        return preview, promises, rounds

    async def _promise(self, promises: dict[int, list[Any]]) -> Any:
        """Preview by a calibration of this very moment, and add what it promises."""
        for file in (self._cache / "calibration").glob("*.json"):
            file.unlink()
        for streams in CONCURRENCIES:
            preview = await self._preview(streams)
            name = "decode_tokens_per_s" if streams == 1 else "total_tokens_per_s"
            promises[streams].append(preview["speed"][name])
        return preview

    async def _preview(self, concurrency: int) -> Any:
        body = {
            "concurrency": concurrency,
            "prompt_tokens": _PROMPT_WORDS,
            "output_tokens": _OUTPUT_TOKENS,
        }
        url = f"{self._server.url}/v1/optimizations/preview"
        return (await get_json(self._session, url, body))["today"]

    async def _wait_for_quality(self) -> None:
        """Its process is of the lowest priority, but it does share the processor's caches."""
        for _ in range(int(_QUALITY_WAIT_S)):
            if (await self._preview(1))["quality"]["basis"] == "measured":
                return
            await asyncio.sleep(1.0)
        print(f"{self._setting}: quality is not measured yet", file=sys.stderr)

    def _fresh(self, count: int, words: int) -> list[str]:
        """Prompts that no cache knows."""
        first, self._num_prompts = self._num_prompts, self._num_prompts + count
        return [self._source.prompt(first + i, words) for i in range(count)]

    def _next_texts(self, count: int) -> list[str]:
        return [next(self._turns_of_texts) for _ in range(count)]

    async def _look_at_tokens(self, text: str) -> list[int]:
        """Where in the answer to a text each of its tokens ends, in characters."""
        body = {
            "model": self._model,
            "prompt": text,
            "max_tokens": _OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 0,
        }
        answer = await get_json(self._session, f"{self._server.url}/v1/completions", body)
        (choice,) = answer["choices"]
        return [*choice["logprobs"]["text_offset"][1:], len(choice["text"])]

    def _stream(self, text: str, outcome: Outcome) -> _Stream:
        if outcome.error is not None:
            raise RuntimeError(f"a request failed: {outcome.error}")
        ends = self._token_ends[text]
        if len(outcome.text) != ends[-1]:
            raise RuntimeError("an answer differs from an earlier one to the same text")
        return _Stream(
            [outcome.sent_at_s + time_s for time_s in outcome.chunk_times_s],
            [bisect_right(ends, chars) for chars in itertools.accumulate(outcome.chunk_chars)],
        )

    async def _load(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = _OUTPUT_TOKENS,
        extra: dict[str, Any] | None = None,
    ) -> list[Outcome]:
        target = Target(
            url=f"{self._server.url}/v1",
            model=self._model,
            max_tokens=max_tokens,
            ignore_eos=True,
            extra=extra or {},
        )
        return list(
            await asyncio.gather(*(complete(self._session, target, text) for text in prompts))
        )


def _mean_promise(promises: Sequence[Any]) -> dict[str, float]:
    """What was promised for the loads between these, and how far neighbours are apart at most."""
    pairs = list(itertools.pairwise(promises))

    def mean(name: str) -> float:
        return fmean(side[name] for pair in pairs for side in pair)

    drift = max(abs(after["value"] / before["value"] - 1) for before, after in pairs)
    return {"promised": mean("value"), "low": mean("low"), "high": mean("high"), "drift": drift}


def _decode_rate(rounds: Sequence[Sequence[_Stream]]) -> float:
    """Tokens per second of all streams while every one of them decodes, over all rounds."""
    tokens = seconds = 0.0
    for streams in rounds:
        begin = max(stream.times_s[0] for stream in streams)
        end = min(stream.times_s[-1] for stream in streams)
        tokens += sum(stream.received(end) - stream.received(begin) for stream in streams)
        seconds += end - begin
    return tokens / seconds


async def measure_previews(settings: Sequence[Setting]) -> list[Case]:
    """Previews and reality of each setting."""
    cases: list[Case] = []
    for setting in settings:
        with _own_cache() as cache:
            environment = {"FULCRUM_CACHE": str(cache)}
            with LocalServer(setting.options(), environment=environment) as server:
                async with aiohttp.ClientSession() as session:
                    cases += await _Bench(session, server, setting, cache).cases()
        print(preview_table(cases[-len(CONCURRENCIES) :]), file=sys.stderr, flush=True)
    return cases
