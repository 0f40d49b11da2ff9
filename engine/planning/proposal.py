"""A proposed setting as the wire and the tools give it, and the EngineConfig that it makes.

One flat object for preview and apply: every field is optional and means today's value where it is
absent. A new setting is a field of `Proposal` and a line of `_CONFIG_FIELDS`.
"""

import re
from typing import Any

import msgspec

from engine.config import ConfigError, EngineConfig

# Proposal's field → EngineConfig's.
_CONFIG_FIELDS = {
    "quantization": "quantization",
    "kv_dtype": "kv_dtype",
    "kv_memory": "kv_memory_bytes",
    "max_model_len": "max_model_len",
    "max_sequences": "max_sequences",
    "speculation": "speculation",
}
SETTINGS = tuple(_CONFIG_FIELDS)

_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?([kmgt]i?b|b|)", re.IGNORECASE)
_EXPONENTS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MAX_COUNT = 1 << 31  # the core's counts are 32 bits wide
_MAX_BYTES = 1 << 50
_MAX_SEQUENCES = 4096


class Proposal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings to change, and the load that speed is predicted for."""

    quantization: str | None = None
    kv_dtype: str | None = None
    kv_memory: int | str | None = None  # bytes, or a size such as "2GiB"
    max_model_len: int | None = None
    max_sequences: int | None = None
    speculation: str | None = None  # who drafts: auto, off, ngram or mtp
    concurrency: int = 8  # sequences that decode together
    prompt_tokens: int = 128
    output_tokens: int = 128

    def __post_init__(self) -> None:
        for name in ("concurrency", "prompt_tokens", "output_tokens"):
            if not 1 <= getattr(self, name) <= _MAX_COUNT:
                raise ConfigError(f"{name}: must be a whole number of at least 1")
        for name, most in (("max_model_len", _MAX_COUNT), ("max_sequences", _MAX_SEQUENCES)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ConfigError(f"{name}: must be from 1 to {most}")

    def changed(self, today: EngineConfig) -> EngineConfig:
        """Today's settings with this proposal's; raises ConfigError for what cannot work."""
        values: dict[str, Any] = {}
        for name, config_name in _CONFIG_FIELDS.items():
            value = getattr(self, name)
            if value is not None:
                values[config_name] = _bytes(value) if name == "kv_memory" else value
        return msgspec.structs.replace(today, **values)


def changes_drafters_only(today: EngineConfig, config: EngineConfig) -> bool:
    """Whether nothing of the model or its cache has to be built to get from one to the other."""
    same = msgspec.structs.replace(today, speculation=config.speculation)
    return same == config and today.speculation != config.speculation


def settings_of(config: EngineConfig) -> dict[str, Any]:
    """The settings of a config by their names in a proposal."""
    return {name: getattr(config, field) for name, field in _CONFIG_FIELDS.items()}


def parse_size(text: str) -> int:
    """Bytes from "512MB", "2GiB" or a plain number; raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text:.40}' is no size; write 512MB, 2GiB or plain bytes")
    unit = match[2].lower()
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** _EXPONENTS[unit.rstrip("b").rstrip("i")])


def _bytes(value: int | str) -> int:
    try:
        num_bytes = parse_size(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ConfigError(f"kv_memory: {error}") from None
    if not 1 <= num_bytes <= _MAX_BYTES:
        raise ConfigError("kv_memory: must be from 1 byte to 1 PiB")
    return num_bytes
