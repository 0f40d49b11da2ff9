"""What each technique has gained since the start, as measured: for `GET /v1/optimizations`."""

from typing import Any

from engine.planning.qualification import Technique
from engine.planning.receipts import Receipt
from engine.speculation.report import SpeculationReport
from engine.types import EngineLoad


class Gains:
    """Reads the counts of the prefix cache and of the drafters, and the receipts of applies."""

    def __init__(
        self, load: EngineLoad, report: SpeculationReport | None, receipts: list[Receipt]
    ) -> None:
        """`receipts` has the newest first; without a `report` nobody drafts."""
        self._load = load
        self._drafters = {} if report is None else {d.name: d for d in report.drafters}
        self._lately = ""
        if report is not None:
            self._lately = (
                f"lately {report.tokens_per_step:.2f} tokens a step and "
                f"{report.measured_speedup:.2f} times the speed of no drafts, with all drafters"
            )
        self._receipts = receipts

    def of(self, row: Technique, today: dict[str, Any]) -> str | None:
        """One line, or None where nothing was counted or the technique is not in use."""
        if row.kind == "cache":
            return self._cached()
        if row.kind == "speculation":
            return self._drafted(row)
        if not row.enabled or row.setting is None:
            return None
        return self._switched(row.setting, today)

    def _cached(self) -> str | None:
        load = self._load
        if not load.num_prefix_hit_tokens:
            return None
        share = load.num_prefix_hit_tokens / load.num_prefix_queried_tokens
        return f"{load.num_prefix_hit_tokens} prompt tokens not computed again ({share:.0%})"

    def _drafted(self, row: Technique) -> str | None:
        drafter = self._drafters.get(row.name.removeprefix("speculation "))
        if drafter is None or not drafter.num_drafted_tokens:
            return None
        return (
            f"{drafter.num_accepted_tokens} of {drafter.num_drafted_tokens} drafted tokens "
            f"accepted; {self._lately}"
        )

    def _switched(self, setting: dict[str, Any], today: dict[str, Any]) -> str | None:
        """What the apply that brought this setting measured, while it is in use."""
        ((name, value),) = setting.items()
        for receipt in self._receipts:
            if receipt.outcome != "kept" or receipt.after.get(name) != today[name]:
                continue
            speed, memory = receipt.speed, receipt.memory
            if receipt.before.get(name) == value or speed is None or not speed.measured:
                continue
            text = f"{speed.measured:.0f} tokens/s"
            if speed.before:
                text += f" after {speed.before:.0f} with {receipt.before[name]}"
            if memory is not None:
                text += f", {sum(memory.measured.values()) >> 20} MiB"
            return text
        return None
