"""The one implementation of the `Tokenizer` protocol: added tokens first, then an encoder for the
text between them. Built by the loaders; sentencepiece and byte-pair models differ in the encoder.
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from engine.tokenizer.added_tokens import AddedTokens
from engine.tokenizer.vocabulary import StreamDetokenizer, Vocabulary


class TextEncoder(Protocol):
    """Ids of a stretch of text that holds no added token."""

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """`at_start`: nothing of the whole text comes before."""


class TextTokenizer:
    """Immutable after construction: any thread may call it.

    `prefix_ids` is what the model's configuration puts in front of a text: the
    beginning-of-sequence id, or nothing.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        added_tokens: AddedTokens,
        encoder: TextEncoder,
        *,
        bos_token_id: int | None,
        prefix_ids: tuple[int, ...],
        end_ids: Iterable[int | None],
    ) -> None:
        self._vocabulary = vocabulary
        self._added_tokens = added_tokens
        self._encoder = encoder
        self._prefix_ids = prefix_ids
        self._bos_token_id = bos_token_id
        self._eos_token_ids = vocabulary.end_ids(end_ids)

    @property
    def vocab_size(self) -> int:
        return len(self._vocabulary)

    @property
    def bos_token_id(self) -> int | None:
        return self._bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def special_ids(self) -> frozenset[int]:
        return self._vocabulary.special_ids

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        shields: Mapping[int, int] | None = None,
    ) -> list[int]:
        """See `Tokenizer.encode`. A lone surrogate is encoded as U+FFFD."""
        ids = list(self._prefix_ids) if add_bos else []
        at_start = True
        parts = self._added_tokens.split(without_surrogates(text), parse_special=parse_special)
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                plain = part.translate(shields) if shields else part
                ids.extend(self._encoder.encode(plain, at_start=at_start))
            at_start = False
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        return self._vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return self._vocabulary.token_text(token_id)

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        return self._vocabulary.decode(token_ids, skip_special=skip_special)

    def detokenizer(self) -> StreamDetokenizer:
        return StreamDetokenizer(self._vocabulary)


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates, which have no UTF-8, as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
