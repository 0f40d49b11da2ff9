"""What bench.kernels measures: the machine's limits and linear layers at the shapes of models.

The core times (LinearBench, MemoryBench, time_peak); this module chooses what is compared, runs it
in turns, and relates each figure to its limit. A case's floor is the longer of reading its weights
and doing its operations; both limits are measured in the same turns as the case, the first over
the very same weights, so that load from elsewhere weighs on all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import fulcrum_core
import msgspec

from bench.shapes import Layer
from engine.config import QUANTIZATIONS

FORMATS = tuple("bf16" if level == "none" else level for level in QUANTIZATIONS[1:])
USUAL_FORMATS = ("bf16", "int8", "int4")
PEAKS = ("bf16", "int8", "int4")
_FORMAT_PEAK = {name: "bf16" if name in ("bf16", "fp8") else name.split("-")[0] for name in FORMATS}

_MIB = 1 << 20
SMALL_SET_BYTES = 96 * _MIB  # about the weights of a small model in int4
_REPETITION_S = 0.003  # at least, so that waking up and reading the clock do not count
_MIN_REPETITIONS = 3
_L3_FOLDERS = "/sys/devices/system/cpu/cpu0/cache"


class Limits(msgspec.Struct, frozen=True):
    """What the machine can do with a number of threads; L3 is None where its size is unknown."""

    num_threads: int
    memory_gb_per_s: float
    small_set_gb_per_s: float
    l3_gb_per_s: float | None
    peak_gop_per_s: dict[str, float]  # by PEAKS


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A layer in a format, times T rows: its medians, and those of its limits beside it."""

    model: str
    layer: Layer
    format: str
    num_threads: int
    num_tokens: int
    num_repetitions: int
    weight_bytes: int
    operations: int
    time_s: float
    gb_per_s: float
    gop_per_s: float
    limit_gb_per_s: float
    limit_gop_per_s: float
    floor_s: float
    share: float  # of the limit: floor_s / time_s
    bound: str  # "memory" or "compute": which limit makes the floor


class _Timing(msgspec.Struct, frozen=True):
    num_threads: int
    num_tokens: int
    num_repetitions: int
    time_s: float
    bytes_per_s: float
    ops_per_s: float


class Settings(msgspec.Struct, frozen=True):
    """What to measure, and how long."""

    isa: str
    formats: Sequence[str]
    threads: Sequence[int]
    tokens: Sequence[int]
    set_bytes: int
    seconds_per_case: float


class _Variant:
    """One of the things measured in turns: `measure(calls)` gives seconds and an amount done."""

    def __init__(self, measure: Callable[[int], tuple[float, float]]) -> None:
        self._measure = measure
        self._num_calls = 0
        self.spent_s = 0.0
        self.rates: list[float] = []

    def repeat(self, repetition_s: float) -> None:
        if self._num_calls == 0:
            self._calibrate(repetition_s)
        began_s = time.perf_counter()
        seconds, amount = self._measure(self._num_calls)
        self.spent_s += time.perf_counter() - began_s
        self.rates.append(amount / seconds)

    def _calibrate(self, repetition_s: float) -> None:
        self._measure(1)  # warms up
        self._num_calls = 1
        # Doubling instead of a division: a lucky first call on a busy machine says too little.
        while self._measure(self._num_calls)[0] < repetition_s:
            self._num_calls *= 2

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def _run_in_turns(variants: Sequence[_Variant], seconds_per_case: float) -> None:
    def wants_more(variant: _Variant) -> bool:
        return variant.spent_s < seconds_per_case or len(variant.rates) < _MIN_REPETITIONS

    while pending := [variant for variant in variants if wants_more(variant)]:
        for variant in pending:
            variant.repeat(min(_REPETITION_S, seconds_per_case / 10))


def _peak(isa: str, kind: str, pool: fulcrum_core.ThreadPool) -> _Variant:
    return _Variant(lambda calls: fulcrum_core.time_peak(isa, kind, pool, 1000 * calls))


