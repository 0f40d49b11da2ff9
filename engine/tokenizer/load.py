"""Builds a tokenizer from a checkpoint: a GGUF file's metadata or a Hugging Face folder. Called
when a model is loaded, by the server and by tools.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.tokenizer.added_tokens import AddedToken, AddedTokens
from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.gguf_vocabulary import tokenizer_from_metadata
from engine.tokenizer.sentencepiece_model import (
    ModelSettings,
    PieceType,
    SentencePieceEncoder,
    load_processor,
    vocabulary_of,
)
from engine.tokenizer.text_tokenizer import TextTokenizer
from engine.tokenizer.tokenizer_json import tokenizer_from_json


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> TextTokenizer:
    """Build the tokenizer that a GGUF file's `tokenizer.ggml.*` keys describe.

    Raises TokenizerError where they are incomplete or of a kind that is not supported.
    """
    return tokenizer_from_metadata(metadata)


def tokenizer_from_folder(folder: Path) -> TextTokenizer:
    """Build the tokenizer of a Hugging Face folder, from tokenizer.json or tokenizer.model.

    Where both are there, the former: it is what transformers reads. Raises TokenizerError.
    """
    for name, build in (
        ("tokenizer.json", _from_tokenizer_json),
        ("tokenizer.model", _from_sentencepiece),
    ):
        path = folder / name
        if not path.is_file():
            continue
        try:
            return build(path, read_json(folder / "tokenizer_config.json"))
        except TokenizerError:
            raise
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise TokenizerError(
                f"{path} or the settings beside it: unexpected layout: "
                f"{type(error).__name__} {error}"
            ) from error
    raise TokenizerError(f"{folder}: neither tokenizer.json nor tokenizer.model is there")


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: not a JSON object")
    return value


def spelling_of(token: Any) -> str | None:
    """A token as tokenizer_config.json writes it: a string, or an object with its content."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _end_tokens(folder: Path, config: Mapping[str, Any]) -> list[str | int]:
    ends: list[str | int] = []
    eos_token = spelling_of(config.get("eos_token"))
    if eos_token is not None:
        ends.append(eos_token)
    for name in ("generation_config.json", "config.json"):
        declared = read_json(folder / name).get("eos_token_id")
        ids = declared if isinstance(declared, list) else [declared]
        ends.extend(i for i in ids if isinstance(i, int))
    return ends


def _added_tokens(config: Mapping[str, Any], folder: Path) -> dict[int, AddedToken]:
    """Tokens that the files beside a tokenizer.model add to it or declare to be control."""
    found = {
        i: AddedToken(i, content, special=False)
        for content, i in read_json(folder / "added_tokens.json").items()
    }
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        found[int(key)] = AddedToken(
            int(key),
            entry["content"],
            special=entry.get("special", False),
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            single_word=entry.get("single_word", False),
        )
    return found


def _from_tokenizer_json(path: Path, config: Mapping[str, Any]) -> TextTokenizer:
    return tokenizer_from_json(
        read_json(path),
        bos_token=spelling_of(config.get("bos_token")),
        add_bos=config.get("add_bos_token"),
        end_tokens=_end_tokens(path.parent, config),
        source=str(path),
    )


def _from_sentencepiece(path: Path, config: Mapping[str, Any]) -> TextTokenizer:
    model = path.read_bytes()
    processor = load_processor(model, source=str(path))
    settings = ModelSettings(model)
    size = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(size)]
    types = [_piece_type(processor, i) for i in range(size)]
    added = {
        i: AddedToken(i, pieces[i], special=True)
        for i, kind in enumerate(types)
        if kind == PieceType.CONTROL
    } | _added_tokens(config, path.parent)
    # Ids between the model's own and the added ones stand for nothing.
    num_ids = max([size, *(i + 1 for i in added)])
    pieces.extend("" for _ in range(num_ids - size))
    types.extend(PieceType.UNUSED for _ in range(num_ids - size))
    for i, token in added.items():
        pieces[i] = token.content
    vocabulary = vocabulary_of(
        pieces,
        types,
        {i for i, token in added.items() if token.special},
        add_space_prefix=settings.add_space_prefix,
        remove_extra_spaces=settings.remove_extra_spaces,
        unknown_surface=settings.unknown_surface,
        source=str(path),
    )
    ids = {piece: i for i, piece in enumerate(pieces)}
    bos = ids.get(spelling_of(config.get("bos_token")) or "")
    if bos is None and processor.bos_id() >= 0:
        bos = processor.bos_id()
    ends = _end_tokens(path.parent, config)
    declared = [one if isinstance(one, int) else ids.get(one) for one in ends]
    eos = processor.eos_id()
    return TextTokenizer(
        vocabulary,
        AddedTokens(added.values()),
        SentencePieceEncoder(processor),
        bos_token_id=bos,
        prefix_ids=(bos,) if bos is not None and config.get("add_bos_token", True) else (),
        end_ids=declared or [eos if eos >= 0 else None],
    )


def _piece_type(processor: Any, i: int) -> int:
    if processor.is_control(i):
        return PieceType.CONTROL
    if processor.is_unknown(i):
        return PieceType.UNKNOWN
    if processor.is_byte(i):
        return PieceType.BYTE
    return PieceType.NORMAL
