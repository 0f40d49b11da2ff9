"""The real nvidia-ml-py over a fake driver: every reading, every kind of trouble.

Each test runs a process of its own, since the binding keeps the library that it once loaded.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.fake_engine import MODEL
from tests.server.fake_nvml import GIB, SOURCE, FakeNvml

ROOT = Path(__file__).parents[2]
BODY = {"model": MODEL, "prompt": "hi", "max_tokens": 2}


def ask(nvml: FakeNvml, *arguments: str, **environment: str) -> Any:
    """The answer of a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.server.read_nvml", *arguments],
        cwd=ROOT,
        env=nvml.environment | environment,
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


def read(nvml: FakeNvml, seconds: float = 0.3, **environment: str) -> dict[str, Any]:
    """What a poller has read in the end."""
    answer: dict[str, Any] = ask(nvml, str(seconds), **environment)
    return answer


@contextmanager
def process(nvml: FakeNvml, telemetry: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A fake server and its address."""
    command = [sys.executable, "-m", "tests.server.fake_server", "1", "text", telemetry]
    with subprocess.Popen(
        command, cwd=ROOT, env=nvml.environment, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            yield running, running.stdout.readline().strip()
        finally:
            running.kill()


@contextmanager
def server(nvml: FakeNvml) -> Iterator[str]:
    """The address of a fake server whose admission heeds the GPU."""
    with process(nvml, "gpu") as (_, address):
        yield address


def wait_health(address: str, condition: Callable[[int, dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until the health is as the condition has it; fail after a few seconds."""
    deadline_s = time.monotonic() + 8
    while True:
        response = httpx.get(f"{address}/health")
        health: dict[str, Any] = response.json()
        if condition(response.status_code, health):
            return health
        assert time.monotonic() < deadline_s, health
        time.sleep(0.05)


def test_every_reading_arrives(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    nvml.set("process 1 1000", "process 2 2000", throttle=0x4 | 0x40)
    gpu = read(nvml)["gpu"]
    assert gpu["name"] == "Fake GPU"
    assert (gpu["memory_used_bytes"], gpu["memory_total_bytes"]) == (4 * GIB, 16 * GIB)
    assert gpu["memory_others_bytes"] == 3000
    assert (gpu["utilization"], gpu["clock_mhz"], gpu["max_clock_mhz"]) == (0.37, 1900, 2000)
    assert gpu["throttle_reasons"] == ["power cap", "hardware thermal slowdown"]
    assert (gpu["temperature_c"], gpu["temperature_limit_c"]) == (55, 90)
    assert (gpu["power_w"], gpu["power_limit_w"], gpu["energy_j"]) == (150, 300, 5000)
    assert (gpu["num_ecc_uncorrected"], gpu["num_ecc_corrected"]) == (0, 2)
    assert gpu["unavailable"] == {}
    assert gpu["fault"] is None


@pytest.mark.parametrize(("code", "why"), [(3, "not supported"), (4, "not permitted")])
def test_a_refused_call_costs_its_sensor_alone(tmp_path: Path, code: int, why: str) -> None:
    nvml = FakeNvml(tmp_path)
    refused = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEccErrors", "nvmlEventSetCreate")
    nvml.set(*(f"fault {symbol} {code}" for symbol in refused))
    gpu = read(nvml)["gpu"]
    assert (gpu["power_w"], gpu["num_ecc_uncorrected"]) == (None, None)
    assert gpu["unavailable"]["power"] == gpu["unavailable"]["ECC"] == why
    assert "XID events" in gpu["unavailable"]
    assert (gpu["temperature_c"], gpu["memory_total_bytes"]) == (55, 16 * GIB)


def test_an_old_driver_is_asked_by_the_old_names(tmp_path: Path) -> None:
    nvml = FakeNvml(
        tmp_path,
        without=(
            "nvmlDeviceGetMemoryInfo_v2",
            "nvmlDeviceGetTemperatureV",
            "nvmlDeviceGetCurrentClocksEventReasons",
            "nvmlDeviceGetMigMode",
            "nvmlDeviceGetTotalEnergyConsumption",
            "nvmlDeviceGetComputeRunningProcesses_v3",
        ),
    )
    nvml.set("process 1 1000", throttle=0x8)
    gpu = read(nvml)["gpu"]
    assert gpu["memory_others_bytes"] == 1000
    assert (gpu["memory_used_bytes"], gpu["temperature_c"]) == (4 * GIB, 55)
    assert gpu["throttle_reasons"] == ["hardware slowdown"]
    assert gpu["energy_j"] is None
    assert gpu["unavailable"]["energy"] == "not in this driver"


def test_a_driver_that_knows_a_device_and_nothing_else_is_no_fault(tmp_path: Path) -> None:
    kept = {"Init", "Shutdown", "ErrorString", "DeviceGetHandleByIndex"}
    source = SOURCE.read_text()
    symbols = set(re.findall(r"\b(nvml[A-Z]\w*)(?= ?\()", source)) | set(
        re.findall(r"READING\((nvml\w+)", source)
    )
    without = [name for name in symbols if not any(name[4:].startswith(one) for one in kept)]
    assert len(without) > 20
    gpu = read(FakeNvml(tmp_path, without=without))["gpu"]
    assert gpu["fault"] is None
    assert {"memory", "temperature", "processes", "XID events"} <= set(gpu["unavailable"])
    assert gpu["memory_total_bytes"] is None


def test_a_mig_device_has_memory_of_its_own_and_the_rest_of_its_gpu(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    nvml.set("process 1 500", mig=1, mig_memory_total=10 * GIB, mig_memory_used=GIB)
    for visible in ("0", "MIG-1234"):
        gpu = read(nvml, CUDA_VISIBLE_DEVICES=visible)["gpu"]
        assert gpu["name"] == "Fake GPU MIG 1g.10gb"
        assert (gpu["memory_used_bytes"], gpu["memory_total_bytes"]) == (GIB, 10 * GIB)
        assert (gpu["memory_others_bytes"], gpu["temperature_c"]) == (500, 55)
    whole = read(nvml, CUDA_VISIBLE_DEVICES="GPU-1234")["gpu"]
    assert whole["memory_total_bytes"] == 16 * GIB


def test_the_first_visible_device_is_read_and_none_other(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    names = {
        "0,1": "Fake GPU",
        "1": "Fake GPU 2",
        "1,0": "Fake GPU 2",
        "GPU-56": "Fake GPU 2",
        "GPU-1234,GPU-5678": "Fake GPU",
        "MIG-1234": "Fake GPU MIG 1g.10gb",
        "": None,
        "-1": None,
        "GPU-9": None,
        "MIG-9": None,
        "7": None,
    }
    assert ask(nvml, "visible", *names) == list(names.values())
    # What was begun is ended, device or not.
    assert nvml.calls == ["init", "shutdown"] * len(names)
    assert read(nvml, CUDA_VISIBLE_DEVICES="")["gpu"] is None


def test_memory_of_a_process_that_the_driver_keeps_to_itself_is_not_counted_as_nothing(
    tmp_path: Path,
) -> None:
    nvml = FakeNvml(tmp_path)
    nvml.set("process 1 1000", f"process 2 {2**64 - 1}")
    assert read(nvml)["gpu"]["memory_others_bytes"] is None


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("fault nvmlInitWithFlags 9", "Driver Not Loaded"),
        ("fault nvmlDeviceGetHandleByIndex_v2 4", "Insufficient Permissions"),
    ],
)
def test_without_a_device_the_host_is_still_read(tmp_path: Path, fault: str, why: str) -> None:
    nvml = FakeNvml(tmp_path)
    nvml.set(fault)
    readings = read(nvml)
    assert readings["gpu"] is None
    assert why in readings["why_no_gpu"]
    assert readings["host"]["memory_total_bytes"] > 0


def test_a_neighbour_that_takes_memory_derates_and_metrics_show_it(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    with server(nvml) as address:
        wait_health(address, lambda status, health: health["status"] == "ok")
        nvml.set(f"process 1 {11 * GIB}", memory_used=16 * GIB - (100 << 20))
        health = wait_health(address, lambda status, health: health["status"] == "degraded")
        assert health["reasons"] == ["memory taken by others"]
        assert httpx.get(f"{address}/health").status_code == 200
        report = httpx.get(f"{address}/v1/telemetry").json()
        assert report["source"] == "gpu"
        assert report["samples"]["gpu"]["memory_others_bytes"] == 11 * GIB
        assert report["condition"]["factor"] == 0.5
        metrics = httpx.get(f"{address}/metrics").text
        assert 'fulcrum_device_factor{model_name="toy"} 0.5' in metrics
        name = 'fulcrum_device_memory_others_bytes{device="gpu",model_name="toy"} '
        (value,) = [line for line in metrics.splitlines() if line.startswith(name)]
        assert float(value.removeprefix(name)) == 11 * GIB
        assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 200


def test_throttled_clocks_derate_by_how_much_is_left(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    with server(nvml) as address:
        nvml.set(throttle=0x20, clock=600)
        health = wait_health(address, lambda status, health: health["status"] == "degraded")
        assert health["reasons"] == ["clocks throttled: software thermal slowdown"]
        assert httpx.get(f"{address}/v1/telemetry").json()["condition"]["factor"] == 0.25


@pytest.mark.parametrize(
    ("lines", "readings", "reason"),
    [
        (["fault * 15"], {}, "device lost"),
        (["xid 13", "xid 79"], {}, "XID 79"),
        ([], {"ecc_uncorrected": 1}, "uncorrectable memory errors"),
    ],
)
def test_a_fault_of_the_device_drains(
    tmp_path: Path, lines: list[str], readings: dict[str, int], reason: str
) -> None:
    nvml = FakeNvml(tmp_path)
    with server(nvml) as address:
        wait_health(address, lambda status, health: status == 200)
        time.sleep(1.0)  # a sample of the good days
        nvml.set(*lines, **readings)
        health = wait_health(address, lambda status, health: status == 503)
        assert health["status"] == "draining"
        assert health["reasons"] == [reason]
        assert httpx.get(f"{address}/health?check=live").status_code == 200
        refused = httpx.post(f"{address}/v1/completions", json=BODY)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "device_draining"
        assert reason in refused.json()["error"]["message"]
        assert 0 < int(refused.headers["Retry-After"]) <= 60
        nvml.set()  # it is well again, and has to stay so for a while
        deadline_s = time.monotonic() + 8
        while httpx.get(f"{address}/v1/telemetry").json()["condition"]["recovers_in_s"] is None:
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        assert httpx.get(f"{address}/health").status_code == 503


def test_a_driver_that_hangs_leaves_admission_to_the_load_alone(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    with server(nvml) as address:
        wait_health(address, lambda status, health: health["status"] == "ok")
        nvml.set("hang nvmlDeviceGetMemoryInfo_v2 30000", throttle=0x20)
        health = wait_health(address, lambda status, health: health["status"] == "degraded")
        assert "no telemetry" in health["reasons"][0]
        assert "has not answered" in health["telemetry"]["unavailable"]["gpu"]
        began_s = time.monotonic()
        assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 200
        assert time.monotonic() - began_s < 1


@pytest.mark.parametrize("symbol", ["nvmlInitWithFlags", "nvmlDeviceGetMemoryInfo_v2"])
def test_beside_a_driver_that_hangs_the_host_is_read_and_a_signal_ends_the_process(
    tmp_path: Path, symbol: str
) -> None:
    nvml = FakeNvml(tmp_path)
    nvml.set(f"hang {symbol} 60000")
    with process(nvml, "auto") as (running, address):
        health = wait_health(
            address, lambda _, health: health["telemetry"]["unavailable"].get("gpu")
        )
        assert health["status"] == "ok"
        assert "has not answered" in health["telemetry"]["unavailable"]["gpu"]
        report = httpx.get(f"{address}/v1/telemetry").json()
        assert report["samples"]["host"]["age_s"] < 1.5
        assert report["num_samples"] > 4
        running.terminate()
        assert running.wait(5) == 0


def test_events_that_do_not_come_back_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    nvml = FakeNvml(tmp_path)
    nvml.set("hang nvmlEventSetWait_v2 60000")
    gpu = read(nvml, seconds=3.5)["gpu"]
    assert gpu["unavailable"] == {"XID events": "the driver does not answer"}
    assert gpu["temperature_c"] == 55
