"""What `bench.control preview` holds against each other, and the table of it."""

from collections.abc import Sequence
from statistics import median

import msgspec

from bench.layout import lay_out

CONCURRENCIES = (1, 8)


class Setting(msgspec.Struct, frozen=True):
    """What a server is started with."""

    model: str
    quantization: str
    kv_dtype: str
    speculation: str

    def options(self) -> list[str]:
        pairs = {
            "--model": self.model,
            "--quantization": self.quantization,
            "--kv-dtype": self.kv_dtype,
            "--speculation": self.speculation,
            "--kv-memory": "64MiB",  # small enough to be written to in a few seconds
            "--max-model-len": "2048",
            "--max-sequences": "8",  # all of their state is written to as well
        }
        return [part for pair in pairs.items() for part in pair]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One setting at one concurrency, promised and measured."""

    setting: Setting
    concurrency: int
    promised: float  # tokens per second of all streams
    low: float
    high: float
    measured: float
    drift: float  # of the promise, the largest from before a load to after it
    num_turns: int
    basis: str  # of the drafts' acceptance
    planned_mib: float
    resident_mib: float  # of the process, not backed by files
    components_mib: dict[str, tuple[float, float]]  # planned and allocated

    @property
    def held(self) -> bool:
        return self.low <= self.measured <= self.high

    def is_like(self, streams: int, drafts: str) -> bool:
        return self.concurrency == streams and self.setting.speculation == drafts

    @property
    def memory_error(self) -> float:
        return self.resident_mib / self.planned_mib - 1

    @property
    def worst_component(self) -> float:
        """Largest error of a component that the core itself counts."""
        return max(
            (abs(real / planned - 1) for planned, real in self.components_mib.values() if planned),
            default=0.0,
        )


def preview_table(cases: Sequence[Case]) -> str:
    """A line for each case, and how often the promises held."""
    head = ("model", "weights", "KV", "drafts", "streams", "promised tok/s", "interval", "measured")
    rows = [(*head, "held", "drift", "turns", "planned MiB", "resident", "components")]
    for case in cases:
        setting = case.setting
        off = case.measured / case.promised - 1
        rows.append(
            (
                setting.model,
                "bf16" if setting.quantization == "none" else setting.quantization,
                setting.kv_dtype,
                setting.speculation,
                str(case.concurrency),
                f"{case.promised:.0f}",
                f"{case.low:.0f} to {case.high:.0f}",
                f"{case.measured:.0f} ({off:+.0%})",
                "yes" if case.held else "no",
                f"{case.drift:.0%}",
                str(case.num_turns),
                f"{case.planned_mib:.1f}",
                f"{case.memory_error:+.1%}",
                f"{case.worst_component:.1%}",
            )
        )
    num_held = sum(case.held for case in cases)
    worst = max(abs(case.memory_error) for case in cases)
    widest = max(max(c.high / c.promised - 1, 1 - c.low / c.promised) for c in cases)
    biases = ", ".join(
        f"{streams} streams {drafts} {median(offs):+.0%}"
        for streams in CONCURRENCIES
        for drafts in ("off", "auto")
        if (offs := [c.measured / c.promised - 1 for c in cases if c.is_like(streams, drafts)])
    )
    return (
        f"{lay_out(rows)}\n{num_held} of {len(cases)} intervals held, at most +-{widest:.0%} wide; "
        f"memory within {worst:.1%}; measured against promised, median: {biases}"
    )
