"""The roofline plot of bench.kernels, with matplotlib, which only the `bench` extra installs.

One panel for each number of threads: the limits of the machine as lines, every case as a point at
its operations per byte of weights.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.roofline import FORMATS, USUAL_FORMATS, Case, Limits

_COLORS = {name: f"C{i}" for i, name in enumerate(dict.fromkeys((*USUAL_FORMATS, *FORMATS)))}
_PEAK_COLORS = {"bf16": "tab:blue", "int8": "tab:orange", "int4": "tab:green"}
_MARKERS = "os^Dv"


def _draw_limits(axes: Axes, limits: Limits, intensities: tuple[float, float]) -> None:
    top = max(limits.peak_gop_per_s.values())
    slopes = [
        ("memory", limits.memory_gb_per_s, "-"),
        ("small set", limits.small_set_gb_per_s, "--"),
        ("L3", limits.l3_gb_per_s, ":"),
    ]
    for name, bandwidth, style in slopes:
        if bandwidth is None:
            continue
        # Up to the highest peak, where the roof turns flat.
        ends = [intensities[0], min(intensities[1], top / bandwidth)]
        label = f"{name}: {bandwidth:.0f} GB/s"
        axes.plot(ends, [bandwidth * end for end in ends], f"k{style}", lw=1, label=label)
    for kind, peak in limits.peak_gop_per_s.items():
        color, label = _PEAK_COLORS[kind], f"{kind} peak: {peak:.0f} GOP/s"
        axes.axhline(peak, color=color, lw=1, ls="--", label=label)


def _draw_cases(axes: Axes, cases: Sequence[Case], markers: dict[str, str]) -> None:
    for model, weight_format in dict.fromkeys((case.model, case.format) for case in cases):
        points = [case for case in cases if (case.model, case.format) == (model, weight_format)]
        axes.plot(
            [case.operations / case.weight_bytes for case in points],
            [case.gop_per_s for case in points],
            markers[model],
            color=_COLORS[weight_format],
            ms=4,
            alpha=0.7,
            label=f"{model} {weight_format}",
        )


def draw(path: Path, title: str, limits: Sequence[Limits], cases: Sequence[Case]) -> None:
    """Write the plot to a PNG file. Raises OSError where that cannot be written."""
    models = dict.fromkeys(case.model for case in cases)
    markers = {model: _MARKERS[i % len(_MARKERS)] for i, model in enumerate(models)}
    intensities = [case.operations / case.weight_bytes for case in cases]
    ends = (min(intensities) / 1.5, max(intensities) * 1.5)
    figure = Figure(figsize=(7 * len(limits), 6), layout="constrained")
    panels = figure.subplots(1, len(limits), sharey=True, squeeze=False)[0]
    for axes, limit in zip(panels, limits, strict=True):
        _draw_limits(axes, limit, ends)
        _draw_cases(axes, [c for c in cases if c.num_threads == limit.num_threads], markers)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights", xlim=ends)
        axes.set_title(f"{limit.num_threads} thread{'s' if limit.num_threads > 1 else ''}")
        axes.grid(True, which="both", alpha=0.2)
        axes.legend(fontsize=7, loc="lower right")
    panels[0].set_ylabel("GOP/s (2 a multiply-add)")
    figure.suptitle(title)
    figure.savefig(path, format="png", dpi=120)
