"""Previews held against reality, a server of its own for each setting: used by `bench.control`.

Memory is what the process has in fact, its whole KV cache written to, before anything else was
done in it. Speed is what a client counts, and the promise is made by a calibration right before:
where one right after says that the machine's speed has changed meanwhile, the setting is measured
again, since then nobody could have kept the promise.
"""

import asyncio
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from bench.client import Outcome, Target, complete
from bench.http_json import get_json
from bench.layout import lay_out
from bench.local_server import LocalServer
from bench.prompts import PromptSource
from engine.checkpoint.cache import cache_folder

CONCURRENCIES = (1, 8)
_MIB = 1 << 20
_PROMPT_WORDS = 100
_LONG_PROMPT_WORDS = 1000
_OUTPUT_TOKENS = 128
_ROUNDS = 4
_MAX_DRIFT = 0.08  # of the calibrated speed between before and after
_ATTEMPTS = 4
_QUALITY_WAIT_S = 300.0


class Setting(msgspec.Struct, frozen=True):
    """What a server is started with."""

    model: str
    quantization: str
    kv_dtype: str
    speculation: str

    def options(self) -> list[str]:
        pairs = {
            "--model": self.model,
            "--quantization": self.quantization,
            "--kv-dtype": self.kv_dtype,
            "--speculation": self.speculation,
            "--kv-memory": "64MiB",  # small enough to be written to in a few seconds
            "--max-model-len": "2048",
            "--max-sequences": "8",  # all of their state is written to as well
        }
        return [part for pair in pairs.items() for part in pair]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One setting at one concurrency, promised and measured."""

    setting: Setting
    concurrency: int
    promised: float  # tokens per second of all streams
    low: float
    high: float
    measured: float
    drift: float  # of the promise, made again after the measurement
    attempts: int
    basis: str  # of the drafts' acceptance
    planned_mib: float
    resident_mib: float  # of the process, not backed by files
    components_mib: dict[str, tuple[float, float]]  # planned and allocated

    @property
    def held(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def memory_error(self) -> float:
        return self.resident_mib / self.planned_mib - 1

    @property
    def worst_component(self) -> float:
        """Largest error of a component that the core itself counts."""
        return max(
            (abs(real / planned - 1) for planned, real in self.components_mib.values() if planned),
            default=0.0,
        )


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


class _Bench:
    """One server with one setting."""

    def __init__(
        self, session: aiohttp.ClientSession, server: LocalServer, setting: Setting, cache: Path
    ) -> None:
        self._session = session
        self._server = server
        self._setting = setting
        self._cache = cache
        self._num_prompts = 0
        self._model = ""

    async def cases(self) -> list[Case]:
        """Fill the cache, look at the memory, then hold the promises of speed."""
        models = await get_json(self._session, f"{self._server.url}/v1/models")
        self._model = models["data"][0]["id"]
        # A long prompt whose every token is scored fills the largest steps and all their rows.
        await self._load(1, _LONG_PROMPT_WORDS, {"echo": True, "logprobs": 1, "temperature": 1})
        for _ in range(3):
            await self._load(max(CONCURRENCIES))
        resident_mib = self._server.anonymous_bytes / _MIB
        overview = await get_json(self._session, f"{self._server.url}/v1/optimizations")
        allocated = overview["today"]["memory"]
        await self._wait_for_quality()
        cases = []
        for concurrency in CONCURRENCIES:
            attempts = 0
            drift = math.inf
            while abs(drift) > _MAX_DRIFT and attempts < _ATTEMPTS:
                attempts += 1
                preview, promise = await self._promise(concurrency)
                rate = _decode_rate([await self._load(concurrency) for _ in range(_ROUNDS)])
                _, again = await self._promise(concurrency)
                drift = again["value"] / promise["value"] - 1
            planned = preview["memory"]["components"]
            cases.append(
                Case(
                    setting=self._setting,
                    concurrency=concurrency,
                    promised=promise["value"],
                    low=promise["low"],
                    high=promise["high"],
                    measured=rate,
                    drift=drift,
                    attempts=attempts,
                    basis=preview["speed"]["speculation"],
                    planned_mib=preview["memory"]["total_bytes"] / _MIB,
                    resident_mib=resident_mib,
                    components_mib={
                        name: (planned[name] / _MIB, size / _MIB)
                        for name, size in allocated.items()
                        if name != "runtime"
                    },
                )
            )
        return cases

    async def _promise(self, concurrency: int) -> tuple[Any, Any]:
        """Preview by a calibration of this very moment."""
        for file in (self._cache / "calibration").glob("*.json"):
            file.unlink()
        preview = await self._preview(concurrency)
        name = "decode_tokens_per_s" if concurrency == 1 else "total_tokens_per_s"
        return preview, preview["speed"][name]

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

    async def _load(
        self, concurrency: int, words: int = _PROMPT_WORDS, extra: dict[str, Any] | None = None
    ) -> list[Outcome]:
        target = Target(
            url=f"{self._server.url}/v1",
            model=self._model,
            max_tokens=_OUTPUT_TOKENS,
            ignore_eos=True,
            extra=extra or {},
        )
        source = PromptSource(None, seed=1)
        first, self._num_prompts = self._num_prompts, self._num_prompts + concurrency
        prompts = [source.prompt(first + i, words) for i in range(concurrency)]
        return list(
            await asyncio.gather(*(complete(self._session, target, text) for text in prompts))
        )


def _decode_rate(rounds: Sequence[Sequence[Outcome]]) -> float:
    """Tokens per second of all streams while every one of them decodes, over all rounds."""
    tokens = seconds = 0.0
    for outcomes in rounds:
        bad = [outcome.error for outcome in outcomes if outcome.error is not None]
        if bad:
            raise RuntimeError(f"a request failed: {bad[0]}")
        begin = max(o.sent_at_s + o.chunk_times_s[0] for o in outcomes)
        end = min(o.sent_at_s + o.chunk_times_s[-1] for o in outcomes)
        for outcome in outcomes:
            # A chunk holds several tokens where drafts were accepted.
            chunks = [t for t in outcome.chunk_times_s if begin < outcome.sent_at_s + t <= end]
            tokens += len(chunks) * outcome.output_tokens / len(outcome.chunk_times_s)
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


def preview_table(cases: Sequence[Case]) -> str:
    """A line for each case, and how often the promises held."""
    head = ("model", "weights", "KV", "drafts", "streams", "promised tok/s", "interval", "measured")
    rows = [(*head, "held", "drift", "tries", "planned MiB", "resident", "components")]
    for case in cases:
        setting = case.setting
        off = case.measured / case.promised - 1
        rows.append(
            (
                setting.model,
                "bf16" if setting.quantization == "none" else setting.quantization,
                setting.kv_dtype,
                setting.speculation,
                str(case.concurrency),
                f"{case.promised:.0f}",
                f"{case.low:.0f} to {case.high:.0f}",
                f"{case.measured:.0f} ({off:+.0%})",
                "yes" if case.held else "no",
                f"{case.drift:+.0%}",
                str(case.attempts),
                f"{case.planned_mib:.1f}",
                f"{case.memory_error:+.1%}",
                f"{case.worst_component:.1%}",
            )
        )
    num_held = sum(case.held for case in cases)
    worst = max(abs(case.memory_error) for case in cases)
    widest = max(max(c.high / c.promised - 1, 1 - c.low / c.promised) for c in cases)
    return (
        f"{lay_out(rows)}\n{num_held} of {len(cases)} intervals held, at most +-{widest:.0%} wide; "
        f"memory within {worst:.1%}"
    )
