"""Keeps what a client writes from becoming a control token once a chat template has set it among
real ones. Used by chat_template.py, once for each prompt.

Wherever a client's string spells a control token, the first character of the spelling is replaced
by a private-use character that occurs nowhere in the prompt. The template sees strings of the
same length with the same white space; the tokenizer finds no control token there, and puts the
character back before it encodes the text. The same is done where a string ends in the beginning
of a spelling, which the text after it could complete. All other strings stay as they are, so
that such a prompt's ids are those of the rendered text.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import msgspec

from engine.tokenizer.added_tokens import longest_match_pattern
from engine.tokenizer.protocol import Tokenizer

_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class _Spellings(msgspec.Struct, frozen=True):
    """The control tokens of a tokenizer, as the search needs them."""

    find: Any  # re.Pattern[str]
    beginnings: frozenset[str]  # every proper beginning of a spelling
    max_beginning: int
    firsts: tuple[str, ...]  # first characters


# Some vocabularies have thousands of control tokens: too many to go through for each prompt.
_known_spellings: WeakKeyDictionary[Tokenizer, _Spellings] = WeakKeyDictionary()


def _spellings_of(tokenizer: Tokenizer) -> _Spellings:
    found = _known_spellings.get(tokenizer)
    if found is None:
        found = _known_spellings[tokenizer] = _make_spellings(tokenizer)
    return found


def _make_spellings(tokenizer: Tokenizer) -> _Spellings:
    texts = {tokenizer.token_text(i) for i in tokenizer.special_ids} - {""}
    beginnings = frozenset(text[:n] for text in texts for n in range(1, len(text)))
    return _Spellings(
        find=re.compile(longest_match_pattern(texts) if texts else r"(?!)"),
        beginnings=beginnings,
        max_beginning=max(map(len, beginnings), default=0),
        firsts=tuple(sorted({text[0] for text in texts})),
    )


def shield(value: Any, tokenizer: Tokenizer, *, template: str) -> tuple[Any, dict[int, int]]:
    """The value with every string in it shielded, and the code points of the stand-ins used,
    each with the one that it stands for. Containers are copied."""
    spellings = _spellings_of(tokenizer)
    texts = set(_strings(value))
    if not any(_hidden_positions(text, spellings) for text in texts):
        return value, {}
    used = set(template).union(*texts)
    free = (code for code in _PRIVATE_USE if chr(code) not in used)
    stand_ins = dict(zip(spellings.firsts, free, strict=False))

    def cover(text: str) -> str:
        positions = _hidden_positions(text, spellings)
        if not positions:
            return text
        chars = list(text)
        for position in positions:
            chars[position] = chr(stand_ins[chars[position]])
        return "".join(chars)

    return _map_strings(cover, value), {code: ord(first) for first, code in stand_ins.items()}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(change: Any, value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _map_strings(change, key): _map_strings(change, item) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(change, item) for item in value]
    return value


def _hidden_positions(text: str, spellings: _Spellings) -> set[int]:
    """Where a spelling begins, or what could become one."""
    if not any(first in text for first in spellings.firsts):
        return set()
    positions = set()
    match = spellings.find.search(text)
    while match:
        positions.add(match.start())
        # Spellings may overlap, and hiding one would uncover the next.
        match = spellings.find.search(text, match.start() + 1)
    # Templates often strip what they are given.
    for end in {len(text), len(text.rstrip())}:
        for start in range(max(0, end - spellings.max_beginning), end):
            if text[start:end] in spellings.beginnings:
                positions.add(start)
    return positions
