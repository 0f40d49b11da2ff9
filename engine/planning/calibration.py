"""How long a step takes on this machine: micro-benchmarks of the engine over made-up weights.

Preview and apply ask for the calibration of a plan. It takes at most about five seconds, once for
each model, formats, KV dtype and machine, and is kept in the cache folder.
"""

import hashlib
import os
import statistics
import threading
import time
from pathlib import Path

import fulcrum_core
import msgspec
import numpy as np

from engine.checkpoint.cache import cache_folder
from engine.ledger import DeploymentPlan
from engine.loop import Engine
from engine.models.spec import ModelSpec
from engine.planning.synthetic import synthetic_core
from engine.runner import EngineSettings
from engine.types import SamplingParams, StepReport, Submit

BUDGET_S = 4.7  # what was begun by then may take a little longer
_VERSION = 4  # of what is measured and kept
_DECODE_WIDTHS = (1, 8, 2, 32, 16, 4, 64)  # the most telling first, for when time runs out
_DECODE_STEPS = {1: 12, 2: 8, 4: 8, 8: 8, 16: 5, 32: 4, 64: 3}
SHORT_PROMPT = 2  # tokens; as many sequences as a width has are one step
LONG_PROMPT = 384  # one chunk of 256 and one of 128
_LONG_STEPS = 20  # of decoding behind it
_SHORT_CHUNK, _STEP_TOKENS = 128, 256
_REPEATED_WIDTHS = (1, 8, 2, 4, 16)
_MAX_TURNS = 8
_PYTHON_TURNS = 20
_MAX_VALUES = 200e6  # of the made-up model's matrices: what can be computed in time


class Timing(msgspec.Struct, frozen=True):
    """Median seconds of a step, and half the range of its middle half as a share of it."""

    seconds: float
    spread: float


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Steps of one model in one set of formats on one machine."""

    decode: dict[int, Timing]  # by sequences that advance by one token each
    prefill: dict[int, Timing]  # by tokens of a chunk without context
    context_s_per_token: float  # of a decoding sequence, for each token that it sees
    prefill_context_s: float  # for each pair of a new token and a token before its chunk
    python_s: float  # of a fixed piece of Python: what the event loop's work is reckoned in
    load_average: float  # of the machine when it was measured
    seconds: float  # that it took
    at_s: float = 0.0  # Unix time

    def at_pace(self, ratio: float) -> "Calibration":
        """With every time multiplied, as on a machine that is slower by as much."""

        def slowed(timings: dict[int, Timing]) -> dict[int, Timing]:
            return {n: Timing(one.seconds * ratio, one.spread) for n, one in timings.items()}

        return msgspec.structs.replace(
            self,
            decode=slowed(self.decode),
            prefill=slowed(self.prefill),
            context_s_per_token=self.context_s_per_token * ratio,
            prefill_context_s=self.prefill_context_s * ratio,
            python_s=self.python_s * ratio,
        )


def calibration_key(spec: ModelSpec, plan: DeploymentPlan, isa: str, num_threads: int) -> str:
    """Name what was measured: machine, shapes, formats, KV dtype."""
    formats = [(i.slot.slot, i.slot.layer, i.format) for i in plan.weights.tensors]
    parts = (_VERSION, hardware(), isa, num_threads, spec, formats, plan.context.kv_dtype)
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:24]


def hardware() -> tuple[str, int]:
    """The processor's name and how many of them this process may use."""
    name = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            name = line.split(":", 1)[1].strip()
            break
    return name, len(os.sched_getaffinity(0))


def known_calibration(key: str) -> Calibration | None:
    """What the cache folder has of it, unless the machine was busy then and is not any more."""
    try:
        kept = msgspec.json.decode(_path(key).read_bytes(), type=Calibration)
    except (OSError, msgspec.DecodeError):
        return None
    was_busy = kept.load_average > len(os.sched_getaffinity(0))
    return None if was_busy and os.getloadavg()[0] < kept.load_average / 2 else kept


