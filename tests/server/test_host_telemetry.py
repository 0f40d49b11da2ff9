"""The host's sensors from the kernel's files, whatever of them there is."""

import threading
import time
from pathlib import Path

from server.telemetry.host import HostReader
from server.telemetry.poller import Poller


def write(root: Path, path: str, text: str) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_every_file_is_read_in_its_units(tmp_path: Path) -> None:
    write(tmp_path, "proc/self/statm", "1000 200 50 1 0 300 0\n")
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
    assert (first.clock_mhz, first.max_clock_mhz, first.temperature_c) == (2600, 3700, 61.5)
    assert first.pressure == {"memory some": 0.125, "memory full": 0.02}
    assert first.energy_j == 999.0
    assert set(first.unavailable) <= {"cpu pressure", "io pressure", "CPU quota"}
    write(tmp_path, "proc/stat", "cpu  175 0 100 720 105 0 0 0 0 0\n")
    write(tmp_path, rapl + "energy_uj", "2000000\n")
    second = reader.read()
    assert second.utilization == 0.75
    assert second.energy_j == 1002.0  # the counter went around once


def test_what_is_not_there_is_named_and_not_asked_again(tmp_path: Path) -> None:
    reader = HostReader(tmp_path)
    sample = reader.read()
    missing = {"CPU frequency", "CPU temperature", "RAPL energy", "memory pressure", "CPU time"}
    assert missing <= set(sample.unavailable)
    assert sample.memory_total_bytes
    write(tmp_path, "sys/class/thermal/thermal_zone0/temp", "45000\n")
    assert reader.read().temperature_c is None


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
