"""What is read through NVML, as JSON, by a process that has loaded the library of its environment.

`python -m tests.server.read_nvml SECONDS` is what the poller has read after that time, and
`python -m tests.server.read_nvml visible LIST ...` which device each CUDA_VISIBLE_DEVICES names.
"""

import sys
import time
from typing import Any

import msgspec

from server.telemetry.nvml import NoDevice, NvmlReader
from server.telemetry.poller import Poller


def polled(seconds: float) -> Any:
    poller = Poller("gpu", interval_s=0.05)
    poller.start()
    time.sleep(seconds)
    poller.stop()
    return poller.latest


def device_name(visible: str) -> str | None:
    try:
        reader = NvmlReader(visible)
    except NoDevice:
        return None
    name = reader.read().name
    reader.close()
    return name


if __name__ == "__main__":
    kind, *lists = sys.argv[1:]
    answer = [device_name(one) for one in lists] if kind == "visible" else polled(float(kind))
    sys.stdout.write(msgspec.json.encode(answer).decode())
