"""Command line options, each also readable as FULCRUM_<NAME>; the command line wins.

`__main__` parses them once. A value that cannot work ends the program with one line and exit
code 2, before anything is loaded.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, cast

import msgspec

from engine.config import QUANTIZATIONS, SPECULATION_MODES, ConfigError, EngineConfig
from engine.planning import proposal
from server.http import Settings
from server.logs import LogFormat

_KEY_OPTIONS = ("--api-key", "--api-key-file")
_KEY_VARIABLES = ("FULCRUM_API_KEY", "FULCRUM_API_KEY_FILE")


class Options(msgspec.Struct, frozen=True, kw_only=True):
    engine: EngineConfig
    settings: Settings
    served_model_name: str | None
    host: str
    port: int
    log_format: LogFormat
    receipts: Path | None  # None: in the cache folder


def parse_options(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """Options from both places; exits with code 2 and one line if one cannot work."""
    parser = _build_parser()
    from_environ = []
    has_key_option = any(argument.split("=")[0] in _KEY_OPTIONS for argument in argv)
    for action in parser._actions:
        variable = environment_variable(action.option_strings[-1])
        # An empty variable counts as unset, but an empty key must not come to mean no key.
        is_key = variable in _KEY_VARIABLES
        is_given = variable in environ if is_key else bool(environ.get(variable))
        if action.nargs != 0 and is_given and not (is_key and has_key_option):
            from_environ.append(f"{action.option_strings[-1]}={environ[variable]}")
    args = parser.parse_args([*from_environ, *argv])
    try:
        return _to_options(args)
    except ConfigError as error:
        parser.error(str(error))


def environment_variable(flag: str) -> str:
    return "FULCRUM_" + flag.removeprefix("--").replace("-", "_").upper()


def parse_size(text: str) -> int:
    """Bytes from "512MB", "2GiB" or a plain number."""
    try:
        return proposal.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _build_parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m server",
        description="Serve a language model over OpenAI's HTTP API.",
        epilog="Every option can also be set as FULCRUM_<NAME>, e.g. FULCRUM_MAX_QUEUE=32.",
        allow_abbrev=False,
    )
    _add_model_options(parser)
    _add_http_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    defaults = EngineConfig()
    group = parser.add_argument_group("model and engine")
    group.add_argument(
        "--model",
        default=defaults.model,
        help="short name, folder, .gguf file or hub id (default: %(default)s)",
    )
    group.add_argument("--served-model-name", help="name in the API (default: the model's own)")
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default=defaults.device)
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default=defaults.quantization,
        help="weights' format; none is bf16, auto keeps what the file has (default: auto)",
    )
    group.add_argument(
        "--kv-dtype",
        choices=("auto", "bf16", "int8"),
        default=defaults.kv_dtype,
        help="keys' and values' format; auto is bf16 unless --kv-memory asks for less "
        "(default: auto)",
    )
    group.add_argument(
        "--kv-memory", type=parse_size, help="memory of the KV cache, e.g. 512MB or 2GiB"
    )
    group.add_argument(
        "--prefix-cache",
        type=parse_size,
        help="of the KV memory, what text of ended requests may keep (default: all of a given "
        "--kv-memory, else 256 MiB or as much as the weights)",
    )
    group.add_argument(
        "--max-model-len", type=_count(1), help="tokens of prompt and output together"
    )
    group.add_argument(
        "--max-sequences",
        type=_count(1),
        default=defaults.max_sequences,
        help="sequences computed at once (default: %(default)s)",
    )
    group.add_argument(
        "--max-step-tokens",
        type=_count(1),
        default=defaults.max_step_tokens,
        help="tokens computed in one step (default: %(default)s)",
    )
    group.add_argument(
        "--speculation",
        choices=SPECULATION_MODES,
        default=defaults.speculation,
        help="who drafts tokens for the model to verify, text unchanged (default: %(default)s)",
    )
    group.add_argument("--mtp-head", help="folder of a head that was trained for the model")
    group.add_argument(
        "--draft-model", help="a smaller model of the same vocabulary that drafts, as --model"
    )
    group.add_argument("--threads", type=_count(1), help="compute threads (default: one per core)")


def _add_http_options(parser: argparse.ArgumentParser) -> None:
    defaults = Settings()
    group = parser.add_argument_group("HTTP")
    group.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    group.add_argument(
        "--port", type=_count(0, 65535), default=8000, help="0 picks a free one (default: 8000)"
    )
    group.add_argument("--api-key", help="ask clients for this key")
    group.add_argument("--api-key-file", type=Path, help="the same, read from a file")
    group.add_argument(
        "--max-queue",
        type=_count(0),
        default=defaults.max_queue,
        help="sequences that may wait; beyond them 429 (default: %(default)s)",
    )
    group.add_argument(
        "--max-body",
        type=parse_size,
        default=defaults.max_body_bytes,
        help="largest request body; beyond it 413 (default: 8MiB)",
    )
    group.add_argument(
        "--grace-s",
        type=_seconds(0.0),
        default=defaults.grace_s,
        help="on SIGTERM, time for running requests to finish (default: %(default)s)",
    )
    group.add_argument(
        "--health-stale-s",
        type=_seconds(1.0),
        default=defaults.health_stale_s,
        help="age of the engine's heartbeat that makes /health fail (default: %(default)s)",
    )
    group.add_argument(
        "--stuck-step-s",
        type=_seconds(1.0),
        default=defaults.stuck_step_s,
        help="age of that heartbeat that ends open requests with an error (default: %(default)s)",
    )
    group.add_argument(
        "--stalled-reader-s",
        type=_seconds(1.0),
        default=defaults.stalled_reader_s,
        help="time without reading after which a stream is closed (default: %(default)s)",
    )
    group.add_argument(
        "--max-ttft-s",
        type=_seconds(0.0),
        default=defaults.max_ttft_s,
        help="beyond this predicted time to the first token 429 (default: %(default)s)",
    )
    group.add_argument(
        "--header-timeout-s",
        type=_seconds(0.1),
        default=defaults.header_timeout_s,
        help="time for a request's headers (default: %(default)s)",
    )
    group.add_argument(
        "--body-timeout-s",
        type=_seconds(0.1),
        default=defaults.body_timeout_s,
        help="time for a request's body, longer if it comes at 16 KiB/s (default: %(default)s)",
    )
    group.add_argument(
        "--telemetry",
        choices=("auto", "host", "gpu", "off"),
        default=defaults.telemetry,
        help="whose sensors decide on admission; auto: the device that computes (default: auto)",
    )
    group.add_argument(
        "--receipts",
        type=Path,
        help="file that receipts of applied settings are added to "
        "(default: receipts.jsonl in the cache folder)",
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text")


def _to_options(args: argparse.Namespace) -> Options:
    if args.served_model_name == "":
        raise ConfigError("--served-model-name: must not be empty")
    if args.max_body < 1:
        raise ConfigError("--max-body: must be at least 1 byte")
    if args.stuck_step_s < args.health_stale_s:
        raise ConfigError("--stuck-step-s: must be at least --health-stale-s")
    return Options(
        engine=EngineConfig(
            model=args.model,
            device=args.device,
            quantization=args.quantization,
            kv_dtype=args.kv_dtype,
            kv_memory_bytes=args.kv_memory,
            prefix_cache_bytes=args.prefix_cache,
            max_model_len=args.max_model_len,
            max_sequences=args.max_sequences,
            max_step_tokens=args.max_step_tokens,
            num_threads=args.threads,
            speculation=args.speculation,
            mtp_head=args.mtp_head,
            draft_model=args.draft_model,
        ),
        settings=Settings(
            api_key=_api_key(args.api_key, args.api_key_file),
            max_body_bytes=args.max_body,
            max_sequences=args.max_sequences,
            max_queue=args.max_queue,
            grace_s=args.grace_s,
            health_stale_s=args.health_stale_s,
            stuck_step_s=args.stuck_step_s,
            stalled_reader_s=args.stalled_reader_s,
            header_timeout_s=args.header_timeout_s,
            body_timeout_s=args.body_timeout_s,
            max_ttft_s=args.max_ttft_s,
            max_step_tokens=args.max_step_tokens,
            telemetry=args.telemetry,
        ),
        served_model_name=args.served_model_name,
        host=args.host,
        port=args.port,
        log_format=cast(LogFormat, args.log_format),
        receipts=args.receipts,
    )


def _api_key(key: str | None, file: Path | None) -> str | None:
    if file is None and key is None:
        return None
    if file is not None and key is not None:
        raise ConfigError("--api-key and --api-key-file: give one of them")
    name = "--api-key"
    if file is not None:
        name = f"--api-key-file {file}"
        try:
            key = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ConfigError(f"{name}: {reason}") from None
    if not key or re.fullmatch(r"[\x21-\x7e]+", key) is None:
        raise ConfigError(f"{name}: a key is one or more printable ASCII characters, no spaces")
    return key


def _count(low: int, high: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text) if re.fullmatch(r"\d{1,12}", text) else -1
        if value < low or (high is not None and value > high):
            bound = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number {bound}")
        return value

    return parse


def _seconds(low: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of seconds from {low:g}")
        return value

    return parse
