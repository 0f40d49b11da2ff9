"""Sentencepiece tokenizers equal the library, whether read, rebuilt from GGUF, or from JSON."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from engine.tokenizer.load import tokenizer_from_folder, tokenizer_from_gguf
from tests.engine.tokenizer.trained import (
    HARD_TEXTS,
    gguf_metadata_of_sentencepiece,
    random_texts,
    train_sentencepiece,
)

TEXTS = (
    *HARD_TEXTS,
    "<div>\n\n\n<turn>x</turn></div>  </s> <s> <unk> ▁▁ <0x41>",
    *random_texts(300),
)


def library(model: bytes) -> Any:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_vocabulary_rebuilt_from_gguf_equals_the_original_model(
    add_dummy_prefix: bool, byte_fallback: bool, tmp_path: Path
) -> None:
    model = train_sentencepiece(
        tmp_path, add_dummy_prefix=add_dummy_prefix, byte_fallback=byte_fallback
    )
    reference = library(model)
    tokenizer = tokenizer_from_gguf(gguf_metadata_of_sentencepiece(model))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False, parse_special=False)
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.encode("x", add_bos=True, parse_special=False)[0] == reference.bos_id()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "byte_fallback": False},
    ],
)
def test_a_tokenizer_model_equals_the_library(options: dict[str, Any], tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path, **options)
    (tmp_path / "tokenizer.model").write_bytes(model)
    reference, tokenizer = library(model), tokenizer_from_folder(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_bos=False, parse_special=False)
        assert ids == reference.encode(text), repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
    # Broken UTF-8 is left out: the library writes a U+FFFD for each of its bytes.
    ids_of_text = [i for i in range(reference.vocab_size()) if not reference.is_byte(i)]
    source = random.Random(7)
    for _ in range(300):
        ids = [reference.piece_to_id("▁")] * source.randint(0, 2)
        ids += source.choices(ids_of_text, k=source.randint(1, 6))
        assert tokenizer.decode(ids) == reference.decode(ids)
    assert tokenizer.bos_token_id == reference.bos_id()
    assert reference.eos_id() in tokenizer.eos_token_ids


def test_control_spellings_are_control_only_where_asked(tmp_path: Path) -> None:
    model = train_sentencepiece(tmp_path)
    reference = library(model)
    tokenizer = tokenizer_from_gguf(gguf_metadata_of_sentencepiece(model))
    turn, end = reference.piece_to_id("<turn>"), reference.piece_to_id("</turn>")
    text = "<turn>the dog</turn>"
    assert tokenizer.encode(text, add_bos=False, parse_special=True) == [
        turn,
        *reference.encode("the dog"),
        end,
    ]
    plain = tokenizer.encode(text, add_bos=False, parse_special=False)
    assert not {turn, end}.intersection(plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.token_text(turn) == "<turn>"
    assert tokenizer.token_bytes(turn) == b""
    assert tokenizer.decode([turn, end], skip_special=False) == text.replace("the dog", "")


def test_tokens_beside_a_tokenizer_model_are_added_to_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(tmp_path))
    size = tokenizer_from_folder(tmp_path).vocab_size
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {
            str(size): {"content": "<|end|>", "special": True},
            str(size + 2): {"content": "<tool>", "special": False},
        },
        "eos_token": "<|end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = tokenizer_from_folder(tmp_path)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.encode("<|end|><tool>", add_bos=True, parse_special=True) == [size, size + 2]
    assert tokenizer.encode("<tool>", add_bos=True, parse_special=False) == [size + 2]
    assert size in tokenizer.eos_token_ids
    assert tokenizer.decode([size, size + 1, size + 2]) == "<tool>"


def json_reference(model: bytes, style: str) -> tokenizers.Tokenizer:
    """The same pieces as transformers' converters write them to a tokenizer.json."""
    parsed = sentencepiece_model_pb2.ModelProto()
    parsed.ParseFromString(model)
    vocabulary = {piece.piece: i for i, piece in enumerate(parsed.pieces)}
    merges = [
        (piece.piece[:cut], piece.piece[cut:])
        for piece in sorted(parsed.pieces, key=lambda piece: -piece.score)
        if piece.type == 1
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in vocabulary and piece.piece[cut:] in vocabulary
    ]
    reference = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "llama":
        reference.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        steps.append(decoders.Strip(" ", 1, 0))
    elif style == "gemma":
        reference.normalizer = normalizers.Replace(" ", "▁")
        reference.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        reference.pre_tokenizer = pre_tokenizers.Metaspace(
            prepend_scheme="first", split=style == "metaspace split"
        )
        steps.append(decoders.Strip(" ", 1, 0))
    reference.decoder = decoders.Sequence(steps)
    reference.add_special_tokens(
        [AddedToken(piece.piece, special=True) for piece in parsed.pieces if piece.type == 3]
    )
    reference.add_tokens(
        [AddedToken(piece.piece, normalized=False) for piece in parsed.pieces if piece.type == 4]
    )
    return reference


@pytest.mark.parametrize("style", ["llama", "gemma", "metaspace", "metaspace split"])
def test_a_sentencepiece_model_as_tokenizer_json_equals_the_reference(
    style: str, tmp_path: Path
) -> None:
    reference = json_reference(train_sentencepiece(tmp_path), style)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_from_folder(tmp_path)
    for text in TEXTS:
        for parse_special in (True, False):
            reference.encode_special_tokens = not parse_special
            expected = reference.encode(text, add_special_tokens=False).ids
            ids = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
            assert ids == expected, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids)
