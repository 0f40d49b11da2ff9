"""Byte-pair encoders over the compiled merger: byte-level ones (GPT-2's alphabet) and character
ones with bytes as the last resort (sentencepiece models written as a tokenizer.json). Built by the
loaders; `BpeEncoder` is the text encoder of a `TextTokenizer`.
"""

from collections.abc import Iterable, Mapping

import fulcrum_core
import numpy as np

from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.pretokenize import PreTokenizer


def _byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte: itself where it is printable Latin-1, else the
    next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


BYTE_ALPHABET = _byte_alphabet()
# Anything outside the alphabet must fail to encode as Latin-1, so Latin-1's own unprintable
# characters are sent out of its range.
_TO_LATIN1 = dict.fromkeys(range(256), 0xFFFF) | {
    ord(char): byte for byte, char in enumerate(BYTE_ALPHABET)
}


def bytes_of_byte_level(spelling: str) -> bytes:
    """The bytes that a spelling in GPT-2's alphabet stands for; others stand for themselves."""
    try:
        return spelling.translate(_TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return spelling.encode()


class BpeEncoder:
    """Words by the pre-tokenizer, ids by the core. The core keeps a bounded cache of words."""

    def __init__(self, pre_tokenizer: PreTokenizer, core: fulcrum_core.Bpe) -> None:
        self._pre_tokenizer = pre_tokenizer
        self._core = core

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        return self._core.encode(self._pre_tokenizer.words(text, at_start=at_start))


def byte_level_core(
    ids: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    ignore_merges: bool,
    unknown_id: int | None,
    source: str,
) -> fulcrum_core.Bpe:
    """A merger that starts from single bytes."""
    whole = {bytes_of_byte_level(word): i for word, i in ids.items()} if ignore_merges else {}
    return fulcrum_core.Bpe(
        byte_ids=np.array([ids.get(char, -1) for char in BYTE_ALPHABET], np.int32),
        merges=merge_rows(ids, merges, source=source),
        char_ids={},
        per_char=False,
        unknown_id=-1 if unknown_id is None else unknown_id,
        fuse_unknown=False,
        whole_words=whole,
    )


def character_core(
    ids: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    *,
    byte_fallback: bool,
    unknown_id: int | None,
    fuse_unknown: bool,
    ignore_merges: bool,
    source: str,
) -> fulcrum_core.Bpe:
    """A merger that starts from characters, with `<0x00>` to `<0xFF>` for those it lacks."""
    fallback = [ids.get(f"<0x{byte:02X}>", -1) if byte_fallback else -1 for byte in range(256)]
    return fulcrum_core.Bpe(
        byte_ids=np.array(fallback, np.int32),
        merges=merge_rows(ids, merges, source=source),
        char_ids={ord(token): i for token, i in ids.items() if len(token) == 1},
        per_char=True,
        unknown_id=-1 if unknown_id is None else unknown_id,
        fuse_unknown=fuse_unknown,
        whole_words={word.encode(): i for word, i in ids.items()} if ignore_merges else {},
    )


def merge_rows(
    ids: Mapping[str, int], merges: Iterable[tuple[str, str]], *, source: str
) -> "np.ndarray[tuple[int, int], np.dtype[np.int32]]":
    """(M, 3): ids of left, right and both together, in order of rank."""
    try:
        flat = [i for left, right in merges for i in (ids[left], ids[right], ids[left + right])]
    except KeyError as error:
        raise TokenizerError(
            f"{source}: a merge needs token {error.args[0]!r}, which the vocabulary lacks"
        ) from None
    return np.array(flat, np.int32).reshape(-1, 3)
