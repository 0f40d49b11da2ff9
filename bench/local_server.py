"""A server of this checkout as a process of its own, for benches that need one to themselves."""

import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType

_START_TIMEOUT_S = 120.0


class LocalServer:
    """Starts on entering, on a free port of 127.0.0.1, and is stopped on leaving."""

    def __init__(self, options: list[str], environment: dict[str, str] | None = None) -> None:
        """Without an `environment` it has that of this process."""
        self._options = options
        self._environment = environment
        self._folder = tempfile.TemporaryDirectory(prefix="fulcrum-bench-")
        self._log_path = Path(self._folder.name) / "server.log"
        self._process: subprocess.Popen[str] | None = None
        self.url = ""

    def __enter__(self) -> "LocalServer":
        command = [sys.executable, "-m", "server", "--port", "0", *self._options]
        command += ["--receipts", str(self._log_path.with_name("receipts.jsonl"))]
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=self._environment
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("address"):
                self.url = line.split()[1]
                break
        else:
            raise RuntimeError(f"the server did not start: {self._log_path.read_text()}")
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self.is_healthy():
            if time.monotonic() > deadline_s:
                raise RuntimeError("the server does not become healthy")
            time.sleep(0.05)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(60)
        self._folder.cleanup()

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, TimeoutError):
            return False

    def log(self) -> str:
        """What the server has logged so far."""
        return self._log_path.read_text(errors="replace")

    def anonymous_bytes(self) -> int:
        """Memory of the process that no file backs."""
        assert self._process is not None
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc does not tell RssAnon")
