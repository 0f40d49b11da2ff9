"""A server of this checkout as a process of its own, for a bench to load, change or mistreat."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

_START_TIMEOUT_S = 120.0
_END_TIMEOUT_S = 30.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class LocalServer:
    """A process of `module` on a free port of 127.0.0.1, healthy; ended on leaving the context."""

    def __init__(
        self,
        options: Sequence[str],
        *,
        module: str = "server",
        environment: Mapping[str, str] | None = None,
        stderr: Any = None,
    ) -> None:
        """`environment` is added to that of this process; errors go to a log without `stderr`.

        Raises RuntimeError with the log's end if the server does not start.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="fulcrum-bench-")
        self._log_path = Path(self._folder.name) / "server.log"
        command = [sys.executable, "-m", module, "--port", "0"]
        command += ["--receipts", str(self._log_path.with_name("receipts.jsonl")), *options]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log if stderr is None else stderr,
                env={**os.environ, **(environment or {})},
                text=True,
            )
        try:
            self.url = self._read_address()
            self._wait_healthy()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "LocalServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self.log()[-2000:], file=sys.stderr)
        self._end()

    @property
    def port(self) -> int:
        """Port on 127.0.0.1."""
        return int(self.url.rpartition(":")[2])

    @property
    def rss_bytes(self) -> int:
        """Memory of the process, files that it maps included."""
        statm = Path(f"/proc/{self.process.pid}/statm").read_text()
        return int(statm.split()[1]) * _PAGE_BYTES

    @property
    def anonymous_bytes(self) -> int:
        """Memory of the process that no file backs."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        if found is None:
            raise RuntimeError("/proc does not tell RssAnon")
        return int(found[1]) * 1024

    @property
    def cpu_s(self) -> float:
        """Processor time of all its threads so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]  # utime, stime
        return (int(user) + int(system)) / _TICKS_PER_S

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            return httpx.get(f"{self.url}/health", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    def log(self) -> str:
        """What the server has logged so far."""
        return self._log_path.read_text(errors="replace")

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
        for line in self.process.stdout:
            if line.startswith("address"):
                return line.split()[1]
        raise RuntimeError(f"the server did not start:\n{self.log()[-2000:]}")

    def _wait_healthy(self) -> None:
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self.is_healthy():
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"the server is not healthy:\n{self.log()[-2000:]}")
            time.sleep(0.05)

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # a bench may have made it hang
            self.process.kill()
            self.process.wait(10)
        self._folder.cleanup()
