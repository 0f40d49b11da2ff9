"""The id to text side of every tokenizer: bytes and spellings of ids, whole and incremental
decoding. Built by the loaders, used by `TextTokenizer` and by each stream's detokenizer.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence

from engine.tokenizer.errors import TokenizerError

# The spellings by which known model families end a turn or a text. A checkpoint's own settings
# often name only one of several.
END_SPELLINGS = frozenset(
    {
        "</s>",
        "<eos>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|end_of_turn|>",
        "<end_of_turn>",
    }
)


class Vocabulary:
    """Immutable tables over all ids.

    `text_bytes[id]` is what the id stands for inside a text (of control ids, their spelling).
    `leading_space_ids` are the ids whose first space is dropped at the start of a text, because
    the encoder put it there; with `strip_every_space`, not only the first one.
    """

    def __init__(
        self,
        text_bytes: Sequence[bytes],
        special_ids: Iterable[int],
        *,
        leading_space_ids: frozenset[int] = frozenset(),
        strip_every_space: bool = False,
    ) -> None:
        self._text_bytes = tuple(text_bytes)
        self.special_ids = frozenset(special_ids)
        self._leading_space_ids = leading_space_ids
        self._strip_every_space = strip_every_space

    def __len__(self) -> int:
        return len(self._text_bytes)

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id < 0:
            raise ValueError(f"token id {token_id} is negative")
        return self._text_bytes[token_id] if token_id < len(self._text_bytes) else b""

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_ids else self._bytes_of(token_id)

    def token_text(self, token_id: int) -> str:
        return self._bytes_of(token_id).decode("utf-8", "replace")

    def byte_stream(self, *, skip_special: bool = True) -> Callable[[int], bytes]:
        """A function from each next id of one text to the bytes that it adds."""
        at_start = bool(self._leading_space_ids)

        def next_bytes(token_id: int) -> bytes:
            nonlocal at_start
            if skip_special and token_id in self.special_ids:
                return b""
            data = self._bytes_of(token_id)
            if at_start and data:
                stripped = data[1:] if token_id in self._leading_space_ids else data
                at_start = not stripped and self._strip_every_space
                return stripped
            return data

        return next_bytes

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        data = b"".join(map(self.byte_stream(skip_special=skip_special), token_ids))
        return data.decode("utf-8", "replace")

    def end_ids(self, declared: Iterable[int | None]) -> tuple[int, ...]:
        """The declared end ids and every control id with a spelling known to end a turn."""
        ends = {token_id for token_id in declared if token_id is not None}
        ends.update(i for i in self.special_ids if self.token_text(i) in END_SPELLINGS)
        for token_id in ends:
            if not 0 <= token_id < len(self):
                raise TokenizerError(f"end-of-text id {token_id} is outside the vocabulary")
        return tuple(sorted(ends))


class StreamDetokenizer:
    """Incremental decoder of one stream: holds back bytes that do not end a character yet."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._next_bytes = vocabulary.byte_stream()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._next_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)