def calibrate(
    spec: ModelSpec, plan: DeploymentPlan, isa: str, num_threads: int, *, keep: bool = True
) -> Calibration:
    """Measure, and keep the result unless the machine is known to be busy."""
    began_s = time.monotonic()
    num_layers = _layers_in_time(spec, plan)
    core = synthetic_core(
        spec,
        plan.weights,
        isa,
        num_threads,
        num_layers=num_layers,
        num_kv_blocks=2048 // fulcrum_core.BLOCK_SIZE + 64 * 4,
        kv_dtype=plan.context.kv_dtype,
    )
    bench = _StepBench(core, spec.vocab_size)
    try:
        missing = _MissingLayers(bench, spec.num_layers / num_layers - 1.0)
        result = _measure(bench, missing, began_s + BUDGET_S)
    finally:
        bench.stop()
    result = msgspec.structs.replace(result, seconds=time.monotonic() - began_s)
    if keep:
        path = _path(calibration_key(spec, plan, isa, num_threads))
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_bytes(msgspec.json.encode(result))
        scratch.replace(path)
    return result


class _StepBench:
    """An engine over a core, whose steps are timed by its own reports."""

    def __init__(self, core: fulcrum_core.Model, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._random = np.random.default_rng(2)
        self._next_id = 0
        self._reports: list[StepReport] = []
        self._num_open = 0
        self._done = threading.Event()
        settings = EngineSettings(
            max_model_len=1024,
            num_kv_blocks=2048 // fulcrum_core.BLOCK_SIZE + 64 * 4,
            eos_token_ids=(),
            max_sequences=64,
            max_step_tokens=_STEP_TOKENS,
        )
        self._engine = Engine(core, settings, self._on_report)
        self._engine.start()

    def run(self, num_sequences: int, prompt_tokens: int, max_tokens: int) -> list[StepReport]:
        """Compute sequences of random prompts together; the reports of their steps."""
        self._reports = []
        self._num_open = num_sequences
        self._done.clear()
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        messages = []
        for _ in range(num_sequences):
            self._next_id += 1
            prompt = self._random.integers(0, self._vocab_size, prompt_tokens)
            ids = tuple(prompt.tolist())
            messages.append(Submit(self._next_id, ids, params, time.monotonic()))
        # In one go: the first of them must not end before the last has begun.
        for message in messages:
            self._engine.submit(message)
        if not self._done.wait(60):
            raise TimeoutError("the calibration's steps do not end")
        return self._reports

    def layers_s(self, num_tokens: int) -> float:
        """Seconds of a step of so many tokens without logits."""
        seconds = self._engine.time_step(num_tokens, num_rows=0).result(60)
        assert seconds is not None, "all blocks are free between two runs"
        return seconds

    def stop(self) -> None:
        self._engine.stop(0.0)

    def _on_report(self, report: StepReport) -> None:
        self._reports.append(report)
        self._num_open -= sum(event.finish_reason is not None for event in report.events)
        if self._num_open == 0:
            self._done.set()


class _MissingLayers:
    """What the layers take that a cut core lacks.

    They cannot be told from the whole time: a value of a layer's small matrices takes longer than
    one of a vocabulary's large one.
    """

    def __init__(self, bench: _StepBench, share: float) -> None:
        """`share`: of the layers that are there."""
        self.share = share
        self._bench = bench
        self._times_s: dict[int, list[float]] = {}

    def measure(self, num_tokens: int) -> None:
        if self.share:
            self._times_s.setdefault(num_tokens, []).append(self._bench.layers_s(num_tokens))

    def seconds(self, num_tokens: int) -> float:
        times_s = self._times_s.get(num_tokens)
        return self.share * statistics.median(times_s) if times_s else 0.0


def _measure(bench: _StepBench, missing: _MissingLayers, deadline_s: float) -> Calibration:
    """Go through all sizes, then through the narrow ones again while there is time.

    The machine's speed wavers: turns taken apart say more than as many steps in a row.
    """
    bench.run(1, SHORT_PROMPT, 4)  # warms up
    steps: dict[int, list[StepReport]] = {}
    took_s: dict[int, float] = {}

    def run(width: int) -> list[StepReport]:
        began_s = time.monotonic()
        likely_s = took_s.get(width) or max(
            (took_s[known] * max(1.0, width / known) for known in took_s), default=0.0
        )
        if began_s + likely_s > deadline_s and len(steps) >= 2:
            return []
        reports = bench.run(width, SHORT_PROMPT, _DECODE_STEPS[width] + 1)
        missing.measure(width)
        steps[width] = steps.get(width, []) + reports
        took_s[width] = time.monotonic() - began_s
        return reports

    run(8)
    # What context adds is small: it is compared with steps right before and after.
    short = run(1)
    long = bench.run(1, LONG_PROMPT, _LONG_STEPS)
    short += run(1)
    chunk = bench.run(1, _SHORT_CHUNK, 1)
    for size in (_SHORT_CHUNK, _STEP_TOKENS):
        missing.measure(size)
    for width in _DECODE_WIDTHS:
        if width not in steps:
            run(width)
    for _ in range(_MAX_TURNS):
        for width in _REPEATED_WIDTHS:
            run(width)
    context_s = _timing(long, 1).seconds - _timing(short, 1).seconds
    second = LONG_PROMPT - _STEP_TOKENS  # as long as the short chunk, which had no context
    extra_s = _timing(long, second).seconds - _timing(chunk, _SHORT_CHUNK).seconds
    whole = 1.0 + missing.share
    return Calibration(
        decode={n: _timing(steps[n], n, missing.seconds(n)) for n in sorted(steps)},
        prefill={
            _SHORT_CHUNK: _timing(chunk, _SHORT_CHUNK, missing.seconds(_SHORT_CHUNK)),
            _STEP_TOKENS: _timing(long, _STEP_TOKENS, missing.seconds(_STEP_TOKENS)),
        },
        context_s_per_token=max(
            0.0, whole * context_s / (LONG_PROMPT + _LONG_STEPS / 2 - SHORT_PROMPT)
        ),
        prefill_context_s=max(0.0, whole * extra_s / (second * _STEP_TOKENS)),
        python_s=min(_python_s() for _ in range(_PYTHON_TURNS)),
        load_average=os.getloadavg()[0],
        seconds=0.0,
        at_s=time.time(),
    )


def _timing(reports: list[StepReport], num_tokens: int, missing_s: float = 0.0) -> Timing:
    """Of the steps of so many tokens; `missing_s` is what their layers lack."""
    times = sorted(r.step_s for r in reports if r.num_step_tokens == num_tokens)
    assert times, f"no step of {num_tokens} tokens"
    median = statistics.median(times)
    low, high = times[len(times) // 4], times[-1 - len(times) // 4]
    return Timing(median + missing_s, (high - low) / 2 / median)


def _python_s() -> float:
    """Seconds of work like the event loop's: small texts, and messages made of them."""
    began_s = time.perf_counter()
    for index in range(100):
        choice = {"index": 0, "delta": {"content": str(index)}}
        msgspec.json.encode({"id": "chatcmpl", "created": index, "choices": [choice]})
        f"{index:08d}".encode().decode().split("0")
    return time.perf_counter() - began_s


def _layers_in_time(spec: ModelSpec, plan: DeploymentPlan) -> int:
    """How many layers can be measured in time."""
    values = dict.fromkeys((False, True), 0)
    for item in plan.weights.tensors:
        if item.format is not None:
            values[item.slot.layer >= 0] += item.slot.shape[0] * item.slot.shape[1]
    room = max(0.0, _MAX_VALUES - values[False])
    return max(1, min(spec.num_layers, int(room / (values[True] / spec.num_layers))))


def _path(key: str) -> Path:
    return cache_folder() / "calibration" / f"{key}.json"
