"""Reads one NVIDIA device through NVML; the poller's thread calls it.

Every call may be missing from the driver, unsupported by the device or refused to us. The sample
then lacks that sensor and says why; only a device that cannot be used at all is a fault.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

from server.telemetry.samples import DeviceSample, Xid

logger = logging.getLogger("fulcrum")

T = TypeVar("T")

_MAX_XIDS = 16
_FAULTS = {
    pynvml.NVML_ERROR_GPU_IS_LOST: "lost",
    pynvml.NVML_ERROR_RESET_REQUIRED: "reset required",
}
# These answers do not change while the driver runs: the sensor is not asked again.
_FINAL = {
    pynvml.NVML_ERROR_NOT_SUPPORTED: "not supported",
    pynvml.NVML_ERROR_NO_PERMISSION: "not permitted",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "not in this driver",
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH: "not in this driver",
}
_THROTTLE_REASONS = {
    pynvml.nvmlClocksEventReasonSwPowerCap: "power cap",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "software thermal slowdown",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
}


class NoDevice(Exception):
    """There is no NVIDIA device that this process can see; the message says why."""


class NvmlReader:
    """`visible` is CUDA_VISIBLE_DEVICES: its first index, GPU or MIG UUID is what is read.

    None is the first GPU; an empty list, or one that begins with something else, leaves no GPU, as
    with CUDA. Indexes are in the order of the PCI bus.
    """

    def __init__(self, visible: str | None = None) -> None:
        self._unavailable: dict[str, str] = {}
        self._fault: str | None = None
        self._xids: deque[Xid] = deque(maxlen=_MAX_XIDS)
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NoDevice(str(error)) from None
        try:
            self.device = _find_device(visible)
        except (pynvml.NVMLError, NoDevice) as error:
            self.close()
            raise NoDevice(str(error)) from None
        # A MIG device has memory and processes of its own; all else is the whole GPU's.
        parent = self._ask(
            "MIG parent", lambda: pynvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self.device)
        )
        self._unavailable.clear()  # that the device is no MIG device is nothing to tell
        self.gpu = self.device if parent is None else parent
        name = self._ask("name", lambda: str(pynvml.nvmlDeviceGetName(self.device)))
        self._name = name or "NVIDIA device"

    def close(self) -> None:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            logger.warning("NVML was not shut down: %s", error)

    def add_xid(self, code: int) -> None:
        """Called by the thread that waits for events; shows in the next sample."""
        self._xids.append(Xid(code, time.monotonic()))

    def tell_unavailable(self, sensor: str, why: str) -> None:
        """Of a sensor that others read for it."""
        self._unavailable[sensor] = why

    def read(self) -> DeviceSample:
        self._fault = None
        ask, gpu = self._ask, self.gpu
        memory = self._memory()
        processes = ask("processes", lambda: _processes(self.device))
        utilization = ask("utilization", lambda: pynvml.nvmlDeviceGetUtilizationRates(gpu))
        sm_clock = pynvml.NVML_CLOCK_SM
        reasons = ask("throttle reasons", lambda: _throttle_reasons(gpu)) or 0
        return DeviceSample(
            kind="gpu",
            name=self._name,
            taken_at_s=time.monotonic(),
            memory_used_bytes=None if memory is None else int(memory.total - memory.free),
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_others_bytes=None if processes is None else _others_bytes(processes),
            utilization=None if utilization is None else utilization.gpu / 100,
            clock_mhz=ask("clock", lambda: float(pynvml.nvmlDeviceGetClockInfo(gpu, sm_clock))),
            max_clock_mhz=ask(
                "clock limit", lambda: float(pynvml.nvmlDeviceGetMaxClockInfo(gpu, sm_clock))
            ),
            throttle_reasons=tuple(
                name for bit, name in _THROTTLE_REASONS.items() if reasons & bit
            ),
            temperature_c=ask("temperature", lambda: _temperature_c(gpu)),
            temperature_limit_c=ask("temperature limit", lambda: _temperature_limit_c(gpu)),
            power_w=ask("power", lambda: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000),
            power_limit_w=ask(
                "power limit", lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000
            ),
            energy_j=ask("energy", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu) / 1000),
            num_ecc_uncorrected=ask("ECC", lambda: _num_ecc_errors(gpu, uncorrected=True)),
            num_ecc_corrected=ask("ECC", lambda: _num_ecc_errors(gpu, uncorrected=False)),
            xids=tuple(self._xids),
            fault=self._fault,
            unavailable=dict(self._unavailable),
        )

    def _memory(self) -> Any:
        """Version 2 tells what the driver reserves; older drivers have version 1 alone."""
        memory = self._ask(
            "memory (v2)",
            lambda: pynvml.nvmlDeviceGetMemoryInfo(self.device, version=pynvml.nvmlMemory_v2),
        )
        if memory is None and self._fault is None:
            return self._ask("memory", lambda: pynvml.nvmlDeviceGetMemoryInfo(self.device))
        return memory

    def _ask(self, sensor: str, call: Callable[[], T]) -> T | None:
        if self._unavailable.get(sensor) in _FINAL.values():
            return None
        try:
            answer = call()
        except pynvml.NVMLError as error:
            self._fault = _FAULTS.get(error.value, self._fault)
            self._unavailable[sensor] = _FINAL.get(error.value) or str(error)
            return None
        self._unavailable.pop(sensor, None)
        return answer


def _find_device(visible: str | None) -> Any:
    first = "0" if visible is None else visible.split(",")[0].strip()
    if first.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(first.encode())
    if first.startswith("GPU-"):
        return _find_gpu(first)
    if not (first.isascii() and first.isdigit()):
        raise NoDevice(f"CUDA_VISIBLE_DEVICES='{visible}' names none")
    device = pynvml.nvmlDeviceGetHandleByIndex(int(first))
    try:
        is_split = pynvml.nvmlDeviceGetMigMode(device)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:
        return device  # a GPU that cannot be split
    # As CUDA does, take the first part of a GPU that is split.
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device) if is_split else 0):
        try:
            return pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
        except pynvml.NVMLError_NotFound:
            continue
    return device


def _find_gpu(uuid: str) -> Any:
    """By its UUID, whose beginning is enough, as with CUDA."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
        if str(pynvml.nvmlDeviceGetUUID(gpu)).startswith(uuid):
            return gpu
    raise NoDevice(f"there is no {uuid}")


