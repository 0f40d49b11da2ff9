"""What is said of an apply: its request, how far it is, and that another one runs."""

from datetime import UTC, datetime
from typing import Literal

import msgspec

from engine.planning.preview import Preview
from engine.planning.proposal import Proposal
from engine.planning.receipts import Receipt

State = Literal[
    "previewing", "building", "checking", "switching", "measuring", "done", "failed", "rolled_back"
]
# The new state beside the old one, or after it; or the old one with other drafters.
Mode = Literal["beside", "drain", "next_step", "none"]
_ENDED = ("done", "failed", "rolled_back")


class ApplyRequest(Proposal, frozen=True, kw_only=True):
    """A proposal, and what to do where the promised speed is missed."""

    auto_rollback: bool = False


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """How far an apply is."""

    id: str
    state: State
    detail: str
    mode: Mode
    proposal: ApplyRequest
    began_at: str
    seconds: float
    preview: Preview | None = None
    receipt: Receipt | None = None

    @property
    def has_ended(self) -> bool:
        return self.state in _ENDED


class ApplyBusy(RuntimeError):
    """Another apply runs."""


def now() -> str:
    """The time in UTC as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
