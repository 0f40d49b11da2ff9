"""Prometheus metrics of one app, in a registry of their own.

The engine client reports steps and events here; `GET /metrics` renders them. What the engine
counts itself is read from its last load at scrape time and costs nothing in between.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.speculation.report import SpeculationReport
from engine.types import EngineLoad, StepReport, TokenEvent
from server.device_metrics import DeviceCollector
from server.speculation_metrics import SpeculationCollector
from server.stream import Stream
from server.telemetry.poller import Poller

if TYPE_CHECKING:
    from server.gate import Gate

_SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    def __init__(self, model_name: str, load: Callable[[], EngineLoad]) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.registry.register(_LoadCollector(model_name, load))
        self._speculation = SpeculationCollector(model_name)
        self.registry.register(self._speculation)
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens received.")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self.rejected = self._counter(
            "requests_rejected", "Sequences refused or shed because of load or a fault."
        )
        self._decisions = Counter(
            "fulcrum_admission_decisions",
            "Sequences admitted, refused, shed or out of time, by reason.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self._decisions_by_reason: dict[str, Counter] = {}
        for reason in ("admitted", "queue_full", "ttft_too_late", "deadline_too_short", "shed"):
            self._count_of(reason)
        self._finished = Counter(
            "fulcrum_requests",
            "Sequences ended, by finish reason.",
            ("model_name", "finish_reason"),
            registry=self.registry,
        )
        # Each reason is there from the start, so that a rate over it is defined.
        self._finished_by_reason = {
            reason: self._finished.labels(model_name, reason)
            for reason in ("stop", "length", "abort", "error")
        }
        self._ttft = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self._itl = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a sequence.", _SECONDS
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From arrival to the end of the sequence.", _SECONDS
        )
        self._queue_time = self._histogram(
            "queue_time_seconds", "From arrival to the first step with the sequence.", _SECONDS
        )
        self._step_duration = self._histogram(
            "step_duration_seconds", "Wall time of an engine step.", _SECONDS
        )
        self._step_tokens = self._histogram(
            "step_tokens", "Tokens computed in an engine step.", _TOKENS
        )

    def register_telemetry(self, gate: "Gate", poller: Poller) -> None:
        self.registry.register(DeviceCollector(self._model_name, gate, poller))

    def take_speculation(self, report: SpeculationReport) -> None:
        """Keep what the engine says of speculation for the next rendering."""
        self._speculation.report = report

    def render(self) -> bytes:
        return generate_latest(self.registry)

    def observe_decision(self, reason: str, num_sequences: int) -> None:
        self._count_of(reason).inc(num_sequences)
        if reason not in ("admitted", "too_many_sequences", "deadline_expired"):
            self.rejected.inc(num_sequences)

    def _count_of(self, reason: str) -> Counter:
        """The counter of one reason: to look it up in its parent takes a lock and longer."""
        count = self._decisions_by_reason.get(reason)
        if count is None:
            count = self._decisions.labels(self._model_name, reason)
            self._decisions_by_reason[reason] = count
        return count

    def observe_step(self, report: StepReport) -> None:
        if report.num_step_tokens:
            self._step_duration.observe(report.step_s)
            self._step_tokens.observe(report.num_step_tokens)
        num_generated = sum(len(event.token_ids) for event in report.events)
        if num_generated:
            self.generated_tokens.inc(num_generated)

    def observe_event(self, stream: Stream, event: TokenEvent, now_s: float) -> None:
        if event.queued_s is not None:
            self._queue_time.observe(event.queued_s)
        num_tokens = len(event.token_ids)
        if num_tokens == 0:
            return
        if stream.last_token_s is None:
            self._ttft.observe(now_s - stream.submitted_s)
        else:
            self._itl.observe((now_s - stream.last_token_s) / num_tokens)
        stream.last_token_s = now_s

    def observe_end(self, finish_reason: str, duration_s: float) -> None:
        self._finished_by_reason[finish_reason].inc()
        self._duration.observe(duration_s)

    def _counter(self, name: str, help_text: str) -> Counter:
        counter = Counter(f"fulcrum_{name}", help_text, ("model_name",), registry=self.registry)
        return counter.labels(self._model_name)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(
            f"fulcrum_{name}", help_text, ("model_name",), registry=self.registry, buckets=buckets
        )
        return histogram.labels(self._model_name)


class _LoadCollector(Collector):
    """Turns the engine's last `EngineLoad` into metrics when a scrape asks."""

    def __init__(self, model_name: str, load: Callable[[], EngineLoad]) -> None:
        self._model_name = model_name
        self._load = load

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        num_blocks = load.num_total_blocks
        gauges = (
            ("requests_running", "Sequences that take part in steps.", load.num_running),
            ("requests_waiting", "Sequences that wait for a step.", load.num_waiting),
            (
                "kv_usage_ratio",
                "Share of KV blocks that sequences hold.",
                load.num_held_blocks / num_blocks if num_blocks else 0.0,
            ),
            ("kv_blocks", "KV blocks in all.", num_blocks),
            ("kv_blocks_free", "KV blocks that a sequence could get.", load.num_free_blocks),
            ("kv_blocks_held", "KV blocks that sequences hold.", load.num_held_blocks),
        )
        counters = (
            ("preemptions", "Sequences preempted for want of KV blocks.", load.num_preemptions),
            (
                "prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache.",
                load.num_prefix_queried_tokens,
            ),
            (
                "prefix_cache_hits",
                "Prompt tokens found in the prefix cache.",
                load.num_prefix_hit_tokens,
            ),
            ("engine_steps", "Engine steps.", load.num_steps),
        )
        for name, help_text, value in gauges:
            gauge = GaugeMetricFamily(f"fulcrum_{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, help_text, value in counters:
            counter = CounterMetricFamily(f"fulcrum_{name}", help_text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
