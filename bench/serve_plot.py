"""The charts of bench.serve, with matplotlib, which only the `bench` extra installs.

Output tokens per second by concurrency, and beside them, where it was measured, the speed of one
stream by the length of its prompt.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.summary import Level


def _draw(axes: Axes, label: str, sizes: Sequence[float], rates: Sequence[float]) -> None:
    axes.plot(sizes, rates, "o-")
    for size, rate in zip(sizes, rates, strict=True):
        axes.annotate(
            f"{rate:.0f}", (size, rate), textcoords="offset points", xytext=(0, 6), ha="center"
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:.0f}" for size in sizes])
    axes.set(xlabel=label, ylabel="output tokens per second", ylim=(0, 1.1 * max(rates)))
    axes.grid(True, alpha=0.2)


def _draw_contexts(axes: Axes, contexts: Sequence[Level]) -> None:
    """Speed of decoding: what the prompt itself takes is left out."""
    points = [
        (level.mean_prompt_tokens, 1e3 / level.tpot.p50_ms)
        for level in contexts
        if level.mean_prompt_tokens and level.tpot.p50_ms
    ]
    if points:
        _draw(
            axes,
            "tokens of the prompt (one stream, after its first token)",
            *zip(*points, strict=True),
        )


def draw(path: Path, title: str, levels: Sequence[Level], contexts: Sequence[Level]) -> None:
    """Write the charts to a PNG file. Raises OSError where that cannot be written."""
    num_panels = 2 if contexts else 1
    figure = Figure(figsize=(7 * num_panels, 5), layout="constrained")
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    concurrency = [level.concurrency for level in levels]
    _draw(panels[0], "streams", concurrency, [level.output_tokens_per_s for level in levels])
    if contexts:
        _draw_contexts(panels[1], contexts)
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)
