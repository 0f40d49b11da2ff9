"""Reads the sensors twice a second and keeps the latest samples: a thread for the host, another
for the GPU, whose driver may hang without making the host's samples old.

The event loop reads `latest` and never waits for a sensor. Where the device that decides is
silent, admission does without it.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from server.telemetry.gpu import Gpu
from server.telemetry.host import HostReader
from server.telemetry.samples import DeviceSample

logger = logging.getLogger("fulcrum")

# Whose sensors decide on admission. The model is computed on the CPU, so that "auto" is the host;
# a GPU beside it is read and shown.
TelemetryMode = Literal["auto", "host", "gpu", "off"]

INTERVAL_S = 0.5
STALE_S = 3.0  # older samples count as none
_JOIN_S = 2.0


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """The latest samples; `why_no_gpu` says what stands in the way of one."""

    host: DeviceSample | None = None
    gpu: DeviceSample | None = None
    why_no_gpu: str | None = None
    num_samples: int = 0  # of the device that decides
    host_cpu_s: float = 0.0  # that reading has cost so far
    gpu_cpu_s: float = 0.0

    @property
    def cpu_s(self) -> float:
        return self.host_cpu_s + self.gpu_cpu_s


class Poller:
    """`latest` is replaced whole at each reading. Start and stop it once."""

    def __init__(self, mode: TelemetryMode = "auto", interval_s: float = INTERVAL_S) -> None:
        self.latest = Readings()
        self._mode = mode
        self._interval_s = interval_s
        self._host = HostReader()
        self._gpu = Gpu()
        self._started_s = 0.0
        self._gpu_answered_s = 0.0
        self._lock = threading.Lock()  # of two threads that replace `latest`
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def source(self) -> str:
        """Whose sensors decide on admission: "host", "gpu" or "off"."""
        return "host" if self._mode == "auto" else self._mode

    def start(self) -> None:
        self._started_s = self._gpu_answered_s = time.monotonic()
        if self._mode == "off":
            return
        self._start_thread("telemetry", self._read_host)
        if self._mode != "host":
            self._start_thread("gpu telemetry", self._read_gpu, self._gpu.close)

    def stop(self) -> None:
        self._stopping.set()
        ends_s = time.monotonic() + _JOIN_S
        for thread in self._threads:
            # A driver that hangs is left behind.
            thread.join(max(0.0, ends_s - time.monotonic()))

    def fresh(self, now_s: float) -> list[DeviceSample]:
        """The samples that are not too old to be relied on."""
        samples = (self.latest.host, self.latest.gpu)
        return [one for one in samples if one is not None and now_s - one.taken_at_s <= STALE_S]

    def sample(self, now_s: float) -> DeviceSample | None:
        """The fresh sample of the device that decides, or None."""
        return next((one for one in self.fresh(now_s) if one.kind == self.source), None)

    def is_blind(self, now_s: float) -> bool:
        """Whether samples are missing that there should be."""
        if self._mode == "off" or now_s - self._started_s < STALE_S:
            return False
        return self.sample(now_s) is None

    def unavailable(self, now_s: float) -> dict[str, str]:
        """What of the deciding device cannot be sensed, and why; and a GPU that hangs."""
        sample = self.sample(now_s)
        missing = {} if sample is None else dict(sample.unavailable)
        if self.is_blind(now_s):
            why = self.latest.why_no_gpu if self._mode == "gpu" else None
            missing[self.source] = why or "no fresh sample"
        silent_s = now_s - self._gpu_answered_s
        if self._mode in ("auto", "gpu") and silent_s > STALE_S:
            missing["gpu"] = f"its driver has not answered for {silent_s:.0f} s"
        return missing

    def _start_thread(
        self, name: str, read: Callable[[], None], close: Callable[[], None] = lambda: None
    ) -> None:
        def run() -> None:
            told = ""
            while not self._stopping.is_set():
                try:
                    read()
                except Exception as error:
                    if repr(error) != told:  # twice a second would fill a disk
                        logger.exception("a reading of the sensors failed")
                    told = repr(error)
                self._stopping.wait(self._interval_s)
            close()

        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read_host(self) -> None:
        self._publish(host=self._host.read(), host_cpu_s=time.thread_time())

    def _read_gpu(self) -> None:
        gpu, why = self._gpu.read()
        self._gpu_answered_s = time.monotonic()
        self._publish(gpu=gpu, why_no_gpu=why, gpu_cpu_s=time.thread_time())

    def _publish(self, **changes: Any) -> None:
        with self._lock:
            before = self.latest
            num_samples = before.num_samples + (self.source in changes)
            self.latest = msgspec.structs.replace(before, num_samples=num_samples, **changes)
