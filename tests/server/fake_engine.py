"""A whole server without a model: toy tokenizer and template, and an engine that plays scripts.

The fake engine is a real thread with the real engine's messages, so that everything from the
HTTP request to the report's hand-over is the code that serves.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import cached_property
from itertools import cycle
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

from engine.speculation.costs import Costs
from engine.speculation.policy import SpeculationPolicy
from engine.speculation.profiles import DraftProfiles
from engine.speculation.report import SpeculationReport, report
from engine.tokenizer.errors import ChatTemplateError
from engine.types import EngineLoad, StepReport, Submit, TokenEvent, TokenLogprobs
from server.app import create_app
from server.connection import Site
from server.control import Optimizer
from server.http import CLIENT, Settings
from server.run import bind
from server.served import GenerationDefaults, ServedModel

MODEL = "toy"
BOS, EOS, USER, END = 256, 257, 258, 259
CONTROL = {BOS: "<s>", EOS: "</s>", USER: "<|user|>", END: "<|end|>"}
WORDS = ("Hello", " world", "STO", "P", "ab", "bc", "x" * 20_000)
WORD_IDS = {word: 260 + index for index, word in enumerate(WORDS)}
TEXT = "Hello wörld 🙂 "


class ToyTokenizer:
    """Ids 0 to 255 are bytes; then control tokens; then a few words that encode never uses."""

    vocab_size = 260 + len(WORDS)
    bos_token_id = BOS
    eos_token_ids = (EOS,)
    special_ids = frozenset(CONTROL)

    def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        assert not parse_special
        return [BOS] * add_bos + list(text.encode())

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return b"" if token_id in CONTROL else WORDS[token_id - 260].encode()

    def token_text(self, token_id: int) -> str:
        return CONTROL.get(token_id) or self.token_bytes(token_id).decode(errors="replace")

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        pieces = (
            self.token_text(i).encode()
            if i in CONTROL and not skip_special
            else self.token_bytes(i)
            for i in token_ids
        )
        return b"".join(pieces).decode(errors="replace")

    def detokenizer(self) -> "ToyDetokenizer":
        return ToyDetokenizer(self)


class ToyDetokenizer:
    def __init__(self, tokenizer: ToyTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""

    def push(self, token_id: int) -> str:
        self._pending += self._tokenizer.token_bytes(token_id)
        try:
            text = self._pending.decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                return self.flush()
            return ""
        self._pending = b""
        return text

    def flush(self) -> str:
        text, self._pending = self._pending.decode(errors="replace"), b""
        return text


class ToyTemplate:
    """One line a message; refuses what starts with a message of the assistant."""

    def encode(
        self, messages: list[dict[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = True
    ) -> list[int]:
        if messages[0]["role"] == "assistant":
            raise ChatTemplateError("the user must begin")
        ids = []
        for message in messages:
            ids += [USER, *f"{message['role']}: {message['content']}".encode(), END]
        return ids + ([USER] if add_generation_prompt else [])


def ids_of(text: str) -> list[int]:
    return list(text.encode())


class FakeEngine:
    """Plays `script(submit)` token by token; `hold()` keeps it from stepping, not from aborting."""

    def __init__(
        self,
        script: Callable[[Submit], Iterator[int]] | None = None,
        *,
        step_s: float = 0.0,
        max_sequences: int = 64,
    ) -> None:
        self.script = script or (lambda submit: cycle(ids_of(TEXT)))
        self.step_s = step_s
        self.submits: list[Submit] = []
        self.aborted: list[int] = []
        self.num_cached_tokens = 0
        self.step_costs: tuple[tuple[int, float], ...] | None = None  # told at the start
        self.fail_after: int | None = None  # tokens of a sequence, then an error
        self.heartbeat_at_s: float | None = None  # frozen, for a stale one
        self._max_sequences = max_sequences
        self._lock = threading.Condition()
        self._new: list[Submit] = []
        self._aborts: list[int] = []
        self._running: dict[int, tuple[Submit, Iterator[int], int]] = {}
        self._waiting: list[Submit] = []
        self._stopping = False
        self._dead = False
        self._held = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def attach(self, on_report: Callable[[StepReport], None]) -> "FakeEngine":
        self._on_report = on_report
        return self

    # The server's side

    def start(self) -> None:
        self._thread.start()

    def submit(self, message: Submit) -> None:
        with self._lock:
            self.submits.append(message)
            self._new.append(message)
            self._lock.notify()

    def abort(self, seq_id: int) -> None:
        with self._lock:
            self._aborts.append(seq_id)
            self._lock.notify()

    def stop(self, grace_s: float) -> None:
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()

    def heartbeat_age_s(self) -> float:
        return 0.0 if self.heartbeat_at_s is None else time.monotonic() - self.heartbeat_at_s

    def speculation(self) -> Future[SpeculationReport]:
        done: Future[SpeculationReport] = Future()
        done.set_result(report(SpeculationPolicy([], Costs(1, 1))))
        return done

    def draft_profiles(self) -> Future[DraftProfiles]:
        done: Future[DraftProfiles] = Future()
        done.set_result(SpeculationPolicy([], Costs(1, 1)).profiles())
        return done

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # The test's side

    def hold(self, held: bool = True) -> None:
        with self._lock:
            self._held = held
            self._lock.notify()

    def die(self) -> None:
        """End the thread without a word, as a crash would."""
        with self._lock:
            self._dead = True
            self._lock.notify()

    # The thread

    def _run(self) -> None:
        if self.step_costs is not None:
            self._on_report(StepReport((), EngineLoad(), step_costs=self.step_costs))
        while True:
            with self._lock:
                while not (self._new or self._aborts or self._stopping or self._dead) and (
                    self._held or not (self._running or self._waiting)
                ):
                    self._lock.wait()
                if self._dead:
                    return
                self._waiting += self._new
                aborts, self._new, self._aborts = self._aborts, [], []
                stopping = self._stopping
            events = self._abort(
                [*self._running, *(s.seq_id for s in self._waiting)] if stopping else aborts
            )
            if not stopping and not self._held:
                events += self._step()
            load = EngineLoad(
                num_running=len(self._running), num_waiting=len(self._waiting), num_total_blocks=8
            )
            step_s = max(0.001, self.step_s)
            num_tokens = max(1, len(events))
            self._on_report(
                StepReport(tuple(events), load, step_s, num_tokens, 0, num_tokens, num_tokens)
            )
            if stopping:
                return
            if self.step_s:
                time.sleep(self.step_s)

    def _abort(self, seq_ids: list[int]) -> list[TokenEvent]:
        events = []
        for seq_id in seq_ids:
            waited = [submit for submit in self._waiting if submit.seq_id == seq_id]
            if self._running.pop(seq_id, None) is not None or waited:
                self.aborted.append(seq_id)
                events.append(TokenEvent(seq_id, (), "abort"))
            self._waiting = [submit for submit in self._waiting if submit.seq_id != seq_id]
        return events

    def _step(self) -> list[TokenEvent]:
        while self._waiting and len(self._running) < self._max_sequences:
            submit = self._waiting.pop(0)
            self._running[submit.seq_id] = (submit, iter(self.script(submit)), 0)
        events = [self._advance(*entry) for entry in self._running.values()]
        for event in events:
            if event.finish_reason is not None:
                del self._running[event.seq_id]
        return events

    def _advance(self, submit: Submit, script: Iterator[int], num_tokens: int) -> TokenEvent:
        params = submit.params
        if self.fail_after is not None and num_tokens >= self.fail_after:
            return TokenEvent(submit.seq_id, (), "error", error="planted")
        token_id = next(script, EOS)
        reason = None
        if token_id == EOS and not params.ignore_eos:
            reason = "stop"
        elif num_tokens + 1 >= params.max_tokens:
            reason = "length"
        self._running[submit.seq_id] = (submit, script, num_tokens + 1)
        first = num_tokens == 0
        prompt_logprobs = None
        if first and params.num_prompt_logprobs is not None:
            prompt_logprobs = (
                None,
                *(entry(i, params.num_prompt_logprobs) for i in submit.prompt_ids[1:]),
            )
        return TokenEvent(
            submit.seq_id,
            (token_id,),
            reason,
            None if params.num_logprobs is None else (entry(token_id, params.num_logprobs),),
            prompt_logprobs,
            self.num_cached_tokens if first else 0,
            0.001 if first else None,
        )


def entry(token_id: int, num_alternatives: int) -> TokenLogprobs:
    top_ids = tuple((token_id + i) % ToyTokenizer.vocab_size for i in range(num_alternatives))
    return TokenLogprobs(token_id, -0.5, top_ids, tuple(-0.5 - i for i in range(len(top_ids))))


class Served:
    """A running server and its clients."""

    def __init__(
        self, app: web.Application, url: str, engine: FakeEngine, http: aiohttp.ClientSession
    ) -> None:
        self.app = app
        self.url = url
        self.engine = engine
        self.http = http

    @cached_property
    def openai(self) -> Any:
        import openai  # takes a second to load, which a server process should not wait for

        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        async with self.http.post(self.url + path, json=body, **options) as response:
            return response.status, await response.json()

    async def wait_idle(self, timeout_s: float = 2.0) -> None:
        """Wait until every place is free again: no sequence is left in the engine."""
        await wait_for(lambda: self.app[CLIENT].num_open == 0, timeout_s)


def toy_model(**changes: Any) -> ServedModel:
    fields: dict[str, Any] = {
        "name": MODEL,
        "created": 1,
        "tokenizer": ToyTokenizer(),
        "chat_template": ToyTemplate(),
        "max_model_len": 4096,
        "fingerprint": "fp_toy",
        "vocab_size": ToyTokenizer().vocab_size,
        "defaults": GenerationDefaults(),
    }
    return ServedModel(**(fields | changes))


@asynccontextmanager
async def serve(
    engine: FakeEngine | None = None,
    model: ServedModel | None = None,
    optimizer: Optimizer | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """A server on a free port; at the end every sequence must have been ended by the engine."""
    engine = engine or FakeEngine()
    app = create_app(model or toy_model(), Settings(**settings), engine.attach, optimizer)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    (bound,) = bind("127.0.0.1", 0)
    await Site(runner, bound).start()
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    try:
        async with aiohttp.ClientSession() as http:
            served = Served(app, url, engine, http)
            yield served
            if "openai" in vars(served):
                await served.openai.close()
            await served.wait_idle()
    finally:
        await runner.cleanup()


async def wait_for(condition: Callable[[], bool], timeout_s: float = 3.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine on the kind of loop that serves."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(coroutine)
