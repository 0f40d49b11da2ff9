"""Builds the fake NVML library and runs programs against it, with a state that tests change."""

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
GIB = 1 << 30
HEALTHY: dict[str, int] = {
    "memory_total": 16 * GIB,
    "memory_used": 4 * GIB,
    "utilization": 37,
    "clock": 1900,
    "max_clock": 2000,
    "throttle": 0,
    "temperature": 55,
    "temperature_limit": 90,
    "power_mw": 150_000,
    "power_limit_mw": 300_000,
    "energy_mj": 5_000_000,
    "ecc_uncorrected": 0,
    "ecc_corrected": 2,
}


class FakeNvml:
    """A library in `folder`, which lacks the symbols in `without`."""

    def __init__(self, folder: Path, without: Sequence[str] = ()) -> None:
        self._folder = folder
        self._state = folder / "state"
        hidden = folder / "hidden.map"
        names = "".join(f"{name}; " for name in without)
        hidden.write_text(f"{{ global: nvml*; local: {names} }};" if names else "{ global: *; };")
        library = folder / "libnvidia-ml.so.1"
        options = ("-shared", "-fPIC", f"-Wl,--version-script={hidden}")
        subprocess.run(["cc", *options, "-o", library, SOURCE], check=True)
        self.set()

    def set(self, *lines: str, **readings: int) -> None:
        """Make the GPU healthy but for these readings and extra lines of the state file."""
        state = [f"{name} {value}" for name, value in (HEALTHY | readings).items()]
        # Replaced whole, so that no call reads half of it.
        scratch = self._folder / "state.new"
        scratch.write_text("\n".join([*lines, *state]) + "\n")
        scratch.replace(self._state)

    @property
    def calls(self) -> list[str]:
        """Inits and shutdowns so far."""
        return self._state.with_name("state.calls").read_text().split()

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self._folder),
            "FAKE_NVML_STATE": str(self._state),
        }
