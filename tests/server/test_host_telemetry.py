"""The host's sensors from the kernel's files, whatever of them there is."""

import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from server.condition import Condition, next_condition
from server.telemetry.host import HostReader
from server.telemetry.poller import Poller

ZEROS = "0" * 9 + "\n"


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def plant_memory(root: Path, total_mib: int, available_mib: int, own_mib: int) -> None:
    write(
        root,
        "proc/meminfo",
        f"MemTotal: {total_mib << 10} kB\nMemAvailable: {available_mib << 10} kB\n",
    )
    pages_of_a_mib = (1 << 20) // os.sysconf("SC_PAGE_SIZE")
    own, shared = own_mib * pages_of_a_mib, 50
    write(root, "proc/self/statm", f"1000000 {own + shared} {shared} 1 0 300 0\n")


def test_every_file_is_read_in_its_units(tmp_path: Path) -> None:
    plant_memory(tmp_path, total_mib=1000, available_mib=300, own_mib=200)
    write(tmp_path, "proc/stat", "cpu  100 0 100 700 100 0 0 0 0 0\n")
    write(tmp_path, "proc/pressure/memory", "some avg10=12.50 avg60=0 total=1\nfull avg10=2.00 x\n")
    cpu = "sys/devices/system/cpu/cpu0/cpufreq/"
    write(tmp_path, cpu + "scaling_cur_freq", "2600000\n")
    write(tmp_path, cpu + "cpuinfo_max_freq", "3700000\n")
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "45000\n")
    write(tmp_path, "sys/class/thermal/thermal_zone1/temp", "61500\n")
    rapl = "sys/class/powercap/intel-rapl:0/"
    write(tmp_path, rapl + "max_energy_range_uj", "1000000000\n")
    write(tmp_path, rapl + "energy_uj", "999000000\n")
    reader = HostReader(tmp_path)
    first = reader.read()
    memory = (first.memory_total_bytes, first.memory_used_bytes, first.memory_others_bytes)
    assert memory == (1000 << 20, 700 << 20, 500 << 20)
    assert (first.clock_mhz, first.max_clock_mhz, first.temperature_c) == (2600, 3700, 61.5)
    assert first.pressure == {"memory some": 0.125, "memory full": 0.02}
    assert first.energy_j == 999.0
    assert set(first.unavailable) == {"cpu pressure", "io pressure"}
    assert (first.cpu_quota_cores, first.cpu_quota_throttled) == (None, None)
    write(tmp_path, "proc/stat", "cpu  175 0 100 720 105 0 0 0 0 0\n")
    write(tmp_path, rapl + "energy_uj", "2000000\n")
    second = reader.read()
    assert second.utilization == 0.75
    assert second.energy_j == 1002.0  # the counter went around once


def test_a_file_that_makes_no_sense_costs_its_sensor_alone(tmp_path: Path) -> None:
    plant_memory(tmp_path, total_mib=1000, available_mib=300, own_mib=200)
    write(tmp_path, "proc/pressure/memory", "what\n")
    write(tmp_path, "proc/pressure/cpu", "some avg10=50.00 avg60=0 total=1\n")
    write(tmp_path, "proc/stat", "cpu\n")
    sample = HostReader(tmp_path).read()
    assert sample.memory_total_bytes == 1000 << 20
    assert sample.pressure == {"cpu some": 0.5}
    assert {"memory pressure", "CPU time"} <= set(sample.unavailable)


def test_a_reading_that_keeps_failing_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self: HostReader) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(HostReader, "read", fail)
    poller = Poller("host", interval_s=0.01)
    poller.start()
    time.sleep(0.2)
    poller.stop()
    assert len([record for record in caplog.records if "reading" in record.message]) == 1


