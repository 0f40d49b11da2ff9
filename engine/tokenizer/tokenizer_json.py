"""Tokenizers from a tokenizer.json with a BPE model: byte-level ones, and sentencepiece models in
that form (Metaspace or a replacing normalizer, with byte fallback). Called by load.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import fulcrum_core

from engine.tokenizer.added_tokens import AddedToken, AddedTokens
from engine.tokenizer.bpe import (
    BpeEncoder,
    byte_level_core,
    bytes_of_byte_level,
    character_core,
)
from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.normalize import normalizer_from_json
from engine.tokenizer.pretokenize import is_byte_level, pre_tokenizer_from_json
from engine.tokenizer.text_tokenizer import TextTokenizer
from engine.tokenizer.vocabulary import Vocabulary


def tokenizer_from_json(
    spec: Mapping[str, Any],
    *,
    bos_token: str | None,
    add_bos: bool | None,
    end_tokens: Iterable[str | int],
    source: str,
) -> TextTokenizer:
    """Build the tokenizer that the parsed file describes.

    `bos_token`, `add_bos` and `end_tokens` (spellings or ids) come from the files beside it. A
    spelling that is no token is left out. Where `add_bos` is None, the file's post-processor says
    what goes in front of a text.
    """
    model = spec["model"]
    _refuse_unsupported(model, source)
    ids: dict[str, int] = model["vocab"]
    added = [_added_token(entry) for entry in spec.get("added_tokens") or ()]
    byte_level = is_byte_level(spec.get("pre_tokenizer"))
    core = _core(model, ids, added, byte_level, source)
    ends = [one if isinstance(one, int) else _id_of(one, ids, added) for one in end_tokens]
    bos = None if bos_token is None else _id_of(bos_token, ids, added)
    if add_bos is None:
        prefix_ids = _prefix_ids(spec.get("post_processor"), source)
    else:
        prefix_ids = (bos,) if add_bos and bos is not None else ()
    return TextTokenizer(
        _vocabulary(ids, added, byte_level, spec.get("decoder"), source),
        AddedTokens(added, normalizer_from_json(spec.get("normalizer"), source=source)),
        BpeEncoder(pre_tokenizer_from_json(spec.get("pre_tokenizer"), source=source), core),
        bos_token_id=bos,
        prefix_ids=prefix_ids,
        end_ids=ends,
    )


def _refuse_unsupported(model: Mapping[str, Any], source: str) -> None:
    kind = model.get("type", "BPE" if "merges" in model else None)
    if kind != "BPE":
        raise TokenizerError(f"{source}: model type {kind!r} is not supported; only BPE is")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise TokenizerError(f"{source}: a BPE model with {name} is not supported")


def _core(
    model: Mapping[str, Any],
    ids: Mapping[str, int],
    added: list[AddedToken],
    byte_level: bool,
    source: str,
) -> fulcrum_core.Bpe:
    merges = [_merge_of(line, source) for line in model["merges"]]
    unknown = model.get("unk_token")
    unknown_id = None if unknown is None else _id_of(unknown, ids, added)
    ignore_merges = bool(model.get("ignore_merges", False))
    if byte_level:
        return byte_level_core(
            ids, merges, ignore_merges=ignore_merges, unknown_id=unknown_id, source=source
        )
    return character_core(
        ids,
        merges,
        byte_fallback=bool(model.get("byte_fallback", False)),
        unknown_id=unknown_id,
        fuse_unknown=bool(model.get("fuse_unk", False)),
        ignore_merges=ignore_merges,
        source=source,
    )


def _merge_of(line: str | list[str], source: str) -> tuple[str, str]:
    parts = line.split(" ") if isinstance(line, str) else line
    if len(parts) != 2:
        raise TokenizerError(f"{source}: merge {line!r} is not two tokens")
    return parts[0], parts[1]


def _added_token(entry: Mapping[str, Any]) -> AddedToken:
    return AddedToken(
        token_id=entry["id"],
        content=entry["content"],
        special=entry.get("special", False),
        normalized=entry.get("normalized", False),
        lstrip=entry.get("lstrip", False),
        rstrip=entry.get("rstrip", False),
        single_word=entry.get("single_word", False),
    )


def _id_of(spelling: str, ids: Mapping[str, int], added: Iterable[AddedToken]) -> int | None:
    for token in added:
        if token.content == spelling:
            return token.token_id
    return ids.get(spelling)


def _vocabulary(
    ids: Mapping[str, int],
    added: list[AddedToken],
    byte_level: bool,
    decoder: dict[str, Any] | None,
    source: str,
) -> Vocabulary:
    rules = _DecoderRules(decoder, byte_level, source)
    size = 1 + max([*ids.values(), *(token.token_id for token in added)])
    text_bytes = [b""] * size
    for spelling, i in ids.items():
        text_bytes[i] = rules.bytes_of(spelling)
    for token in added:
        text_bytes[token.token_id] = (
            token.content.encode("utf-8", "replace")
            if byte_level
            else rules.bytes_of(token.content)
        )
    leading: Iterable[int] = ()
    if rules.strips_leading_space:
        leading = (i for i, data in enumerate(text_bytes) if data.startswith(b" "))
    return Vocabulary(
        text_bytes,
        (token.token_id for token in added if token.special),
        leading_space_ids=frozenset(leading),
    )


class _DecoderRules:
    """What a tokenizer.json's decoder makes of one token's spelling."""

    def __init__(self, decoder: dict[str, Any] | None, byte_level: bool, source: str) -> None:
        self._byte_level = byte_level
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self.strips_leading_space = False
        steps = [] if decoder is None else decoder.get("decoders", [decoder])
        for step in steps:
            self._add(step, source)

    def _add(self, step: Mapping[str, Any], source: str) -> None:
        kind = step["type"]
        if kind == "ByteFallback":
            self._byte_fallback = True
        elif kind == "Replace" and "String" in step["pattern"]:
            self._replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            self._replacements.append((step.get("replacement", "▁"), " "))
            prefixed = step.get("add_prefix_space", True)
            scheme = step.get("prepend_scheme", "always" if prefixed else "never")
            self.strips_leading_space = scheme != "never"
        elif kind == "Strip" and step["content"] == " " and not step["stop"]:
            self.strips_leading_space = step["start"] > 0
        elif kind not in ("ByteLevel", "Fuse"):
            raise TokenizerError(f"{source}: decoder {kind!r} is not supported")

    def bytes_of(self, spelling: str) -> bytes:
        if self._byte_level:
            return bytes_of_byte_level(spelling)
        if self._byte_fallback and len(spelling) == 6 and spelling.startswith("<0x"):
            try:
                return bytes([int(spelling[3:5], 16)])
            except ValueError:
                return spelling.encode()
        for old, new in self._replacements:
            spelling = spelling.replace(old, new)
        return spelling.encode("utf-8", "replace")


def _prefix_ids(processor: dict[str, Any] | None, source: str) -> tuple[int, ...]:
    """What the post-processor puts before a single text."""
    if processor is None or processor["type"] == "ByteLevel":  # the latter only moves offsets
        return ()
    if processor["type"] == "Sequence":
        found = [_prefix_ids(one, source) for one in processor["processors"]]
        return tuple(i for ids in reversed(found) for i in ids)
    if processor["type"] != "TemplateProcessing":
        raise TokenizerError(f"{source}: post-processor {processor['type']!r} is not supported")
    prefix: list[int] = []
    after_text = False
    for item in processor["single"]:
        if "Sequence" in item:
            after_text = True
        elif after_text:
            raise TokenizerError(
                f"{source}: a post-processor that appends {item['SpecialToken']['id']!r} to every "
                "text is not supported"
            )
        else:
            prefix.extend(processor["special_tokens"][item["SpecialToken"]["id"]]["ids"])
    return tuple(prefix)
