"""Prometheus metrics of the sensors and of what admission makes of them, read at scrape time."""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.telemetry.poller import Poller

if TYPE_CHECKING:
    from server.gate import Gate

_SENSORS = (
    ("memory_used_bytes", "Memory in use."),
    ("memory_total_bytes", "Memory in all, or the limit that holds."),
    ("memory_others_bytes", "Memory used by other processes."),
    ("utilization", "Share of the time in which something was computed."),
    ("clock_mhz", "Clock of the compute units."),
    ("max_clock_mhz", "Highest clock of the compute units."),
    ("temperature_c", "Temperature in degrees Celsius."),
    ("temperature_limit_c", "Temperature at which the device slows down."),
    ("power_w", "Power draw."),
    ("power_limit_w", "Power limit."),
    ("cpu_quota_throttled", "Share of the CPU time wanted that the quota withheld."),
)
_COUNTERS = (
    ("energy_j", "energy_joules", "Energy used."),
    ("num_ecc_uncorrected", "ecc_uncorrected_errors", "Memory errors that were not corrected."),
    ("num_ecc_corrected", "ecc_corrected_errors", "Memory errors that were corrected."),
)


class DeviceCollector(Collector):
    """The fresh samples, one label value per device; a sensor that is silent has no sample."""

    def __init__(self, model_name: str, gate: "Gate", poller: Poller) -> None:
        self._model_name = model_name
        self._gate = gate
        self._poller = poller

    def collect(self) -> Iterable[Metric]:
        samples = self._poller.fresh(time.monotonic())
        names = ["model_name", "device"]
        for field, help_text in _SENSORS:
            gauge = GaugeMetricFamily(f"fulcrum_device_{field}", help_text, labels=names)
            for sample in samples:
                value = getattr(sample, field)
                if value is not None:
                    gauge.add_metric([self._model_name, sample.kind], value)
            yield gauge
        for field, name, help_text in _COUNTERS:
            counter = CounterMetricFamily(f"fulcrum_device_{name}", help_text, labels=names)
            for sample in samples:
                value = getattr(sample, field)
                if value is not None:
                    counter.add_metric([self._model_name, sample.kind], value)
            yield counter
        pressure = GaugeMetricFamily(
            "fulcrum_device_pressure",
            "Share of the last 10 s in which tasks waited for the resource (PSI).",
            labels=["model_name", "resource", "share"],
        )
        for sample in samples:
            for key, value in sample.pressure.items():
                pressure.add_metric([self._model_name, *key.split()], value)
        yield pressure
        yield from self._admission()

    def _admission(self) -> Iterable[Metric]:
        gate = self._gate
        gauges = (
            ("device_factor", "Share of the limits that the device holds.", gate.condition.factor),
            (
                "promised_requests",
                "Refused requests that have a time to come again.",
                gate.num_promised,
            ),
            (
                "promises_kept_ratio",
                "Share of the refused requests that came again in time.",
                gate.kept_share,
            ),
            (
                "ttft_prediction_scale",
                "Observed over predicted time to first token.",
                gate.costs.costs.ttft_scale,
            ),
        )
        for name, help_text, value in gauges:
            gauge = GaugeMetricFamily(f"fulcrum_{name}", help_text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        readings = self._poller.latest
        for name, help_text, count in (
            ("telemetry_samples", "Readings of the sensors.", float(readings.num_samples)),
            ("telemetry_cpu_seconds", "CPU time that reading them took.", readings.cpu_s),
        ):
            counter = CounterMetricFamily(f"fulcrum_{name}", help_text, labels=["model_name"])
            counter.add_metric([self._model_name], count)
            yield counter
