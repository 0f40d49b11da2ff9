"""What a tokenizer cannot be built from is one line that names the file and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from engine.tokenizer.errors import TokenizerError
from engine.tokenizer.load import tokenizer_from_folder, tokenizer_from_gguf
from tests.engine.tokenizer.trained import gguf_metadata_of_byte_level

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "model type 'WordPiece'"),
        ({"model": MODEL | {"dropout": 0.1}}, "dropout"),
        ({"model": MODEL | {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"model": MODEL | {"merges": ["a c"]}}, "token 'c'"),
        ({"model": MODEL | {"merges": ["a b c"]}}, "not two tokens"),
        ({"model": MODEL, "normalizer": {"type": "BertNormalizer"}}, "'BertNormalizer'"),
        ({"model": MODEL, "pre_tokenizer": {"type": "UnicodeScripts"}}, "'UnicodeScripts'"),
        ({"model": MODEL, "pre_tokenizer": split("(")}, "pattern"),
        ({"model": MODEL, "pre_tokenizer": split(r"\w+")}, "pattern"),
        ({"model": MODEL, "pre_tokenizer": split(r"[\p{L}&&[^a]]")}, "pattern"),
        ({"model": MODEL, "pre_tokenizer": split("a", "Sideways")}, "'Sideways'"),
        (
            {
                "model": MODEL,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTE_LEVEL, split("a")]},
            },
            "after ByteLevel",
        ),
        ({"model": MODEL, "decoder": {"type": "WordPiece"}}, "'WordPiece'"),
        ({"model": MODEL, "post_processor": {"type": "BertProcessing"}}, "'BertProcessing'"),
        (
            {
                "model": MODEL,
                "post_processor": {
                    "type": "TemplateProcessing",
                    "single": [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
                    "special_tokens": {},
                },
            },
            "appends '</s>'",
        ),
        ({}, "unexpected layout"),
        ({"model": MODEL | {"vocab": []}}, "unexpected layout"),
    ],
)
def test_an_unsupported_tokenizer_json_is_named(
    spec: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json") as caught:
        tokenizer_from_folder(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer.model", b"not a model"),
        ("tokenizer.model", b""),
    ],
)
def test_a_broken_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        tokenizer_from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        tokenizer_from_folder(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokenizer.ggml.model": "t5"}, "'t5'"),
        ({"tokenizer.ggml.model": None}, "None"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "'unheard-of'"),
        ({"tokenizer.ggml.merges": None}, "merges is missing"),
        ({"tokenizer.ggml.merges": ["a"]}, "not two tokens"),
        ({"tokenizer.ggml.merges": ["a nothing"]}, "'nothing'"),
        ({"tokenizer.ggml.token_type": [1]}, "token_type"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id"),
        ({"tokenizer.ggml.tokens": None}, "tokens is missing"),
        ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
    ],
)
def test_unusable_gguf_metadata_is_named(
    change: dict[str, Any], reason: str, digits_reference: tokenizers.Tokenizer
) -> None:
    metadata = gguf_metadata_of_byte_level(digits_reference, "smollm") | change
    with pytest.raises(TokenizerError) as caught:
        tokenizer_from_gguf(metadata)
    assert reason in str(caught.value)


def test_pieces_that_sentencepiece_refuses_are_an_error() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "a", "a"],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0],
        "tokenizer.ggml.token_type": [2, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    with pytest.raises(TokenizerError, match="sentencepiece"):
        tokenizer_from_gguf(metadata)
