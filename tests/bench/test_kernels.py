"""bench.kernels with shapes and times so small that the figures mean nothing, but must agree."""

import json
import sys
from pathlib import Path
from typing import Any

import fulcrum_core
import pytest

from bench import kernels, roofline
from bench.shapes import MODELS

TINY = ("--seconds-per-case", "0.001", "--set-mib", "2")
PNG_SIGNATURE = b"\x89PNG"


def measure(tmp_path: Path, *options: str) -> dict[str, Any]:
    path = tmp_path / "figures.json"
    assert kernels.main([*TINY, "--json", str(path), *options]) == 0
    document: dict[str, Any] = json.loads(path.read_text())
    return document


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run over two shapes, every format, one and two threads."""
    options = ("--shapes", "64x96,40x50", "--rows", "1,3", "--threads", "1,2")
    formats = ("--formats", ",".join(roofline.FORMATS))
    return measure(tmp_path_factory.mktemp("kernels"), *options, *formats)


def test_every_combination_is_measured_once(document: dict[str, Any]) -> None:
    cases = [
        (case["layer"]["name"], case["format"], case["num_threads"], case["num_tokens"])
        for case in document["cases"]
    ]
    assert sorted(cases) == sorted(
        (layer, weight_format, threads, tokens)
        for layer in ("64x96", "40x50")
        for weight_format in roofline.FORMATS
        for threads in (1, 2)
        for tokens in (1, 3)
    )


def test_the_machine_and_its_limits_are_given_for_each_number_of_threads(
    document: dict[str, Any],
) -> None:
    machine = document["machine"]
    assert machine["isa"] == fulcrum_core.detect_isa()
    assert [limits["num_threads"] for limits in machine["limits"]] == [1, 2]
    for limits in machine["limits"]:
        assert limits["memory_gb_per_s"] > 0
        assert limits["small_set_gb_per_s"] > 0
        assert (limits["l3_gb_per_s"] is None) == (machine["l3_bytes"] is None)
        assert set(limits["peak_gop_per_s"]) == {"bf16", "int8", "int4"}
        assert min(limits["peak_gop_per_s"].values()) > 0


def test_figures_follow_from_the_measured_times(document: dict[str, Any]) -> None:
    for case in document["cases"]:
        layer = case["layer"]
        shape = (layer["num_rows"], layer["num_cols"])
        assert case["num_repetitions"] >= 3
        assert case["time_s"] > 0
        assert case["operations"] == 2 * shape[0] * shape[1] * case["num_tokens"]
        assert case["weight_bytes"] == fulcrum_core.packed_bytes(
            document["machine"]["isa"], case["format"], *shape
        )
        assert case["gb_per_s"] * case["time_s"] == pytest.approx(case["weight_bytes"] / 1e9)
        assert case["gop_per_s"] * case["time_s"] == pytest.approx(case["operations"] / 1e9)


def test_the_share_is_that_of_the_tighter_limit(document: dict[str, Any]) -> None:
    for case in document["cases"]:
        of_memory = case["gb_per_s"] / case["limit_gb_per_s"]
        of_compute = case["gop_per_s"] / case["limit_gop_per_s"]
        assert case["share"] == pytest.approx(max(of_memory, of_compute))
        assert case["share"] == pytest.approx(case["floor_s"] / case["time_s"])
        assert case["bound"] == ("memory" if of_memory > of_compute else "compute")


@pytest.mark.parametrize("isa", fulcrum_core.isas())
def test_a_kernel_stays_below_a_generous_multiple_of_the_peak(isa: str, tmp_path: Path) -> None:
    """The peak loops must not be optimised away, nor count operations that they do not do."""
    try:
        fulcrum_core.packed_bytes(isa, "int8", 16, 32)
    except ValueError:
        pytest.skip(f"{isa} does not run here")
    options = ("--isa", isa, "--shapes", "256x512", "--rows", "16", "--threads", "1")
    figures = measure(tmp_path, *options, "--seconds-per-case", "0.02")
    assert len(figures["cases"]) == 3
    for case in figures["cases"]:
        # Between them lie what a kernel of any use reaches, and what a busy machine may distort.
        assert 0.02 < case["gop_per_s"] / case["limit_gop_per_s"] < 4


def test_more_iterations_take_longer_in_every_peak_loop() -> None:
    pool = fulcrum_core.ThreadPool(1)
    for kind in roofline.PEAKS:
        few = [fulcrum_core.time_peak("portable", kind, pool, 2_000) for _ in range(5)]
        many = [fulcrum_core.time_peak("portable", kind, pool, 200_000) for _ in range(5)]
        assert many[0][1] == 100 * few[0][1]
        assert min(many)[0] > 10 * min(few)[0]


def test_models_have_the_linear_layers_that_they_are_known_for() -> None:
    num_weights = {
        name: sum(layer.count * layer.num_rows * layer.num_cols for layer in layers)
        for name, layers in MODELS.items()
    }
    # Published parameter counts, less norms; Llama 2's embedding is no head and not multiplied.
    assert num_weights["smollm2-135m"] == pytest.approx(134.5e6, rel=0.001)
    assert num_weights["llama-3.2-1b"] == pytest.approx(1.236e9, rel=0.001)
    assert num_weights["llama-2-7b"] == pytest.approx(6.738e9 - 32000 * 4096, rel=0.001)


def test_logits_are_measured_only_for_as_many_rows_as_a_step_has() -> None:
    output = MODELS["smollm2-135m"][-1]
    assert output.name == "output"
    assert [output.measures(rows) for rows in (1, 32, 64)] == [True, True, False]


def test_the_tables_name_the_machine_and_every_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(tmp_path, "--shapes", "64x96", "--rows", "1,2", "--threads", "1", "--formats", "int4")
    lines = capsys.readouterr().out.splitlines()
    assert f"{fulcrum_core.detect_isa()}, threads: 1" in lines[0]
    assert sum("64x96  int4" in line for line in lines) == 2


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofline.png"
    measure(tmp_path, "--shapes", "64x96", "--rows", "1", "--plot", str(path))
    assert path.read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--models", "gpt-5"], "unknown 'gpt-5': choose from smollm2-135m"),
        (["--rows", "0"], "'0' is no whole number"),
        (["--threads", "two"], "'two' is no whole number"),
        (["--shapes", "64"], "'64' is no shape"),
        (["--formats", "int3"], "unknown 'int3'"),
        (["--seconds-per-case", "-1"], "'-1' is no number of seconds"),
        (["--json", "/no/such/folder/figures.json"], "no such folder"),
        (["--isa", "avx3"], "invalid choice: 'avx3'"),
    ],
)
def test_what_cannot_work_is_one_line_and_exit_code_2(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        kernels.main(options)
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_plot_without_matplotlib_is_one_line_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as exit_info:
        kernels.main(["--plot", str(tmp_path / "roofline.png")])
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err == "bench.kernels: --plot needs matplotlib: pip install '.[bench]'\n"
    assert captured.out == ""
