"""Reads the host's sensors: memory and its limits, pressure, CPU quota, frequency, energy.

The poller's thread calls it. Everything comes from files of the kernel; one that is missing or
not for us to read is named in the sample and not asked for again.
"""

import errno
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from engine.machine import (
    available_memory_bytes,
    cpu_quota,
    total_memory_bytes,
)
from server.telemetry.samples import DeviceSample

T = TypeVar("T")

_MICRO, _NANO = 1e-6, 1e-9
_LIMITS_INTERVAL_S = 10.0  # those of control groups change rarely
# A machine that is short of something for a moment has its sensors still.
_PASSING_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR, errno.EAGAIN)


class HostReader:
    """`root` is where the kernel's files are found; tests give their own."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._proc = root / "proc"
        self._sys = root / "sys"
        self._unavailable: dict[str, str] = {}
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")
        self._last_busy: tuple[float, float] | None = None
        self._last_quota_s: tuple[Path, float, float] | None = None
        self._rapl_wraps_j = 0.0
        self._last_rapl_j: float | None = None
        self._read_limits_at_s = 0.0
        self._memory_total_bytes: int | None = None
        self._cpu_quota: tuple[float, Path] | None = None

    def read(self) -> DeviceSample:
        now_s = time.monotonic()
        if now_s >= self._read_limits_at_s:
            self._read_limits_at_s = now_s + _LIMITS_INTERVAL_S
            self._memory_total_bytes = self._ask(
                "total memory", lambda: total_memory_bytes(self._root)
            )
            self._cpu_quota = cpu_quota(self._root)
        available = self._ask("available memory", lambda: available_memory_bytes(self._root))
        total = self._memory_total_bytes
        own = self._ask("own memory", self._own_bytes)
        used = None if total is None or available is None else max(0, total - available)
        others = None if used is None or own is None else max(0, used - own)
        return DeviceSample(
            kind="host",
            name=platform.machine(),
            taken_at_s=now_s,
            memory_used_bytes=used,
            memory_total_bytes=total,
            memory_others_bytes=others,
            utilization=self._ask("CPU time", self._busy_share),
            clock_mhz=self._ask("CPU frequency", self._frequency_mhz),
            max_clock_mhz=self._ask("CPU frequency limit", self._max_frequency_mhz),
            temperature_c=self._ask("CPU temperature", self._temperature_c),
            energy_j=self._ask("RAPL energy", self._energy_j),
            cpu_quota_cores=None if self._cpu_quota is None else self._cpu_quota[0],
            cpu_quota_throttled=self._ask("CPU quota", self._withheld_share),
            pressure=self._pressure(),
            unavailable=dict(self._unavailable),
        )

    def _ask(self, sensor: str, read: Callable[[], T | None]) -> T | None:
        if sensor in self._unavailable:
            return None
        try:
            return read()
        except PermissionError:
            self._unavailable[sensor] = "not permitted"
        except OSError as error:
            if error.errno in _PASSING_ERRORS:
                return None
            self._unavailable[sensor] = "not on this machine"
        except (ValueError, LookupError, StopIteration):
            self._unavailable[sensor] = "not on this machine"
        return None

    def _own_bytes(self) -> int:
        """Of this process; without pages of files, which count as available."""
        _, resident, shared, *_ = (self._proc / "self/statm").read_text().split()
        return (int(resident) - int(shared)) * self._page_bytes

    def _busy_share(self) -> float | None:
        fields = [
            int(field) for field in (self._proc / "stat").read_text().split("\n")[0].split()[1:9]
        ]
        total, idle = float(sum(fields)), float(fields[3] + fields[4])
        last, self._last_busy = self._last_busy, (total, idle)
        if last is None or total <= last[0]:
            return None
        return min(1.0, max(0.0, 1.0 - (idle - last[1]) / (total - last[0])))

    def _withheld_share(self) -> float | None:
        """Share of the CPU time which the control group wanted that its quota withheld.

        Both times are sums over CPUs, so that neither alone is a share of anything.
        """
        if self._cpu_quota is None:
            return None
        folder = self._cpu_quota[1]
        fields = dict(line.split() for line in (folder / "cpu.stat").read_text().splitlines())
        if "throttled_usec" in fields:
            withheld_s = int(fields["throttled_usec"]) * _MICRO
            used_s = int(fields["usage_usec"]) * _MICRO
        else:
            withheld_s = int(fields["throttled_time"]) * _NANO
            used_s = int((folder / "cpuacct.usage").read_text()) * _NANO
        last, self._last_quota_s = self._last_quota_s, (folder, used_s, withheld_s)
        if last is None or last[0] != folder:
            return None
        used_s, withheld_s = max(0.0, used_s - last[1]), max(0.0, withheld_s - last[2])
        return withheld_s / (used_s + withheld_s) if withheld_s else 0.0

    def _frequency_mhz(self) -> float:
        scaling = self._sys / "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq"
        if scaling.exists():
            return int(scaling.read_text()) / 1000
        # The first CPU's; on a machine of many the kernel takes long to write of all.
        with (self._proc / "cpuinfo").open() as file:
            return float(next(line.split(":")[1] for line in file if line.startswith("cpu MHz")))

    def _max_frequency_mhz(self) -> float:
        return (
            int((self._sys / "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) / 1000
        )

    def _temperature_c(self) -> float:
        zones = sorted((self._sys / "class/thermal").glob("thermal_zone*/temp"))
        return max(int(zone.read_text()) for zone in zones) / 1000

    def _energy_j(self) -> float:
        """Joules of the first package since the first reading, across the counter's wraps."""
        folder = self._sys / "class/powercap/intel-rapl:0"
        energy_j = int((folder / "energy_uj").read_text()) * _MICRO
        if self._last_rapl_j is not None and energy_j < self._last_rapl_j:
            self._rapl_wraps_j += int((folder / "max_energy_range_uj").read_text()) * _MICRO
        self._last_rapl_j = energy_j
        return self._rapl_wraps_j + energy_j

    def _pressure(self) -> dict[str, float]:
        """PSI of the last 10 s as shares of the time, the machine's own."""
        shares: dict[str, float] = {}
        for resource in ("cpu", "memory", "io"):
            read = partial(self._resource_pressure, resource)
            shares |= self._ask(f"{resource} pressure", read) or {}
        return shares

    def _resource_pressure(self, resource: str) -> dict[str, float]:
        shares = {}
        for line in (self._proc / "pressure" / resource).read_text().splitlines():
            kind, average, *_ = line.split()
            shares[f"{resource} {kind}"] = float(average.removeprefix("avg10=")) / 100
        return shares