def test_what_is_not_there_is_named_and_not_asked_again(tmp_path: Path) -> None:
    reader = HostReader(tmp_path)
    sample = reader.read()
    missing = {"CPU frequency", "CPU temperature", "RAPL energy", "memory pressure", "CPU time"}
    assert missing | {"total memory", "available memory"} <= set(sample.unavailable)
    assert sample.memory_total_bytes is None
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "45000\n")
    assert reader.read().temperature_c is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_the_server_fills_is_not_taken_by_others(
    tmp_path: Path, version: int
) -> None:
    """Limit 1000 MiB, of which 40 are left once page cache is given back."""
    plant_memory(tmp_path, total_mib=64_000, available_mib=60_000, own_mib=950)
    if version == 2:
        write(tmp_path, "proc/self/cgroup", "0::/box\n")
        group, limit, used, prefix = "sys/fs/cgroup/box/", "memory.max", "memory.current", ""
    else:
        write(tmp_path, "proc/self/cgroup", "3:memory:/box\n1:name=systemd:/x\n")
        group, prefix = "sys/fs/cgroup/memory/box/", "total_"
        limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    write(tmp_path, group + limit, str(1000 << 20))
    write(tmp_path, group + used, str(990 << 20))
    cache = f"{prefix}inactive_file {20 << 20}\n{prefix}active_file {10 << 20}\n"
    write(tmp_path, group + "memory.stat", "inactive_file 5\n" * (version == 1) + cache)
    sample = HostReader(tmp_path).read()
    assert (sample.memory_total_bytes, sample.memory_free_bytes) == (1000 << 20, 40 << 20)
    assert sample.memory_others_bytes == 10 << 20
    tight = msgspec.structs.replace(sample, memory_used_bytes=995 << 20)
    assert next_condition(Condition(), tight, 0.0).status == "ok"
    taken = msgspec.structs.replace(tight, memory_others_bytes=500 << 20)
    assert next_condition(Condition(), taken, 0.0).status == "derated"


@pytest.mark.parametrize("version", [1, 2])
def test_a_quota_is_told_by_the_share_of_the_wanted_time_that_it_withholds(
    tmp_path: Path, version: int
) -> None:
    """2 cores, set for the group above ours, whose own file tells of no throttling."""

    def plant(used_s: int, withheld_s: int) -> None:
        if version == 2:
            text = f"usage_usec {used_s * 10**6}\nnr_throttled 7\nthrottled_usec {{}}\n"
            write(tmp_path, "sys/fs/cgroup/box/cpu.stat", text.format(withheld_s * 10**6))
        else:
            write(tmp_path, top + "cpu.stat", f"nr_throttled 7\nthrottled_time {withheld_s}{ZEROS}")
            write(tmp_path, top + "cpuacct.usage", f"{used_s}{ZEROS}")

    if version == 2:
        write(tmp_path, "proc/self/cgroup", "0::/box/inner\n")
        write(tmp_path, "sys/fs/cgroup/box/cpu.max", "200000 100000\n")
        write(tmp_path, "sys/fs/cgroup/box/inner/cpu.max", "max 100000\n")
        write(tmp_path, "sys/fs/cgroup/box/inner/cpu.stat", "usage_usec 0\nthrottled_usec 0\n")
    else:
        top = "sys/fs/cgroup/cpu,cpuacct/box/"
        write(tmp_path, "proc/self/cgroup", "4:cpu,cpuacct:/box/inner\n")
        write(tmp_path, top + "cpu.cfs_quota_us", "200000\n")
        write(tmp_path, top + "cpu.cfs_period_us", "100000\n")
        write(tmp_path, top + "inner/cpu.cfs_quota_us", "-1\n")
    plant(100, 10)
    reader = HostReader(tmp_path)
    first = reader.read()
    assert (first.cpu_quota_cores, first.cpu_quota_throttled) == (2.0, None)
    # 8 threads wanted 8 s of CPU time in 1 s and had 2: the 6 s are those of 8 run queues together.
    plant(102, 16)
    assert reader.read().cpu_quota_throttled == pytest.approx(0.75)
    # Full use of the quota is what it is for.
    plant(104, 16)
    assert reader.read().cpu_quota_throttled == 0.0
    plant(104, 16)
    assert reader.read().cpu_quota_throttled == 0.0


def test_this_machine_is_read_and_costs_little() -> None:
    poller = Poller("host", interval_s=0.02)
    poller.start()
    time.sleep(1.0)
    poller.stop()
    readings = poller.latest
    assert readings.host is not None
    assert 0 < (readings.host.memory_used_bytes or 0) < (readings.host.memory_total_bytes or 0)
    assert readings.num_samples > 10
    # Twice a second, this is the share of a core; half a percent is the limit.
    assert 2 * readings.cpu_s / readings.num_samples < 0.005
    assert not [thread for thread in threading.enumerate() if thread.name == "telemetry"]
