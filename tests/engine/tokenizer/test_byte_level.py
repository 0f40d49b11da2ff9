"""Byte-level BPE equals the reference library, from a tokenizer.json and from GGUF metadata."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors

from engine.tokenizer.load import tokenizer_from_folder, tokenizer_from_gguf
from engine.tokenizer.pretokenize import GGUF_PATTERNS
from tests.engine.tokenizer.trained import (
    HARD_TEXTS,
    SPECIAL_TOKENS,
    gguf_metadata_of_byte_level,
    random_texts,
    train_byte_level,
)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(**({"add_prefix_space": False} | options))


LLAMA3 = GGUF_PATTERNS["llama-bpe"][0]
PRE_TOKENIZERS = {
    "gpt2": byte_level(),
    "prefix space": byte_level(add_prefix_space=True),
    "llama3": pre_tokenizers.Sequence([split(LLAMA3), byte_level(use_regex=False)]),
    "qwen2": pre_tokenizers.Sequence(
        [split(GGUF_PATTERNS["qwen2"][0]), byte_level(use_regex=False)]
    ),
    "tekken": pre_tokenizers.Sequence(
        [split(GGUF_PATTERNS["tekken"][0]), byte_level(use_regex=False)]
    ),
    "digit runs": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level()]),
    "punctuation": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), byte_level()]),
    "words only": pre_tokenizers.Sequence([split(r"\p{L}+", "removed", True), byte_level()]),
    "merged with next": pre_tokenizers.Sequence(
        [split(r"[aeo ]", "merged_with_next"), byte_level(use_regex=False)]
    ),
    "merged with previous": pre_tokenizers.Sequence(
        [split(r"[aeo ]", "merged_with_previous"), byte_level(use_regex=False)]
    ),
    "contiguous": pre_tokenizers.Sequence(
        [split(r"[aeo ]", "contiguous"), byte_level(use_regex=False)]
    ),
}


def in_folder(folder: Path, reference: tokenizers.Tokenizer, **config: Any) -> Any:
    reference.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer_from_folder(folder)


def assert_same_ids(
    tokenizer: Any, reference: tokenizers.Tokenizer, text: str, *, same_text: bool = True
) -> None:
    for parse_special in (True, False):
        reference.encode_special_tokens = not parse_special
        expected = reference.encode(text, add_special_tokens=False).ids
        actual = tokenizer.encode(text, add_bos=False, parse_special=parse_special)
        assert actual == expected, repr(text)
    if same_text:
        assert tokenizer.decode(actual) == reference.decode(actual)


@pytest.mark.parametrize("kind", PRE_TOKENIZERS)
def test_ids_from_a_tokenizer_json_equal_the_reference(kind: str, tmp_path: Path) -> None:
    reference = train_byte_level(PRE_TOKENIZERS[kind])
    tokenizer = in_folder(tmp_path, reference)
    for text in (*HARD_TEXTS, *random_texts(300)):
        assert_same_ids(tokenizer, reference, text)


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_ids_from_gguf_metadata_equal_the_reference(name: str) -> None:
    patterns = GGUF_PATTERNS[name]
    stages = [split(pattern) for pattern in patterns] + [byte_level(use_regex=False)]
    reference = train_byte_level(
        pre_tokenizers.Sequence(stages), normalizers.NFC() if name == "qwen2" else None
    )
    if name in ("llama-bpe", "tekken"):
        reference.model.ignore_merges = True
    tokenizer = tokenizer_from_gguf(gguf_metadata_of_byte_level(reference, name))
    for text in (*HARD_TEXTS, *random_texts(300)):
        assert_same_ids(tokenizer, reference, text)


@pytest.fixture(scope="module")
def digits_tokenizer(digits_reference: tokenizers.Tokenizer) -> Any:
    return tokenizer_from_gguf(gguf_metadata_of_byte_level(digits_reference, "smollm"))


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=80))
def test_any_text_comes_back_from_its_ids(
    text: str, digits_tokenizer: Any, digits_reference: tokenizers.Tokenizer
) -> None:
    ids = digits_tokenizer.encode(text, add_bos=False, parse_special=False)
    assert digits_tokenizer.decode(ids) == text
    assert not digits_tokenizer.special_ids.intersection(ids)
    assert_same_ids(digits_tokenizer, digits_reference, text)


def test_words_of_the_vocabulary_overrule_merges_where_the_model_says_so(tmp_path: Path) -> None:
    reference = train_byte_level(byte_level())
    spec = json.loads(reference.to_str())
    spec["model"]["ignore_merges"] = True
    spec["model"]["vocab"]["xylophone"] = 1000
    reference = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer = in_folder(tmp_path, reference)
    assert tokenizer.encode("xylophone", add_bos=False, parse_special=False) == [1000]
    assert_same_ids(tokenizer, reference, "xylophone xylophones, xylophone")


def test_added_tokens_keep_their_matching_rules(tmp_path: Path) -> None:
    reference = train_byte_level(byte_level(), normalizers.NFC())
    reference.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    reference.add_tokens(
        [
            AddedToken("<right>", rstrip=True),
            AddedToken("word", single_word=True),
            AddedToken("<both>", lstrip=True, rstrip=True),
            AddedToken("cafe\u0301", normalized=True),
            AddedToken("    ", normalized=False),
            AddedToken("  ", normalized=False),
            AddedToken("<r", normalized=False),
        ]
    )
    tokenizer = in_folder(tmp_path, reference)
    for text in (
        "a  <mask>  b",
        "<right> \n x <right>",
        "word sword word's words _word word",
        " <both> \t <both><mask> <both>",
        "café cafe\u0301 cafe",
        "       x",
        "<ri <right <right> <<right>",
        "a\x1c<mask>\x1fb \x85<both>\u3000\x1e\u2003<right>\u200b",
        *random_texts(100),
    ):
        # The reference decodes an added token's own letters as if they were byte characters.
        assert_same_ids(tokenizer, reference, text, same_text=False)
    ids = tokenizer.encode("a café", add_bos=False, parse_special=False)
    assert tokenizer.decode(ids) == "a cafe\u0301"


def test_a_bos_id_goes_in_front_only_where_the_configuration_asks(tmp_path: Path) -> None:
    reference = train_byte_level(byte_level())
    plain = in_folder(tmp_path, reference, bos_token="<|im_start|>")
    bos = reference.token_to_id("<|im_start|>")
    assert plain.bos_token_id == bos
    without = plain.encode("hi", add_bos=False, parse_special=False)
    assert plain.encode("hi", add_bos=True, parse_special=False) == without
    reference.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
            ),
        ]
    )
    prefixed = in_folder(tmp_path, reference)
    assert prefixed.encode("hi", add_bos=True, parse_special=False) == [bos, *without]
    assert prefixed.encode("hi", add_bos=False, parse_special=False) == without
    refused = in_folder(tmp_path, reference, bos_token="<|im_start|>", add_bos_token=False)
    assert refused.encode("hi", add_bos=True, parse_special=False) == without
    reference.post_processor = processors.ByteLevel(trim_offsets=False)
    wanted = in_folder(tmp_path, reference, bos_token="<|im_start|>", add_bos_token=True)
    assert wanted.encode("hi", add_bos=True, parse_special=False) == [bos, *without]


def test_end_ids_come_from_every_file_that_names_one(tmp_path: Path) -> None:
    reference = train_byte_level(byte_level())
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [300, 301]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 302}')
    tokenizer = in_folder(tmp_path, reference, eos_token={"content": "<|im_start|>"})
    named = {reference.token_to_id(token) for token in SPECIAL_TOKENS}
    assert set(tokenizer.eos_token_ids) == {300, 301, 302} | named


def test_lone_surrogates_become_replacement_characters(digits_tokenizer: Any) -> None:
    ids = digits_tokenizer.encode("a\ud83d\ude00b\ud800c", add_bos=False, parse_special=False)
    assert digits_tokenizer.decode(ids) == "a😀b\ufffdc"


@pytest.mark.parametrize("char", ["a", " ", "1", "\n", "é"])
def test_a_long_run_of_one_character_takes_no_quadratic_time(
    char: str, digits_tokenizer: Any
) -> None:
    text = char * 200_000
    began_at_s = time.process_time()
    ids = digits_tokenizer.encode(text, add_bos=False, parse_special=False)
    assert time.process_time() - began_at_s < 2
    assert digits_tokenizer.decode(ids) == text


def test_threads_share_one_tokenizer_and_agree(digits_reference: Any) -> None:
    metadata = gguf_metadata_of_byte_level(digits_reference, "smollm")
    texts = random_texts(200)
    alone = [
        tokenizer_from_gguf(metadata).encode(text, add_bos=False, parse_special=True)
        for text in texts[:20]
    ]
    shared = tokenizer_from_gguf(metadata)
    with ThreadPoolExecutor(4) as pool:
        results = list(
            pool.map(lambda text: shared.encode(text, add_bos=False, parse_special=True), texts * 4)
        )
    assert results[:20] == alone
    assert results[:200] == results[200:400] == results[400:600] == results[600:]
