"""Waits for the driver's XID errors in a thread of its own, since NVML can only block for them."""

import logging
import threading
import time

import pynvml

from server.telemetry.nvml import NvmlReader

logger = logging.getLogger("fulcrum")

_WAIT_MS = 500  # then it looks whether it should end
_HANG_S = 3.0
_SENSOR = "XID events"


class XidThread:
    """Tells `reader` of every XID of its GPU until `stop`."""

    def __init__(self, reader: NvmlReader) -> None:
        self._reader = reader
        self._stopping = threading.Event()
        self._waits_since_s = 0.0
        self._thread = threading.Thread(target=self._run, name="xid", daemon=True)

    def start(self) -> None:
        self._waits_since_s = time.monotonic()
        self._thread.start()

    def stop(self) -> bool:
        """End it; false where the driver keeps it in a call."""
        self._stopping.set()
        self._thread.join(2 * _WAIT_MS / 1000)
        return not self._thread.is_alive()

    def hangs(self) -> bool:
        return self._thread.is_alive() and time.monotonic() - self._waits_since_s > _HANG_S

    def _run(self) -> None:
        try:
            events = pynvml.nvmlEventSetCreate()
            try:
                pynvml.nvmlDeviceRegisterEvents(
                    self._reader.gpu, pynvml.nvmlEventTypeXidCriticalError, events
                )
                while not self._stopping.is_set():
                    self._wait(events)
            finally:
                pynvml.nvmlEventSetFree(events)
        except pynvml.NVMLError as error:
            self._reader.tell_unavailable(_SENSOR, str(error))

    def _wait(self, events: object) -> None:
        self._waits_since_s = time.monotonic()
        try:
            event = pynvml.nvmlEventSetWait(events, _WAIT_MS)
        except pynvml.NVMLError_Timeout:
            return
        logger.error("the NVIDIA driver reports XID %d", event.eventData)
        self._reader.add_xid(int(event.eventData))
