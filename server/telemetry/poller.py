"""Reads the sensors twice a second on a thread of its own and keeps the latest samples.

The event loop reads `latest` and never waits for a sensor: a driver that hangs makes the samples
old, and admission then does without them.
"""

import logging
import os
import threading
import time
from typing import Literal

import msgspec

from server.telemetry.host import HostReader
from server.telemetry.nvml import NoDevice, NvmlReader
from server.telemetry.samples import DeviceSample
from server.telemetry.xid import XidThread

logger = logging.getLogger("fulcrum")

# Whose sensors decide on admission. The model is computed on the CPU, so that "auto" is the host;
# a GPU beside it is read and shown.
TelemetryMode = Literal["auto", "host", "gpu", "off"]

INTERVAL_S = 0.5
STALE_S = 3.0  # older samples count as none
_REOPEN_S = 2.0  # between two attempts to find a device that is gone


class Readings(msgspec.Struct, frozen=True, kw_only=True):
    """The latest samples; `why_no_gpu` says what stands in the way of one."""

    host: DeviceSample | None = None
    gpu: DeviceSample | None = None
    why_no_gpu: str | None = None
    num_samples: int = 0
    cpu_s: float = 0.0  # that reading has cost so far


class Poller:
    """`latest` is replaced whole at each reading. Start and stop it once."""

    def __init__(self, mode: TelemetryMode = "auto", interval_s: float = INTERVAL_S) -> None:
        self.latest = Readings()
        self._mode = mode
        self._interval_s = interval_s
        self._host = HostReader()
        self._nvml: NvmlReader | None = None
        self._xids: XidThread | None = None
        self._started_s = 0.0
        self._reopen_at_s = 0.0
        self._had_gpu = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)

    @property
    def source(self) -> str:
        """Whose sensors decide on admission: "host", "gpu" or "off"."""
        return "host" if self._mode == "auto" else self._mode

    def start(self) -> None:
        self._started_s = time.monotonic()
        if self._mode != "off":
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(2.0)  # a driver that hangs is left behind

    def sample(self, now_s: float) -> DeviceSample | None:
        """The fresh sample of the device that decides, or None."""
        sample = self.latest.gpu if self._mode == "gpu" else self.latest.host
        if self._mode == "off" or sample is None or now_s - sample.taken_at_s > STALE_S:
            return None
        return sample

    def is_blind(self, now_s: float) -> bool:
        """Whether samples are missing that there should be."""
        if self._mode == "off" or now_s - self._started_s < STALE_S:
            return False
        return self.sample(now_s) is None

    def unavailable(self, now_s: float) -> dict[str, str]:
        """What of the deciding device cannot be sensed, and why."""
        sample = self.sample(now_s)
        if sample is not None:
            return sample.unavailable
        if not self.is_blind(now_s):
            return {}
        why = self.latest.why_no_gpu if self._mode == "gpu" else None
        return {self.source: why or "no fresh sample"}

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._read()
            except Exception:
                logger.exception("a reading of the sensors failed")
            self._stopping.wait(self._interval_s)
        self._close_gpu()

    def _read(self) -> None:
        before = self.latest
        gpu, why = self._read_gpu()
        self.latest = Readings(
            host=self._host.read(),
            gpu=gpu,
            why_no_gpu=why,
            num_samples=before.num_samples + 1,
            cpu_s=time.thread_time(),
        )

    def _read_gpu(self) -> tuple[DeviceSample | None, str | None]:
        if self._mode == "host":
            return None, None
        if self._nvml is None:
            if time.monotonic() < self._reopen_at_s:
                return self.latest.gpu, self.latest.why_no_gpu
            self._reopen_at_s = time.monotonic() + _REOPEN_S
            try:
                self._nvml = NvmlReader(os.environ.get("CUDA_VISIBLE_DEVICES"))
            except NoDevice as absent:
                return self._absent(str(absent))
            self._had_gpu = True
            self._xids = XidThread(self._nvml)
            self._xids.start()
        sample = self._nvml.read()
        if sample.fault is not None:
            # Handles of a lost device stay dead: look for it anew, as after a reset.
            self._close_gpu()
            self._reopen_at_s = time.monotonic() + _REOPEN_S
        return sample, None

    def _absent(self, why: str) -> tuple[DeviceSample | None, str | None]:
        if not self._had_gpu:
            return None, why
        now_s = time.monotonic()
        return DeviceSample(kind="gpu", name="NVIDIA device", taken_at_s=now_s, fault="lost"), why

    def _close_gpu(self) -> None:
        if self._xids is not None:
            self._xids.stop()
            self._xids = None
        if self._nvml is not None:
            self._nvml.close()
            self._nvml = None
