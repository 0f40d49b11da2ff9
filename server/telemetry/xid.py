"""Waits for the driver's XID errors in a thread of its own, since NVML can only block for them."""

import logging
import threading

import pynvml

from server.telemetry.nvml import NvmlReader

logger = logging.getLogger("fulcrum")

_WAIT_MS = 500  # then it looks whether it should end
_SENSOR = "XID events"


class XidThread:
    """Tells `reader` of every XID of its GPU until `stop`."""

    def __init__(self, reader: NvmlReader) -> None:
        self._reader = reader
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xid", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(2 * _WAIT_MS / 1000)

    def _run(self) -> None:
        try:
            events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError as error:
            self._reader.tell_unavailable(_SENSOR, str(error))
            return
        try:
            pynvml.nvmlDeviceRegisterEvents(
                self._reader.gpu, pynvml.nvmlEventTypeXidCriticalError, events
            )
            while not self._stopping.is_set():
                self._wait(events)
        except pynvml.NVMLError as error:
            self._reader.tell_unavailable(_SENSOR, str(error))
        finally:
            pynvml.nvmlEventSetFree(events)

    def _wait(self, events: object) -> None:
        try:
            event = pynvml.nvmlEventSetWait(events, _WAIT_MS)
        except pynvml.NVMLError_Timeout:
            return
        logger.error("the NVIDIA driver reports XID %d", event.eventData)
        self._reader.add_xid(int(event.eventData))
