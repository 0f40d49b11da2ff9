"""Linear kernels against the limits of the machine: `python -m bench.kernels`.

First measures how fast this machine reads memory and how many operations its instructions do at
most, then the kernels of every format at the shapes of real models. The weights come from memory
as in a model, the activations from the caches. `share` is the share of the limit that a kernel
reached: the longer of reading its weights and doing its operations, over the time it took.
"""

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import fulcrum_core
import msgspec

from bench import roofline
from bench.roofline import Case, Limits, Settings
from bench.shapes import MODELS, Layer
from engine.machine import physical_cores

_MIB = 1 << 20


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"bench.kernels: {message}\n")


def _list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def parse_list(text: str) -> list[Any]:
        return list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))

    return parse_list


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 3600:
        raise argparse.ArgumentTypeError(f"'{text}' is no number of seconds above 0")
    return value


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"unknown '{text}': choose from {', '.join(names)}")
        return text

    return parse


def _shape(text: str) -> Layer:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is no shape: write N and K as 4096x11008")
    return Layer(text, int(parts[0]), int(parts[1]))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with code 2 and one line where it cannot work."""
    parser = _OneLineParser(prog="python -m bench.kernels", description=__doc__)
    add = parser.add_argument
    cores = physical_cores()
    add(
        "--models",
        type=_list_of(_one_of([*MODELS, "all"])),
        help=f"{', '.join(MODELS)} or all (default smollm2-135m)",
    )
    add(
        "--shapes",
        type=_list_of(_shape),
        default=[],
        metavar="NxK,…",
        help="layers to measure, N and K as 4096x11008; instead of a model unless one is named",
    )
    add(
        "--formats",
        type=_list_of(_one_of(roofline.FORMATS)),
        default=list(roofline.USUAL_FORMATS),
        help=f"of {', '.join(roofline.FORMATS)} (default {','.join(roofline.USUAL_FORMATS)})",
    )
    add(
        "--rows",
        type=_list_of(_positive),
        default=[1, 2, 4, 8, 16, 32, 64, 512],
        help="rows of activations, T (default 1,2,4,8,16,32,64,512)",
    )
    add(
        "--threads",
        type=_list_of(_positive),
        default=sorted({1, cores}),
        help="default: 1 and the physical cores",
    )
    add("--isa", choices=fulcrum_core.isas(), default=fulcrum_core.detect_isa())
    add(
        "--set-mib",
        type=_positive,
        default=512,
        help="memory read to measure bandwidth, and most that a layer's copies take (%(default)s)",
    )
    add("--seconds-per-case", type=_seconds, default=0.2, help="(%(default)s)")
    add("--json", type=Path, help="write all figures to this file")
    add("--plot", type=Path, help="draw the roofline to this PNG file (needs matplotlib)")
    options = parser.parse_args(arguments)
    for path in (options.json, options.plot):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{path}: no such folder")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install '.[bench]'")
    return options


def _chosen(options: argparse.Namespace) -> dict[str, tuple[Layer, ...]]:
    names = options.models or ([] if options.shapes else ["smollm2-135m"])
    if "all" in names:
        names = list(MODELS)
    chosen = {name: MODELS[name] for name in names}
    if options.shapes:
        chosen["shapes"] = tuple(options.shapes)
    return chosen


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> str:
    """A table; the first num_left columns are aligned on the left."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < num_left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def limits_table(limits: Sequence[Limits], options: argparse.Namespace) -> str:
    """The machine's limits, a line for each number of threads."""
    small_mib = min(roofline.SMALL_SET_BYTES // _MIB, options.set_mib)
    header = ["threads", f"memory {options.set_mib} MiB", f"{small_mib} MiB set", "L3"]
    rows = [
        [
            str(limit.num_threads),
            f"{limit.memory_gb_per_s:.1f} GB/s",
            f"{limit.small_set_gb_per_s:.1f} GB/s",
            "-" if limit.l3_gb_per_s is None else f"{limit.l3_gb_per_s:.1f} GB/s",
            *(f"{limit.peak_gop_per_s[kind]:.0f} GOP/s" for kind in roofline.PEAKS),
        ]
        for limit in limits
    ]
    return _lay_out([*header, *(f"{kind} peak" for kind in roofline.PEAKS)], rows, 0)


def cases_table(cases: Sequence[Case]) -> str:
    """Every case, a line each."""
    header = ["model", "layer", "NxK", "format", "threads", "rows"]
    header += ["us", "GB/s", "GOP/s", "share", "bound"]
    rows = [
        [
            case.model,
            case.layer.name,
            f"{case.layer.num_rows}x{case.layer.num_cols}",
            case.format,
            str(case.num_threads),
            str(case.num_tokens),
            f"{case.time_s * 1e6:.1f}",
            f"{case.gb_per_s:.1f}",
            f"{case.gop_per_s:.0f}",
            f"{case.share:.0%}",
            case.bound,
        ]
        for case in cases
    ]
    return _lay_out(header, rows, 4)


def summary_table(cases: Sequence[Case], tokens: Sequence[int]) -> str:
    """Share of the limit over all layers of a model, as often as it has them, by rows."""
    groups: dict[tuple[str, str, int], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.model, case.format, case.num_threads), []).append(case)

    def share(group: list[Case], num_tokens: int) -> str:
        of_rows = [case for case in group if case.num_tokens == num_tokens]
        time_s = sum(case.layer.count * case.time_s for case in of_rows)
        floor_s = sum(case.layer.count * case.floor_s for case in of_rows)
        return f"{floor_s / time_s:.0%}" if of_rows else "-"

    rows = [
        [model, weight_format, str(threads), *(share(group, count) for count in tokens)]
        for (model, weight_format, threads), group in groups.items()
    ]
    return _lay_out(["model", "format", "threads", *map(str, tokens)], rows, 2)


