"""What an apply promised and what was measured afterwards, kept as JSON lines.

The applier writes them; the endpoints and the page show them.
"""

import threading
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.planning.cost_model import CostModel, Interval
from engine.planning.observer import DecodeWindow
from engine.planning.quality import Quality
from engine.planning.rehearsal import Estimate

_KEPT_IN_MEMORY = 50


class MemoryOutcome(msgspec.Struct, frozen=True):
    """Bytes by component; weights, KV blocks and activations as planned and as allocated."""

    predicted: dict[str, int]
    measured: dict[str, int]


class SpeedOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Decode tokens per second of all sequences, over the steps that were observed."""

    predicted: Interval | None
    # Of a calibration; or of a few steps of the new core, timed before it served.
    basis: Literal["calibrated", "estimated"] | None
    measured: float | None
    num_sequences: float | None  # mean of the observed steps
    num_steps: int
    before: float | None  # as measured with the former setting, shortly before


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """One apply from its proposal to its outcome."""

    id: str
    at: str  # ISO 8601, UTC
    outcome: Literal["kept", "rolled_back", "failed"]
    reason: str
    before: dict[str, Any]
    after: dict[str, Any]
    mode: str  # "beside", "drain" or "next_step"
    build_s: float
    switch_s: float
    longest_pause_s: float  # of any sequence between two tokens, from the build to the end
    pauses_s: dict[str, float]  # the longest that ended in each state of the apply
    memory: MemoryOutcome | None
    speed: SpeedOutcome | None
    quality: Quality | None


class ReceiptLog:
    """Appends to a file; keeps the latest in memory for those who ask."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._latest: list[Receipt] = []

    def append(self, receipt: Receipt) -> str | None:
        """Keep a receipt; returns what hindered writing it, or None."""
        with self._lock:
            self._latest = [*self._latest[1 - _KEPT_IN_MEMORY :], receipt]
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab") as file:
                    file.write(msgspec.json.encode(receipt) + b"\n")
            except OSError as error:
                return f"{self.path}: {error.strerror}"
        return None

    def latest(self) -> list[Receipt]:
        """Those of this process, the newest first."""
        with self._lock:
            return self._latest[::-1]


def speed_outcome(
    window: DecodeWindow | None,
    model: CostModel | None,
    before: DecodeWindow | None,
    estimate: Estimate | None = None,
) -> SpeedOutcome:
    """What a window of decode steps says of a promise, and of the speed before.

    Without a model the promise is the estimate, where the load is still what that is about.
    """
    predicted = None
    basis: Literal["calibrated", "estimated"] | None = None
    if window is not None and model is not None and window.predicted_tokens_per_s is not None:
        value = window.predicted_tokens_per_s
        margin = model.margin(window.mean_sequences)
        predicted = Interval(value, value * (1 - margin), value * (1 + margin))
        basis = "calibrated"
    elif window is not None and estimate is not None:
        predicted = estimate.interval(window)
        basis = None if predicted is None else "estimated"
    return SpeedOutcome(
        predicted=predicted,
        basis=basis,
        measured=window.tokens_per_s if window is not None else None,
        num_sequences=window.mean_sequences if window is not None else None,
        num_steps=window.num_steps if window is not None else 0,
        before=before.tokens_per_s if before is not None else None,
    )
