"""Cuts text into the words that byte-pair merging works on: the pre-tokenizers of a tokenizer.json
and the ones that GGUF files name. Used by the loaders; `PreTokenizer` by `BpeEncoder`.
"""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import regex  # type: ignore[import-untyped]

from engine.tokenizer.errors import TokenizerError

# A stage cuts one piece into smaller ones; the flag says that the piece starts the whole text.
Stage = Callable[[str, bool], list[str]]
# Offsets in the piece, and whether the pattern matched there.
Span = tuple[int, int, bool]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGIT = r"\p{N}"

# tokenizer.ggml.pre -> patterns, each of which isolates its matches in turn.
GGUF_PATTERNS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "starcoder": (_DIGIT, _GPT2),
    "refact": (_DIGIT, _GPT2),
    "codeshell": (_DIGIT, _GPT2),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "tekken": (_TEKKEN,),
}


class PreTokenizer:
    """Stages applied one after the other, each to every piece of the one before."""

    def __init__(self, stages: list[Stage]) -> None:
        self._stages = tuple(stages)

    def words(self, text: str, *, at_start: bool) -> list[str]:
        """Non-empty words, in order."""
        pieces = [text]
        for stage in self._stages:
            starts = chain((at_start,), iter(lambda: False, True))
            pieces = list(chain.from_iterable(map(stage, pieces, starts)))
        return pieces


def pre_tokenizer_from_gguf(name: str, *, source: str) -> PreTokenizer:
    patterns = GGUF_PATTERNS.get(name)
    if patterns is None:
        raise TokenizerError(
            f"{source}: pre-tokenizer {name!r} is not supported; known are "
            + ", ".join(sorted(GGUF_PATTERNS))
        )
    return PreTokenizer([partial(_isolate, regex.compile(pattern)) for pattern in patterns])


def pre_tokenizer_from_json(spec: dict[str, Any] | None, *, source: str) -> PreTokenizer:
    return PreTokenizer(_stages_from_json(spec, source))


