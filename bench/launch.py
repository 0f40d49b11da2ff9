"""Starts a Fulcrum server for a benchmark to load and to mistreat; used by overload and faults."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

_START_S = 120.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Server:
    """A process of `module` on a free port of 127.0.0.1; killed at the end if it still runs."""

    def __init__(
        self,
        options: Sequence[str],
        *,
        module: str = "server",
        environment: dict[str, str] | None = None,
        stderr: Any = None,
    ) -> None:
        self._log = Path(tempfile.mkstemp(prefix="fulcrum-bench-", suffix=".log")[1])
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--port", "0", *options],
                stdout=subprocess.PIPE,
                stderr=log if stderr is None else stderr,
                env={**os.environ, **(environment or {})},
                text=True,
            )
        self.url = self._read_address()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if error is not None:
            print(self._log.read_text(errors="replace")[-2000:], file=sys.stderr)
        self._log.unlink()

    @property
    def rss_bytes(self) -> int:
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * _PAGE_BYTES

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics, summed over their labels."""
        samples: dict[str, float] = {}
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            samples[name] = samples.get(name, 0.0) + float(value)
        return samples

    def books_balance(self, timeout_s: float = 10.0) -> bool:
        """Whether all is idle soon, no block is held and none is lost."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            now = self.metrics()
            idle = not now["fulcrum_requests_running"] and not now["fulcrum_requests_waiting"]
            free, held = now["fulcrum_kv_blocks_free"], now["fulcrum_kv_blocks_held"]
            if idle and held == 0 and free == now["fulcrum_kv_blocks"]:
                return True
            time.sleep(0.1)
        return False

    def _read_address(self) -> str:
        assert self.process.stdout is not None
        deadline_s = time.monotonic() + _START_S
        for line in self.process.stdout:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                return found[0]
            if time.monotonic() > deadline_s:
                break
        log = self._log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the server did not start:\n{log}")
