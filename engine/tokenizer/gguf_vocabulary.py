"""Tokenizers from the metadata of a GGUF file. Called by load.py."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.tokenizer.added_tokens import AddedToken, AddedTokens
from engine.tokenizer.bpe import BpeEncoder, byte_level_core, bytes_of_byte_level
from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.normalize import normalizer_from_json
from engine.tokenizer.pretokenize import pre_tokenizer_from_gguf
from engine.tokenizer.sentencepiece_model import (
    SPACE_MARK,
    PieceType,
    SentencePieceEncoder,
    build_model,
    ids_of_type,
    load_processor,
    vocabulary_of,
)
from engine.tokenizer.text_tokenizer import TextTokenizer
from engine.tokenizer.vocabulary import Vocabulary

_SOURCE = "GGUF metadata"
_PREFIX = "tokenizer.ggml."

# Pre-tokenizers whose models take a word that is in the vocabulary whole, whatever the merges say,
# and start a text with the beginning-of-sequence id.
_WHOLE_WORD_NAMES = frozenset({"llama3", "llama-v3", "llama-bpe", "tekken"})
# The format has no key for normalizers; the models of this name were trained on composed text.
_COMPOSED_NAMES = frozenset({"qwen2"})


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> TextTokenizer:
    model = metadata.get(_PREFIX + "model")
    if model == "gpt2":
        return _byte_level(metadata)
    if model == "llama":
        return _sentencepiece(metadata)
    raise TokenizerError(f"{_SOURCE}: {_PREFIX}model is {model!r}; supported are gpt2 and llama")


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    value = metadata.get(_PREFIX + name)
    if value is None:
        raise TokenizerError(f"{_SOURCE}: {_PREFIX}{name} is missing")
    return value


def _tokens_and_types(metadata: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    tokens = list(_required(metadata, "tokens"))
    types = metadata.get(_PREFIX + "token_type")
    kinds = [int(PieceType.NORMAL)] * len(tokens) if types is None else [int(t) for t in types]
    if len(kinds) != len(tokens):
        raise TokenizerError(
            f"{_SOURCE}: {len(tokens)} tokens but {len(kinds)} entries in {_PREFIX}token_type"
        )
    return tokens, kinds


def _special_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    token_id = metadata.get(f"{_PREFIX}{name}_token_id")
    if token_id is not None and not 0 <= token_id < num_tokens:
        raise TokenizerError(f"{_SOURCE}: {_PREFIX}{name}_token_id {token_id} is not a token")
    return None if token_id is None else int(token_id)


def _finish(
    metadata: Mapping[str, Any],
    vocabulary: Vocabulary,
    added_tokens: AddedTokens,
    encoder: BpeEncoder | SentencePieceEncoder,
    *,
    add_bos: bool,
) -> TextTokenizer:
    bos = _special_id(metadata, "bos", len(vocabulary))
    wanted = bool(metadata.get(_PREFIX + "add_bos_token", add_bos))
    return TextTokenizer(
        vocabulary,
        added_tokens,
        encoder,
        bos_token_id=bos,
        prefix_ids=(bos,) if wanted and bos is not None else (),
        end_ids=[_special_id(metadata, name, len(vocabulary)) for name in ("eos", "eot", "eom")],
    )


def _byte_level(metadata: Mapping[str, Any]) -> TextTokenizer:
    tokens, types = _tokens_and_types(metadata)
    name = str(metadata.get(_PREFIX + "pre", "default"))
    pre_tokenizer = pre_tokenizer_from_gguf(name, source=_SOURCE)
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [merge.split(" ") for merge in _required(metadata, "merges")]
    if any(len(merge) != 2 for merge in merges):
        raise TokenizerError(f"{_SOURCE}: a line of {_PREFIX}merges is not two tokens")
    core = byte_level_core(
        ids,
        ((merge[0], merge[1]) for merge in merges),
        ignore_merges=name in _WHOLE_WORD_NAMES,
        unknown_id=None,
        source=_SOURCE,
    )
    text_bytes = [bytes_of_byte_level(token) for token in tokens]
    special_ids = ids_of_type(types, PieceType.CONTROL) | ids_of_type(types, PieceType.UNKNOWN)
    added = []
    for i in sorted(special_ids | ids_of_type(types, PieceType.USER_DEFINED)):
        text_bytes[i] = tokens[i].encode("utf-8", "surrogateescape")
        added.append(AddedToken(i, tokens[i], special=i in special_ids))
    normalizer = {"type": "NFC"} if name in _COMPOSED_NAMES else None
    return _finish(
        metadata,
        Vocabulary(text_bytes, special_ids),
        AddedTokens(added, normalizer_from_json(normalizer, source=_SOURCE)),
        BpeEncoder(pre_tokenizer, core),
        add_bos=name in _WHOLE_WORD_NAMES,
    )


def _sentencepiece(metadata: Mapping[str, Any]) -> TextTokenizer:
    tokens, types = _tokens_and_types(metadata)
    # Converters write the spaces of user-defined pieces as spaces; the library marks the text's
    # own spaces before it looks for pieces.
    pieces = list(tokens)
    for i in ids_of_type(types, PieceType.USER_DEFINED):
        pieces[i] = tokens[i].replace(" ", SPACE_MARK)
    special_ids = ids_of_type(types, PieceType.CONTROL)
    unknown_id = _special_id(metadata, "unknown", len(tokens))
    if unknown_id is not None:
        types[unknown_id] = PieceType.UNKNOWN
    # Gemma's files often lack the key, and its models never add the space.
    is_gemma = str(metadata.get("general.architecture", "")).startswith("gemma")
    add_space_prefix = bool(metadata.get(_PREFIX + "add_space_prefix", not is_gemma))
    remove_extra_spaces = bool(metadata.get(_PREFIX + "remove_extra_whitespaces", False))
    model = build_model(
        pieces,
        _required(metadata, "scores"),
        types,
        add_space_prefix=add_space_prefix,
        remove_extra_spaces=remove_extra_spaces,
        charsmap=np.asarray(metadata.get(_PREFIX + "precompiled_charsmap", ()))
        .astype(np.uint8)
        .tobytes(),
        source=_SOURCE,
    )
    vocabulary = vocabulary_of(
        pieces,
        types,
        special_ids,
        add_space_prefix=add_space_prefix,
        remove_extra_spaces=remove_extra_spaces,
        source=_SOURCE,
    )
    return _finish(
        metadata,
        vocabulary,
        AddedTokens(AddedToken(i, tokens[i], special=True) for i in sorted(special_ids)),
        SentencePieceEncoder(load_processor(model, source=_SOURCE)),
        add_bos=True,
    )
