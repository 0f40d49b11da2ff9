"""A server whose steps can be made to hang or to fail: `python -m bench.faulty_server OPTIONS`.

The file named by FULCRUM_BENCH_FAULT says what the next steps do: "hang" (until it changes),
"raise", or nothing. All else is `python -m server`.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

import server.__main__ as program
from engine.config import EngineConfig
from engine.deployment import deploy as real_deploy


class FaultyCore:
    """The core, but for `step`."""

    def __init__(self, core: Any, fault: Path) -> None:
        self._core = core
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def step(self, *sizes: int) -> None:
        while (fault := self._fault.read_text().strip()) == "hang":
            time.sleep(0.01)
        if fault == "raise":
            raise RuntimeError("planted by the benchmark")
        self._core.step(*sizes)


def deploy(config: EngineConfig) -> Any:
    deployment = real_deploy(config)
    core = FaultyCore(deployment.loaded.core, Path(os.environ["FULCRUM_BENCH_FAULT"]))
    loaded = msgspec.structs.replace(deployment.loaded, core=core)
    return msgspec.structs.replace(deployment, loaded=loaded)


if __name__ == "__main__":
    program.deploy = deploy  # type: ignore[attr-defined]
    sys.exit(program.main(sys.argv[1:]))
