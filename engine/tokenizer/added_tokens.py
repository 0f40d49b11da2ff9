"""Tokens that are found in the text before anything else is: control tokens and user-defined
ones. Splits a text into their ids and the stretches between; used by `TextTokenizer`.
"""

import re
from collections.abc import Callable, Iterable, Iterator

import msgspec

_WORD = re.compile(r"\w")


class AddedToken(msgspec.Struct, frozen=True):
    """One token of this kind, with the matching rules of a tokenizer.json's `added_tokens`."""

    token_id: int
    content: str
    special: bool  # a control token: plain text unless the caller parses control tokens
    normalized: bool = False  # looked for after normalization, and itself normalized
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False
    single_word: bool = False  # only where no word character touches it


def longest_match_pattern(spellings: Iterable[str]) -> str:
    """A regular expression for the longest of the spellings at a position.

    It is a prefix tree, since alternatives tried one by one take too long for the thousands
    of added tokens that some vocabularies have.
    """
    ordered = sorted(set(spellings))
    return _tree_pattern(ordered, 0, len(ordered), 0)


def _tree_pattern(ordered: list[str], begin: int, end: int, depth: int) -> str:
    """Pattern of ordered[begin:end], which agree in their first `depth` characters."""
    first, last = ordered[begin], ordered[end - 1]
    common = depth
    while common < min(len(first), len(last)) and first[common] == last[common]:
        common += 1
    prefix = re.escape(first[depth:common])
    ends_here = len(first) == common
    begin += ends_here
    branches = []
    while begin < end:
        stop = begin + 1
        while stop < end and ordered[stop][common] == ordered[begin][common]:
            stop += 1
        branches.append(_tree_pattern(ordered, begin, stop, common))
        begin = stop
    if not branches:
        return prefix
    return f"{prefix}(?:{'|'.join(branches)}){'?' if ends_here else ''}"


class _Matcher:
    """Finds one group of added tokens, leftmost first and longest first."""

    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        self._tokens = tokens
        pattern = longest_match_pattern(tokens) if tokens else r"(?!)"
        self._find = re.compile(pattern).finditer
        self._firsts = frozenset(spelling[0] for spelling in tokens)

    def split(self, text: str) -> Iterator[str | int]:
        # Most texts hold none of the first characters, and `in` is far faster than a search.
        if not any(first in text for first in self._firsts):
            yield text
            return
        begin = 0
        for match in self._find(text):
            token = self._tokens[match.group()]
            start, stop = match.span()
            if start < begin:
                continue
            if token.single_word and _touches_word(text, start, stop):
                continue
            while token.lstrip and start > begin and _is_white(text[start - 1]):
                start -= 1
            while token.rstrip and stop < len(text) and _is_white(text[stop]):
                stop += 1
            if begin < start:
                yield text[begin:start]
            yield token.token_id
            begin = stop
        if begin < len(text):
            yield text[begin:]


def _is_white(char: str) -> bool:
    # str.isspace also counts the separators of files to units, which Unicode does not.
    return char.isspace() and not "\x1c" <= char <= "\x1f"


def _touches_word(text: str, start: int, stop: int) -> bool:
    before = start > 0 and _WORD.match(text[start - 1])
    after = stop < len(text) and _WORD.match(text[stop])
    return bool(before or after)


class AddedTokens:
    """All added tokens of a vocabulary, with the normalizer that lies between the two searches."""

    def __init__(
        self, tokens: Iterable[AddedToken], normalize: Callable[[str], str] | None = None
    ) -> None:
        self.tokens = tuple(token for token in tokens if token.content)
        self._normalize = normalize
        self._matchers = {
            parse_special: self._matchers_for(parse_special) for parse_special in (False, True)
        }

    def _matchers_for(self, parse_special: bool) -> tuple[_Matcher, _Matcher]:
        raw: dict[str, AddedToken] = {}
        normalized: dict[str, AddedToken] = {}
        for token in self.tokens:
            if token.special and not parse_special:
                continue
            if token.normalized and self._normalize is not None:
                normalized[self._normalize(token.content)] = token
            else:
                raw[token.content] = token
        return _Matcher(raw), _Matcher(normalized)

    def split(self, text: str, *, parse_special: bool) -> Iterator[str | int]:
        """Ids of the added tokens and, normalized, the non-empty text between them, in order."""
        raw, normalized = self._matchers[parse_special]
        for part in raw.split(text) if text else ():
            if isinstance(part, int):
                yield part
                continue
            clean = part if self._normalize is None else self._normalize(part)
            if clean:
                yield from normalized.split(clean)
