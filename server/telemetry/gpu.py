"""The GPU as it comes and goes: opened when there is one, read, and looked for anew after a fault.

The poller's GPU thread alone calls it, since every call of the driver may hang.
"""

import os
import time

import msgspec

from server.telemetry.nvml import NoDevice, NvmlReader
from server.telemetry.samples import DeviceSample
from server.telemetry.xid import XidThread

# Between two attempts to find a device that is gone, or that never was there.
_REOPEN_S = 2.0
_LOOK_S = 30.0


class Gpu:
    def __init__(self) -> None:
        self._nvml: NvmlReader | None = None
        self._xids: XidThread | None = None
        self._reopen_at_s = 0.0
        self._why_absent = ""
        self._was_there = False

    def read(self) -> tuple[DeviceSample | None, str | None]:
        """A sample, and what stands in the way of a good one."""
        if self._nvml is None:
            if time.monotonic() >= self._reopen_at_s:
                self._open()
            if self._nvml is None:
                return self._absent()
        sample = self._nvml.read()
        if self._xids is not None and self._xids.hangs():
            missing = sample.unavailable | {"XID events": "the driver does not answer"}
            sample = msgspec.structs.replace(sample, unavailable=missing)
        if sample.fault is not None:
            # Handles of a lost device stay dead: look for it anew, as after a reset.
            self.close()
            self._reopen_at_s = time.monotonic() + _REOPEN_S
            self._why_absent = sample.fault
        return sample, None

    def close(self) -> None:
        """Give the driver back, unless a thread is still in one of its calls."""
        has_ended = True
        if self._xids is not None:
            has_ended = self._xids.stop()
            self._xids = None
        if self._nvml is not None:
            if has_ended:
                self._nvml.close()
            self._nvml = None

    def _open(self) -> None:
        self._reopen_at_s = time.monotonic() + (_REOPEN_S if self._was_there else _LOOK_S)
        try:
            self._nvml = NvmlReader(os.environ.get("CUDA_VISIBLE_DEVICES"))
        except NoDevice as absent:
            self._why_absent = str(absent)
            return
        self._was_there = True
        self._xids = XidThread(self._nvml)
        self._xids.start()

    def _absent(self) -> tuple[DeviceSample | None, str]:
        if not self._was_there:
            return None, self._why_absent
        now_s = time.monotonic()
        lost = DeviceSample(kind="gpu", name="NVIDIA device", taken_at_s=now_s, fault="lost")
        return lost, self._why_absent
