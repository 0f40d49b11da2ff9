"""Incremental decoding: whole characters only, and the same text as decoding at once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer.load import tokenizer_from_gguf
from tests.engine.tokenizer.trained import (
    gguf_metadata_of_byte_level,
    gguf_metadata_of_sentencepiece,
    train_sentencepiece,
)


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "no space prefix"])
def tokenizer(
    request: pytest.FixtureRequest,
    digits_reference: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    if request.param == "byte-level":
        yield tokenizer_from_gguf(gguf_metadata_of_byte_level(digits_reference, "smollm"))
        return
    folder: Path = tmp_path_factory.mktemp("model")
    model = train_sentencepiece(folder, add_dummy_prefix=request.param == "sentencepiece")
    yield tokenizer_from_gguf(gguf_metadata_of_sentencepiece(model))


def pieces_of(tokenizer: Any, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_pieces_of_any_ids_join_to_the_decoded_text(tokenizer: Any, data: st.DataObject) -> None:
    # The first ids are bytes and control tokens, where the hard cases lie.
    ids = data.draw(
        st.lists(
            st.one_of(st.integers(0, 270), st.integers(0, tokenizer.vocab_size + 3)), max_size=20
        )
    )
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
def test_no_piece_of_a_valid_text_holds_half_a_character(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_bos=True, parse_special=False)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1] == ""
    assert "".join(pieces).count("\ufffd") == text.count("\ufffd")


def test_an_emoji_appears_with_its_last_byte(tokenizer: Any) -> None:
    ids = tokenizer.encode("\U0001f9ff", add_bos=False, parse_special=False)
    assert len(ids) > 1
    *early, last, rest = pieces_of(tokenizer, ids)
    assert "".join(early).strip() == ""
    assert last == "\U0001f9ff"
    assert rest == ""


def test_broken_bytes_at_the_end_become_one_replacement_character(tokenizer: Any) -> None:
    ids = tokenizer.encode("\U0001f9ff", add_bos=False, parse_special=False)[:-1]
    assert pieces_of(tokenizer, ids)[-1] == "\ufffd"
    assert tokenizer.decode(ids).endswith("\ufffd")


def test_ids_beyond_the_vocabulary_have_no_text_and_negative_ones_are_refused(
    tokenizer: Any,
) -> None:
    beyond = tokenizer.vocab_size + 5
    assert tokenizer.decode([beyond]) == ""
    assert tokenizer.token_bytes(beyond) == b""
    with pytest.raises(ValueError, match="-1"):
        tokenizer.token_bytes(-1)
