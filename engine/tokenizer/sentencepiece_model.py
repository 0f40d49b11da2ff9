"""Sentencepiece tokenizers: from a tokenizer.model, or from the vocabulary that a GGUF file keeps
of one, rebuilt as the protocol buffer that the sentencepiece library reads. Called by load.py.
"""

from collections.abc import Sequence
from enum import IntEnum
from itertools import chain
from typing import Any

import numpy as np
import sentencepiece

from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.vocabulary import Vocabulary

SPACE_MARK = "▁"  # U+2581, how pieces write a space


class PieceType(IntEnum):
    """`ModelProto.SentencePiece.Type`; GGUF's `token_type` has the same numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Fields of sentencepiece_model.proto.
_MODEL_PIECES, _MODEL_TRAINER, _MODEL_NORMALIZER = 1, 2, 3
_TRAINER_MODEL_TYPE, _TRAINER_BYTE_FALLBACK, _TRAINER_UNKNOWN_SURFACE = 3, 35, 44
_NORMALIZER_CHARSMAP, _NORMALIZER_DUMMY_PREFIX, _NORMALIZER_REMOVE_SPACES = 2, 3, 4
_MODEL_TYPE_BPE = 2
_VARINT, _BYTES = 0, 2  # wire types
_SCORE_TAG = 0x15  # field 2 of a piece, four bytes


class SentencePieceEncoder:
    """The library's own encoder. Control pieces are never found in the text."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor) -> None:
        self._processor = processor

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        ids: list[int] = self._processor.encode(text, out_type=int)
        return ids


def ids_of_type(types: Sequence[int], kind: PieceType) -> set[int]:
    wanted = int(kind)  # comparing with the enumeration itself is several times slower
    return {index for index, one in enumerate(types) if one == wanted}


def load_processor(model: bytes, *, source: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise TokenizerError(f"{source}: sentencepiece cannot read it: {reason}") from None
    return processor


def build_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    types: Sequence[int],
    *,
    add_space_prefix: bool,
    remove_extra_spaces: bool,
    charsmap: bytes,
    source: str,
) -> bytes:
    """A serialized `ModelProto` of a BPE model with these pieces.

    Pieces are spelled with U+2581 for spaces. Byte fallback is on where all 256 byte pieces are
    there, as the library demands.
    """
    spellings = _encode_all(pieces, source)
    out = _piece_fields(spellings, scores, types)
    byte_fallback = list(types).count(PieceType.BYTE) == 256
    trainer = _field(_TRAINER_MODEL_TYPE, _MODEL_TYPE_BPE) + _field(
        _TRAINER_BYTE_FALLBACK, int(byte_fallback)
    )
    normalizer = (
        _field(_NORMALIZER_CHARSMAP, charsmap)
        + _field(_NORMALIZER_DUMMY_PREFIX, int(add_space_prefix))
        + _field(_NORMALIZER_REMOVE_SPACES, int(remove_extra_spaces))
    )
    out.append(_field(_MODEL_TRAINER, trainer))
    out.append(_field(_MODEL_NORMALIZER, normalizer))
    return b"".join(out)


def _encode_all(pieces: Sequence[str], source: str) -> list[bytes]:
    """UTF-8 of each piece; all at once, which for big vocabularies is much faster."""
    try:
        encoded = "\0".join(pieces).encode().split(b"\0")
        # A piece may hold the separator itself.
        return encoded if len(encoded) == len(pieces) else [piece.encode() for piece in pieces]
    except UnicodeEncodeError:
        raise TokenizerError(f"{source}: a token is not valid UTF-8") from None


def _piece_fields(
    spellings: Sequence[bytes], scores: Sequence[float], types: Sequence[int]
) -> list[bytes]:
    """The `pieces` fields, in parts to be joined: lengths, spelling, score and type of each."""
    tagged = np.empty((len(spellings), 5), np.uint8)
    tagged[:, 0] = _SCORE_TAG
    tagged[:, 1:] = np.asarray(scores, "<f4").view(np.uint8).reshape(-1, 4)
    after = {int(kind): b"\x18" + _varint(kind) for kind in PieceType}
    normal = after[PieceType.NORMAL]
    headers = []
    for length in range(1 + max(map(len, spellings), default=0)):
        spelling_header = b"\x0a" + _varint(length)
        body_length = len(spelling_header) + length + tagged.shape[1] + len(normal)
        headers.append(b"\x0a" + _varint(body_length) + spelling_header)
    parts = zip(
        map(headers.__getitem__, map(len, spellings)),
        spellings,
        tagged.view("V5").ravel().tolist(),
        (after.get(kind, normal) for kind in types),
        strict=True,
    )
    return list(chain.from_iterable(parts))


def vocabulary_of(
    pieces: Sequence[str],
    types: Sequence[int],
    special_ids: set[int],
    *,
    add_space_prefix: bool,
    remove_extra_spaces: bool,
    unknown_surface: bytes = " ⁇ ".encode(),
    source: str,
) -> Vocabulary:
    """Texts of the pieces as the library's own decoder writes them."""
    text_bytes = _encode_all([piece.replace(SPACE_MARK, " ") for piece in pieces], source)
    for index in ids_of_type(types, PieceType.BYTE):
        text_bytes[index] = bytes([int(pieces[index][3:5], 16)])
    for index in ids_of_type(types, PieceType.UNKNOWN) - special_ids:
        text_bytes[index] = unknown_surface
    leading: frozenset[int] = frozenset()
    if add_space_prefix or remove_extra_spaces:
        leading = frozenset(i for i, piece in enumerate(pieces) if piece.startswith(SPACE_MARK))
    return Vocabulary(
        text_bytes,
        special_ids,
        leading_space_ids=leading,
        strip_every_space=remove_extra_spaces,
    )


class ModelSettings:
    """What decoding needs of a serialized model and the library does not tell."""

    def __init__(self, model: bytes) -> None:
        fields: dict[int, Any] = {}
        for number, value in _read_fields(model):
            if number in (_MODEL_TRAINER, _MODEL_NORMALIZER):
                fields[number] = dict(_read_fields(value))
        normalizer = fields.get(_MODEL_NORMALIZER, {})
        trainer = fields.get(_MODEL_TRAINER, {})
        # Both are true where the model does not say.
        self.add_space_prefix = bool(normalizer.get(_NORMALIZER_DUMMY_PREFIX, 1))
        self.remove_extra_spaces = bool(normalizer.get(_NORMALIZER_REMOVE_SPACES, 1))
        self.unknown_surface: bytes = trainer.get(_TRAINER_UNKNOWN_SURFACE, " ⁇ ".encode())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    return _varint(number << 3 | _VARINT) + _varint(value)


def _read_fields(data: bytes) -> list[tuple[int, Any]]:
    """(number, value) of each field of one message; values of fixed width stay bytes."""
    fields: list[tuple[int, Any]] = []
    position = 0

    def read_varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = read_varint()
        if key & 7 == _VARINT:
            fields.append((key >> 3, read_varint()))
            continue
        size = read_varint() if key & 7 == _BYTES else 8 if key & 7 == 1 else 4
        fields.append((key >> 3, data[position : position + size]))
        position += size
    return fields