def l3_bytes() -> int | None:
    """Size of the last-level cache that core 0 sees, or None where the system does not tell."""
    for folder in Path(_L3_FOLDERS).glob("index*"):
        try:
            if (folder / "level").read_text().strip() == "3":
                return int((folder / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return None


def measure_limits(settings: Settings) -> list[Limits]:
    """Measure read bandwidth and peaks for each number of threads, all in turns."""
    pools = [fulcrum_core.ThreadPool(threads) for threads in settings.threads]
    l3 = l3_bytes()
    sets_bytes = [settings.set_bytes, min(SMALL_SET_BYTES, settings.set_bytes)]
    if l3 is not None:
        sets_bytes.append(l3 // 2)
    sets = [fulcrum_core.MemoryBench(settings.isa, size) for size in sets_bytes]

    def read(memory: fulcrum_core.MemoryBench, pool: fulcrum_core.ThreadPool) -> _Variant:
        return _Variant(
            lambda calls: (memory.time_read(pool, calls), float(calls * memory.num_bytes))
        )

    peaks = [{kind: _peak(settings.isa, kind, pool) for kind in PEAKS} for pool in pools]
    _run_in_turns([peak for kinds in peaks for peak in kinds.values()], settings.seconds_per_case)
    # Set by set, so that the smallest stays in the cache.
    reads = [[read(memory, pool) for pool in pools] for memory in sets]
    for variants in reads:
        _run_in_turns(variants, settings.seconds_per_case)
    return [
        Limits(
            pool.num_threads,
            reads[0][i].rate / 1e9,
            reads[1][i].rate / 1e9,
            reads[2][i].rate / 1e9 if l3 is not None else None,
            {kind: peak.rate / 1e9 for kind, peak in peaks[i].items()},
        )
        for i, pool in enumerate(pools)
    ]


def _num_matrices(layers: Sequence[Layer], layer: Layer, weight_format: str, s: Settings) -> int:
    """Copies of a layer that take turns: together the model's weights, at most set_bytes."""

    def packed_bytes(of: Layer) -> int:
        return fulcrum_core.packed_bytes(s.isa, weight_format, of.num_rows, of.num_cols)

    model_bytes = sum(other.count * packed_bytes(other) for other in layers)
    return max(1, round(min(model_bytes, s.set_bytes) / packed_bytes(layer)))


def _time_layer(
    linear: fulcrum_core.LinearBench,
    weight_bytes: int,
    weight_format: str,
    tokens: Sequence[int],
    settings: Settings,
) -> Iterator[_Timing]:
    def gemm(pool: fulcrum_core.ThreadPool, num_tokens: int) -> _Variant:
        return _Variant(lambda calls: (linear.time_gemm(pool, num_tokens, calls), float(calls)))

    def read(pool: fulcrum_core.ThreadPool) -> _Variant:
        return _Variant(lambda calls: (linear.time_read(pool, calls), float(calls * weight_bytes)))

    pools = [fulcrum_core.ThreadPool(threads) for threads in settings.threads]
    reads = [read(pool) for pool in pools]
    peaks = [_peak(settings.isa, _FORMAT_PEAK[weight_format], pool) for pool in pools]
    gemms = [[gemm(pool, num_tokens) for num_tokens in tokens] for pool in pools]
    everything = [*reads, *peaks, *(variant for row in gemms for variant in row)]
    _run_in_turns(everything, settings.seconds_per_case)
    for i, pool in enumerate(pools):
        for num_tokens, variant in zip(tokens, gemms[i], strict=True):
            yield _Timing(
                pool.num_threads,
                num_tokens,
                len(variant.rates),
                1 / variant.rate,
                reads[i].rate,
                peaks[i].rate,
            )


def measure_layer(
    model: str, layers: Sequence[Layer], layer: Layer, weight_format: str, settings: Settings
) -> list[Case]:
    """Measure one of a model's layers in a format for all numbers of threads and rows, in turns."""
    tokens = [num_tokens for num_tokens in settings.tokens if layer.measures(num_tokens)]
    if not tokens:
        return []
    isa, shape = settings.isa, (layer.num_rows, layer.num_cols)
    weight_bytes = fulcrum_core.packed_bytes(isa, weight_format, *shape)
    num_matrices = _num_matrices(layers, layer, weight_format, settings)
    linear = fulcrum_core.LinearBench(isa, weight_format, *shape, num_matrices, max(tokens))
    cases = []
    for timing in _time_layer(linear, weight_bytes, weight_format, tokens, settings):
        operations = 2 * timing.num_tokens * layer.num_rows * layer.num_cols
        read_s, compute_s = weight_bytes / timing.bytes_per_s, operations / timing.ops_per_s
        cases.append(
            Case(
                model=model,
                layer=layer,
                format=weight_format,
                num_threads=timing.num_threads,
                num_tokens=timing.num_tokens,
                num_repetitions=timing.num_repetitions,
                weight_bytes=weight_bytes,
                operations=operations,
                time_s=timing.time_s,
                gb_per_s=weight_bytes / timing.time_s / 1e9,
                gop_per_s=operations / timing.time_s / 1e9,
                limit_gb_per_s=timing.bytes_per_s / 1e9,
                limit_gop_per_s=timing.ops_per_s / 1e9,
                floor_s=max(read_s, compute_s),
                share=max(read_s, compute_s) / timing.time_s,
                bound="memory" if read_s > compute_s else "compute",
            )
        )
    return cases
