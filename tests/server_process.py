"""A server under test: `python -m server` as a subprocess, its log, and what it says of itself."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
from openai import OpenAI

START_TIMEOUT_S = 60.0


def free_port() -> int:
    """Return a port that nothing listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ServerProcess:
    """Starts the server at construction; `kill` ends it whatever state it is in."""

    def __init__(self, options: list[str], log_path: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log_path = log_path
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FULCRUM_")}
        if cache := os.environ.get("FULCRUM_CACHE"):
            environment["FULCRUM_CACHE"] = cache
        with log_path.open("wb") as log:
            self.started_at_s = time.monotonic()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "--port", str(self.port), *options],
                cwd=Path(__file__).parents[1],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
            )

    @property
    def log(self) -> str:
        """Everything the server has printed."""
        return self._log_path.read_text(errors="replace")

    def wait_ready(self) -> None:
        """Return as soon as /health answers 200; fail with the log when it never does."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.poll()}:\n{self.log}")
            try:
                if httpx.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError(f"the server is not ready after {START_TIMEOUT_S} s:\n{self.log}")

    def client(self, **options: object) -> OpenAI:
        """Return a client of the openai package that does not retry."""
        settings: dict[str, object] = {"api_key": "unused", "max_retries": 0, "timeout": 120}
        return OpenAI(base_url=f"{self.url}/v1", **(settings | options))  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """Return the samples of /metrics, summed over their labels."""
        text = httpx.get(f"{self.url}/metrics", timeout=10).text
        samples: dict[str, float] = {}
        for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
            samples[name] = samples.get(name, 0.0) + float(value)
        return samples

    def wait_idle(self, timeout_s: float = 5.0) -> dict[str, float]:
        """Wait until no request runs or waits, and return the metrics; check the blocks' sum."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            metrics = self.metrics()
            if not metrics["fulcrum_requests_running"] and not metrics["fulcrum_requests_waiting"]:
                break
            assert time.monotonic() < deadline_s, f"not idle after {timeout_s} s: {metrics}"
            time.sleep(0.02)
        free, held = metrics["fulcrum_kv_blocks_free"], metrics["fulcrum_kv_blocks_held"]
        assert free + held == metrics["fulcrum_kv_blocks"]
        assert held == 0
        return metrics

    def terminate(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        """End the process if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