def is_byte_level(spec: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer ends by writing bytes in the GPT-2 alphabet."""
    if spec is None:
        return False
    if spec["type"] == "Sequence":
        return bool(spec["pretokenizers"]) and is_byte_level(spec["pretokenizers"][-1])
    return bool(spec["type"] == "ByteLevel")


def compile_pattern(pattern: dict[str, str], *, source: str) -> "regex.Pattern[str]":
    """The `{"Regex": …}` or `{"String": …}` of a tokenizer.json."""
    if "Regex" not in pattern:
        return regex.compile(regex.escape(pattern["String"]))
    text = pattern["Regex"]
    _refuse_other_dialect(text, source)
    try:
        return regex.compile(text)
    except regex.error as error:
        raise TokenizerError(f"{source}: pattern {text!r} is not supported: {error}") from None


def _refuse_other_dialect(text: str, source: str) -> None:
    """Raise for what Oniguruma, in whose dialect these files are written, understands otherwise:
    its word characters and boundaries, `\\h`, sets within sets and their intersection."""
    inside_set = False
    for match in regex.finditer(r"\\.|&&|\[:|\[|\]", text, regex.DOTALL):
        found = match.group()
        nested = inside_set and found == "["
        if nested or found in ("&&", "\\w", "\\W", "\\b", "\\B", "\\h", "\\H"):
            raise TokenizerError(f"{source}: pattern {text!r} is not supported: it has {found!r}")
        if found in ("[", "]"):
            inside_set = found == "["


def _stages_from_json(spec: dict[str, Any] | None, source: str) -> list[Stage]:
    if spec is None:
        return []
    kind = spec.get("type")
    if kind == "Sequence":
        inner = spec["pretokenizers"]
        if any(is_byte_level(one) for one in inner[:-1]):
            raise TokenizerError(f"{source}: a pre-tokenizer after ByteLevel is not supported")
        return [stage for one in inner for stage in _stages_from_json(one, source)]
    if kind == "ByteLevel":
        stages: list[Stage] = [_prefix_space] if spec.get("add_prefix_space", True) else []
        if spec.get("use_regex", True):
            stages.append(partial(_isolate, regex.compile(_GPT2)))
        return stages
    if kind == "Digits":
        run = _DIGIT if spec.get("individual_digits", False) else _DIGIT + "+"
        return [partial(_isolate, regex.compile(run))]
    if kind == "Split":
        pattern = compile_pattern(spec["pattern"], source=source)
        return [_splitter(pattern, spec["behavior"], bool(spec.get("invert", False)), source)]
    if kind == "Punctuation":
        pattern = regex.compile(r"[!-/:-@\[-`{-~\p{P}]")
        return [_splitter(pattern, spec.get("behavior", "Isolated"), False, source)]
    if kind == "Metaspace":
        return _metaspace(spec, source)
    raise TokenizerError(f"{source}: pre-tokenizer {kind!r} is not supported")


def _prefix_space(piece: str, _at_start: bool) -> list[str]:
    return [piece if piece.startswith(" ") else " " + piece]


def _metaspace(spec: dict[str, Any], source: str) -> list[Stage]:
    mark = spec.get("replacement", "▁")
    scheme = spec.get("prepend_scheme", "always" if spec.get("add_prefix_space", True) else "never")

    def replace(piece: str, at_start: bool) -> list[str]:
        marked = piece.replace(" ", mark)
        wanted = scheme == "always" or (scheme == "first" and at_start)
        return [mark + marked if wanted and not marked.startswith(mark) else marked]

    stages: list[Stage] = [replace]
    if spec.get("split", True):
        stages.append(_splitter(regex.compile(regex.escape(mark)), "MergedWithNext", False, source))
    return stages


def _isolate(pattern: "regex.Pattern[str]", piece: str, _at_start: bool) -> list[str]:
    """Every match and every stretch between matches is a piece."""
    if len(piece) == 1:
        return [piece]
    if not pattern.groups:
        # Most patterns match everything, and then findall is several times faster.
        found: list[str] = pattern.findall(piece)
        if sum(map(len, found)) == len(piece):
            return [word for word in found if word]
    return [piece[start:stop] for start, stop, _ in _spans(pattern, piece)]


def _spans(pattern: "regex.Pattern[str]", piece: str) -> list[Span]:
    """All of the piece, cut where matches begin and end."""
    spans: list[Span] = []
    end = 0
    for match in pattern.finditer(piece):
        start, stop = match.span()
        if start == stop:
            continue
        if end < start:
            spans.append((end, start, False))
        spans.append((start, stop, True))
        end = stop
    if end < len(piece):
        spans.append((end, len(piece), False))
    return spans


def _splitter(pattern: "regex.Pattern[str]", behavior: str, invert: bool, source: str) -> Stage:
    """The stage for a Split: `behavior` says what becomes of the matches, or with `invert` of
    what lies between them."""
    if behavior == "Isolated":
        return partial(_isolate, pattern)
    join = _JOINS.get(behavior)
    if join is None:
        raise TokenizerError(f"{source}: split behavior {behavior!r} is not supported")

    def stage(piece: str, _at_start: bool) -> list[str]:
        spans = [(start, stop, match != invert) for start, stop, match in _spans(pattern, piece)]
        return [piece[start:stop] for start, stop, _ in join(spans)]

    return stage


def _removed(spans: list[Span]) -> list[Span]:
    return [span for span in spans if not span[2]]


def _contiguous(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    for start, stop, match in spans:
        if joined and joined[-1][2] == match:
            start = joined.pop()[0]
        joined.append((start, stop, match))
    return joined


def _merged_with_previous(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    after_match = False
    for start, stop, match in spans:
        if match and not after_match and joined:
            start = joined.pop()[0]
        joined.append((start, stop, match))
        after_match = match
    return joined


def _merged_with_next(spans: list[Span]) -> list[Span]:
    joined: list[Span] = []
    before_match = False
    for start, stop, match in reversed(spans):
        if match and not before_match and joined:
            stop = joined.pop()[1]
        joined.append((start, stop, match))
        before_match = match
    return joined[::-1]


_JOINS: dict[str, Callable[[list[Span]], list[Span]]] = {
    "Removed": _removed,
    "Contiguous": _contiguous,
    "MergedWithPrevious": _merged_with_previous,
    "MergedWithNext": _merged_with_next,
}
