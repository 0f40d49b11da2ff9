"""Normalizers of a tokenizer.json, as functions from text to text; used by its loader."""

import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Any

from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.pretokenize import compile_pattern

Normalizer = Callable[[str], str]

_UNICODE_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def normalizer_from_json(spec: dict[str, Any] | None, *, source: str) -> Normalizer | None:
    """The normalizer that `spec` describes; None where it changes nothing."""
    if spec is None:
        return None
    kind = spec.get("type")
    if kind == "Sequence":
        found = (normalizer_from_json(inner, source=source) for inner in spec["normalizers"])
        steps = tuple(step for step in found if step is not None)
        return partial(_apply_all, steps) if steps else None
    if kind in _UNICODE_FORMS:
        return partial(unicodedata.normalize, kind)
    if kind == "Prepend":
        return partial(_prepend, spec["prepend"])
    if kind == "Replace":
        return _replacer(spec["pattern"], spec["content"], source)
    raise TokenizerError(f"{source}: normalizer {kind!r} is not supported")


def _apply_all(steps: tuple[Normalizer, ...], text: str) -> str:
    for step in steps:
        text = step(text)
    return text


def _prepend(prefix: str, text: str) -> str:
    return prefix + text if text else text


def _replacer(pattern: dict[str, str], content: str, source: str) -> Normalizer:
    if "String" in pattern:
        literal = pattern["String"]
        return lambda text: text.replace(literal, content)
    compiled = compile_pattern(pattern, source=source)
    return lambda text: compiled.sub(lambda _: content, text)