def _processes(device: Any) -> list[Any]:
    # By their numbers: the binding's name without one hides that a driver lacks it.
    try:
        return list(pynvml.nvmlDeviceGetComputeRunningProcesses_v3(device))
    except pynvml.NVMLError_FunctionNotFound:  # before driver 510
        return list(pynvml.nvmlDeviceGetComputeRunningProcesses_v2(device))


def _others_bytes(processes: list[Any]) -> int | None:
    """Of other processes; None where the driver keeps one's to itself."""
    own = os.getpid()
    others = [process.usedGpuMemory for process in processes if process.pid != own]
    return None if None in others else sum(others)


def _throttle_reasons(gpu: Any) -> int:
    try:
        return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu))
    except pynvml.NVMLError_FunctionNotFound:  # its name before driver 535
        return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu))


def _temperature_c(gpu: Any) -> float:
    try:
        return float(pynvml.nvmlDeviceGetTemperatureV(gpu, pynvml.NVML_TEMPERATURE_GPU))
    except pynvml.NVMLError_FunctionNotFound:
        return float(pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU))


def _temperature_limit_c(gpu: Any) -> float:
    slowdown = pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    return float(pynvml.nvmlDeviceGetTemperatureThreshold(gpu, slowdown))


def _num_ecc_errors(gpu: Any, *, uncorrected: bool) -> int:
    kind = (
        pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
        if uncorrected
        else pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED
    )
    return int(pynvml.nvmlDeviceGetTotalEccErrors(gpu, kind, pynvml.NVML_VOLATILE_ECC))
