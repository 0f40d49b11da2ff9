"""What one reading of the sensors gave; made by `nvml.py` and `host.py`, read by everybody.

None means that the sensor is missing, refused or silent; `unavailable` says why.
"""

from typing import Literal

import msgspec

DeviceKind = Literal["gpu", "host"]


class Xid(msgspec.Struct, frozen=True):
    """An error that the NVIDIA driver reported."""

    code: int
    seen_at_s: float  # time.monotonic()


class DeviceSample(msgspec.Struct, frozen=True, kw_only=True):
    """One device at one time. A host has no ECC or XID, a GPU no pressure."""

    kind: DeviceKind
    name: str
    taken_at_s: float  # time.monotonic()
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None  # of a host the tightest limit of its control groups
    memory_others_bytes: int | None = None  # used by other processes
    utilization: float | None = None  # share of the time that something was computed
    clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    throttle_reasons: tuple[str, ...] = ()
    temperature_c: float | None = None
    temperature_limit_c: float | None = None  # where it slows down
    power_w: float | None = None
    power_limit_w: float | None = None
    energy_j: float | None = None  # since some time in the past
    num_ecc_uncorrected: int | None = None  # since the driver was loaded
    num_ecc_corrected: int | None = None
    xids: tuple[Xid, ...] = ()  # the latest ones, oldest first
    fault: str | None = None  # the device cannot be used: "lost", "reset required"
    cpu_quota_cores: float | None = None
    cpu_quota_throttled: float | None = None  # share of the CPU time wanted since the last sample
    pressure: dict[str, float] = {}  # PSI, share of the last 10 s: "memory full", "cpu some", ...
    unavailable: dict[str, str] = {}  # sensor → why it says nothing

    @property
    def memory_free_bytes(self) -> int | None:
        if self.memory_used_bytes is None or self.memory_total_bytes is None:
            return None
        return self.memory_total_bytes - self.memory_used_bytes
