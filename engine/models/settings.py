"""Typed reads from a checkpoint's own settings (config.json, GGUF metadata), with errors that
name the file and the key. The model families read through it."""

from collections.abc import Mapping
from typing import Any

from engine.checkpoint.tensor import CheckpointError


class Settings:
    """A read-only view of `values`. A key whose value is None counts as absent."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source  # for messages: the file, and the section in it

    def __contains__(self, key: str) -> bool:
        """Whether the key is written at all, be it with None."""
        return key in self._values

    def error(self, key: str, problem: str) -> CheckpointError:
        """An error to raise about `key`."""
        return CheckpointError(f"{self.source}: {key} {problem}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.error(key, f"is {_shortened(value)}, not an integer")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self.integer(key, default)
        if value < 1:
            raise self.error(key, f"is {value}; it must be at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.error(key, f"is {_shortened(value)}, not a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {_shortened(value)}, not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"is {_shortened(value)}, not a string")
        return value

    def items(self, key: str) -> list[Any] | None:
        """A list as it is, or None where there is none."""
        value = self._values.get(key)
        if value is not None and not isinstance(value, list):
            raise self.error(key, f"is {_shortened(value)}, not a list")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """One token id, a list of them, or none."""
        value = self._values.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise self.error(key, f"is {_shortened(value)}, not token ids")
        return tuple(values)

    def raw(self, key: str) -> Any:
        """The value as it is, or None."""
        return self._values.get(key)

    def has(self, key: str) -> bool:
        """Whether the key has a value other than None."""
        return self._values.get(key) is not None

    def section(self, key: str) -> "Settings":
        """A nested object; empty where there is none."""
        value = self._values.get(key)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.error(key, f"is {_shortened(value)}, not an object")
        return Settings(value, f"{self.source}: {key}")

    def prefixed(self, prefix: str) -> "Settings":
        """The keys that begin with `prefix`, without it."""
        values = {
            key[len(prefix) :]: value
            for key, value in self._values.items()
            if key.startswith(prefix)
        }
        return Settings(values, f"{self.source}: {prefix}*")

    def replaced(self, **values: Any) -> "Settings":
        """The same settings with some keys set anew."""
        return Settings({**self._values, **values}, self.source)

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Settings":
        """The same settings with values for the keys that are not written."""
        return Settings({**defaults, **self._values}, self.source)

    def _get(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is not None:
            return value
        if default is None:
            raise self.error(key, "is missing")
        return default


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
