"""Prometheus metrics of speculation, from what the engine said of it before the last scrape."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.speculation.report import SpeculationReport

_BY_POSITION = (
    ("drafted_tokens", "Drafted tokens verified.", "drafted_by_position"),
    ("accepted_tokens", "Drafted tokens that were emitted.", "accepted_by_position"),
)
_GAUGES = (
    ("estimated_speedup", "Against no drafts, as the choices of late promised."),
    ("measured_speedup", "Against no drafts, by the times of recent steps."),
    ("tokens_per_step", "Tokens that a recent step emitted for a sequence."),
)


class SpeculationCollector(Collector):
    """Renders `report`; nothing before there is one."""

    def __init__(self, model_name: str) -> None:
        self.report: SpeculationReport | None = None
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        if self.report is None:
            return
        labels = ["model_name", "drafter"]
        drafts = CounterMetricFamily(
            "fulcrum_speculation_drafts", "Drafts verified.", labels=labels
        )
        for drafter in self.report.drafters:
            drafts.add_metric([self._model_name, drafter.name], drafter.num_drafts)
        yield drafts
        for name, help_text, field in _BY_POSITION:
            counter = CounterMetricFamily(
                f"fulcrum_speculation_{name}", help_text, labels=[*labels, "position"]
            )
            for drafter in self.report.drafters:
                for position, count in enumerate(getattr(drafter, field), 1):
                    counter.add_metric([self._model_name, drafter.name, str(position)], count)
            yield counter
        for name, help_text in _GAUGES:
            gauge = GaugeMetricFamily(
                f"fulcrum_speculation_{name}", help_text, labels=["model_name"]
            )
            gauge.add_metric([self._model_name], getattr(self.report, name))
            yield gauge
        yield _depths(self._model_name, self.report.depth_histogram)


def _depths(model_name: str, counts: Sequence[int]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        "fulcrum_speculation_verified_drafts",
        "Drafted tokens verified for a sequence in a step.",
        labels=["model_name"],
    )
    cumulative = list(accumulate(counts)) or [0]
    buckets = [(f"{depth}.0", float(count)) for depth, count in enumerate(cumulative)]
    total = sum(depth * count for depth, count in enumerate(counts))
    family.add_metric([model_name], [*buckets, ("+Inf", float(cumulative[-1]))], total)
    return family
