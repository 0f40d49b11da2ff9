"""Options from the command line and from the environment; values that cannot work."""

import socket
from pathlib import Path

import pytest

from engine.config import ConfigError
from server.options import parse_options
from server.run import bind


def test_without_options_the_defaults_of_the_documentation_hold() -> None:
    options = parse_options([], {})
    assert (options.host, options.port, options.log_format) == ("127.0.0.1", 8000, "text")
    assert options.engine.model == "smollm2-135m"
    assert options.settings.api_key is None
    assert options.settings.max_body_bytes == 8 << 20
    assert options.settings.grace_s == 30


def test_every_option_is_read_from_both_places(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("k2\n")
    values = {
        "model": "m",
        "served-model-name": "s",
        "host": "0.0.0.0",
        "port": "81",
        "api-key-file": str(key_file),
        "device": "cpu",
        "quantization": "int8",
        "kv-dtype": "int8",
        "kv-memory": "2GiB",
        "prefix-cache": "1GiB",
        "max-model-len": "100",
        "max-sequences": "3",
        "max-step-tokens": "70",
        "threads": "2",
        "log-format": "json",
        "max-queue": "7",
        "max-body": "1MB",
        "grace-s": "1.5",
        "health-stale-s": "3",
        "stuck-step-s": "8",
        "stalled-reader-s": "4",
        "header-timeout-s": "5",
        "body-timeout-s": "6",
        "max-ttft-s": "7",
        "telemetry": "off",
        "speculation": "mtp",
        "mtp-head": "head",
        "draft-model": "d",
    }
    argv = [part for name, value in values.items() for part in (f"--{name}", value)]
    environ = {f"FULCRUM_{n.replace('-', '_').upper()}": v for n, v in values.items()}
    options = parse_options(argv, {})
    assert parse_options([], environ) == options
    assert options.engine.kv_memory_bytes == 2 << 30
    assert options.engine.max_model_len == 100
    assert options.engine.num_threads == 2
    assert options.settings.api_key == "k2"
    assert options.settings.max_body_bytes == 1_000_000
    assert options.settings.max_sequences == options.engine.max_sequences == 3
    assert options.settings.stalled_reader_s == 4
    # No value above is a default: an option that was dropped on the way would show here.
    defaults = parse_options([], {})
    for part, default in ((options.engine, defaults.engine), (options.settings, defaults.settings)):
        for name in part.__struct_fields__:
            assert name == "isa" or getattr(part, name) != getattr(default, name), name


def test_the_command_line_wins_over_the_environment() -> None:
    assert parse_options(["--port", "1"], {"FULCRUM_PORT": "2"}).port == 1
    assert parse_options([], {"FULCRUM_PORT": "2"}).port == 2
    assert parse_options([], {"FULCRUM_PORT": ""}).port == 8000


@pytest.mark.parametrize(
    ("text", "size"), [("512MB", 512_000_000), ("1.5GiB", 3 << 29), ("77", 77), ("2 kb", 2000)]
)
def test_sizes_are_decimal_or_binary_by_their_unit(text: str, size: int) -> None:
    assert parse_options(["--kv-memory", text], {}).engine.kv_memory_bytes == size


@pytest.mark.parametrize(
    "argv",
    [
        ["--port", "65536"],
        ["--port", "-1"],
        ["--port", "x"],
        ["--quantization", "int3"],
        ["--device", "tpu"],
        ["--kv-memory", "lots"],
        ["--kv-memory", "5 XB"],
        ["--kv-memory", "0"],
        ["--max-sequences", "0"],
        ["--max-step-tokens", "8"],
        ["--threads", "1.5"],
        ["--grace-s", "nan"],
        ["--grace-s", "-1"],
        ["--health-stale-s", "0"],
        ["--health-stale-s", "90"],
        ["--log-format", "xml"],
        ["--max-body", "0"],
        ["--api-key", ""],
        ["--api-key", "two words"],
        ["--api-key-file", "/no/such/file"],
        ["--api-key", "a", "--api-key-file", "b"],
        ["--served-model-name", ""],
        ["--no-such-option", "1"],
        ["--por", "1"],
    ],
    ids=" ".join,
)
def test_a_value_that_cannot_work_is_one_line_and_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(argv, {})
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert argv[0] in line


def test_an_environment_variable_that_cannot_work_is_an_error_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options([], {"FULCRUM_PORT": "x"})
    assert caught.value.code == 2
    assert "--port" in capsys.readouterr().err


def test_a_port_in_use_and_an_unknown_host_are_config_errors() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            bind("127.0.0.1", port)
    with pytest.raises(ConfigError, match="--host"):
        bind("no such host", 0)


def test_a_key_on_the_command_line_wins_over_one_in_the_environment(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("from-file")
    argv = ["--api-key-file", str(key_file)]
    assert parse_options(argv, {"FULCRUM_API_KEY": "k"}).settings.api_key == "from-file"


def test_an_empty_key_in_the_environment_does_not_open_the_server() -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_options([], {"FULCRUM_API_KEY": ""})
    assert exit_info.value.code == 2


def test_a_host_that_is_no_name_is_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        bind("foo..bar", 0)