def measure(options: argparse.Namespace, title: str) -> tuple[list[Limits], list[Case]]:
    """Measure and print the machine's limits and the cases."""
    settings = Settings(
        options.isa,
        options.formats,
        options.threads,
        options.rows,
        options.set_mib * _MIB,
        options.seconds_per_case,
    )
    print(title, flush=True)
    limits = roofline.measure_limits(settings)
    print(f"\n{limits_table(limits, options)}\n", flush=True)
    cases: list[Case] = []
    for model, layers in _chosen(options).items():
        for weight_format in options.formats:
            for layer in layers:
                cases += roofline.measure_layer(model, layers, layer, weight_format, settings)
                print(f"{model} {weight_format} {layer.name}: done", file=sys.stderr)
    print(f"{cases_table(cases)}\n\nshare of the limit over all layers, by rows")
    print(summary_table(cases, options.rows))
    return limits, cases


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write JSON and plot; 2 with one line when that cannot work."""
    options = parse_options(arguments)
    threads = ", ".join(map(str, options.threads))
    # Above the cores that are left, the figures are those of a machine shared with others.
    load = os.getloadavg()[0]
    title = (
        f"{_cpu_name()}, {options.isa}, threads: {threads} of {physical_cores()} cores, "
        f"load average before: {load:.1f}"
    )
    try:
        limits, cases = measure(options, title)
        if options.json:
            machine = {
                "cpu": _cpu_name(),
                "isa": options.isa,
                "physical_cores": physical_cores(),
                "l3_bytes": roofline.l3_bytes(),
                "load_average_before": load,
                "limits": limits,
            }
            settings = {
                "set_mib": options.set_mib,
                "seconds_per_case": options.seconds_per_case,
                "rows": options.rows,
                "formats": options.formats,
                "threads": options.threads,
            }
            document = {"machine": machine, "settings": settings, "cases": cases}
            options.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
        if options.plot:
            from bench.roofline_plot import draw

            draw(options.plot, title, limits, cases)
    except (OSError, ValueError) as failure:
        print(f"bench.kernels: {failure}", file=sys.stderr)
        return 2
    except MemoryError:
        print("bench.kernels: not enough memory: use a lower --set-mib", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
