"""The charts of bench.speculate, with matplotlib, which only the `bench` extra installs.

Bars of the speed-up by task group and mode, and beside them, where it was measured, the load sweep.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.speculate_summary import ModeSummary, SweepLevel


def _draw_groups(axes: Axes, summaries: Sequence[ModeSummary]) -> None:
    drafting = summaries[1:]  # off comes first: it is the line at 1
    groups = list(summaries[0].groups)
    width = 0.8 / max(len(drafting), 1)
    for index, summary in enumerate(drafting):
        left = [i - 0.4 + width * (index + 0.5) for i in range(len(groups))]
        heights = [summary.groups[group].speedup for group in groups]
        bars = axes.bar(left, heights, width, label=summary.mode)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="k", lw=1, ls="--", label="off")
    axes.set_xticks(range(len(groups)), groups, rotation=20)
    axes.set_ylabel("speed-up of decoding, one stream")
    axes.legend(fontsize=8)


def _draw_sweep(axes: Axes, levels: Sequence[SweepLevel]) -> None:
    for mode in ("off", "auto"):
        rates = [sum(level.tokens_per_s[mode]) / len(level.tokens_per_s[mode]) for level in levels]
        axes.plot([level.streams for level in levels], rates, "o-", label=mode)
    axes.set_xscale("log", base=2)
    axes.set_xticks([level.streams for level in levels], [str(level.streams) for level in levels])
    axes.set(xlabel="streams", ylabel="output tokens per second", ylim=(0, None))
    axes.grid(True, alpha=0.2)
    axes.legend(fontsize=8)


def draw(
    path: Path, title: str, summaries: Sequence[ModeSummary], levels: Sequence[SweepLevel]
) -> None:
    """Write the charts to a PNG file. Raises OSError where that cannot be written."""
    num_panels = 2 if levels else 1
    figure = Figure(figsize=(8 * num_panels, 5), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    _draw_groups(panels[0], summaries)
    if levels:
        _draw_sweep(panels[1], levels)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)
