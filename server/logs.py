"""Log output as text or as one JSON object a line, written by a thread of its own.

Set up once by `__main__`. The event loop only queues records: a reader of standard error that
stands still must not hold up a stream. No prompt and no generated text is ever logged.
"""

import logging
import logging.handlers
import os
import queue
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Literal

import msgspec

LogFormat = Literal["text", "json"]

_MAX_QUEUED_RECORDS = 10_000
# Waking the writing thread for each record would take as long as refusing the request that it is
# about; what is worse than information is written at once.
_GATHER_S = 0.05
_FLUSH_S = 2.0


def start_logging(log_format: LogFormat) -> logging.handlers.QueueListener:
    """Send all records to standard error in that format; `stop_logging` ends it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if log_format == "json" else _TextFormatter())
    records: queue.SimpleQueue[logging.LogRecord | None] = queue.SimpleQueue()
    # No format shows who logged a record, which takes longer to find out than all the rest.
    logging._srcfile = None  # as "Optimization" in its manual says
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers[:] = [_DroppingHandler(records)]
    root.setLevel(logging.INFO)
    listener = _Listener(records, handler)
    listener.start()
    return listener


def stop_logging(listener: logging.handlers.QueueListener, code: int) -> None:
    """Write what is queued; where nobody reads it, the process ends here with `code`.

    The listener's thread then holds the lock of standard error, without which Python cannot end.
    """
    stopper = threading.Thread(target=listener.stop, daemon=True)
    stopper.start()
    stopper.join(_FLUSH_S)
    if stopper.is_alive():
        os._exit(code)


class _Listener(logging.handlers.QueueListener):
    """Waits a moment after the first record, for those that follow it."""

    def dequeue(self, block: bool) -> logging.LogRecord:
        assert isinstance(self.queue, queue.SimpleQueue)
        is_first = self.queue.empty()
        record: logging.LogRecord = self.queue.get(block)
        if is_first and record is not None and record.levelno < logging.WARNING:
            time.sleep(_GATHER_S)
        return record

    def enqueue_sentinel(self) -> None:
        assert isinstance(self.queue, queue.SimpleQueue)
        self.queue.put(None)  # there is always a place


class _DroppingHandler(logging.handlers.QueueHandler):
    """Drops records while many wait, rather than wait or keep them all."""

    def enqueue(self, record: logging.LogRecord) -> None:
        assert isinstance(self.queue, queue.SimpleQueue)
        if self.queue.qsize() < _MAX_QUEUED_RECORDS:
            self.queue.put(record)

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        # The formatters run in this process: the record may keep its exception and its fields.
        return record


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, "fields", {})
        shown = ("request_id", "prompt_tokens", "completion_tokens")
        extra = "".join(f" {name}={fields[name]}" for name in shown if fields.get(name) is not None)
        return super().format(record) + extra


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {k: v for k, v in getattr(record, "fields", {}).items() if v is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()
