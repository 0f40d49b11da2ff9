"""What the server and the tools ask of a tokenizer, whatever its kind."""

from collections.abc import Mapping
from typing import Protocol


class Tokenizer(Protocol):
    """Text to ids and back. Immutable after construction: any thread may call it."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the special ones included."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a text (end of text, end of turn)."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control ids: they have no text in `decode`."""

    def encode(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        shields: Mapping[int, int] | None = None,
    ) -> list[int]:
        """Ids of `text`.

        `add_bos` puts the beginning-of-sequence id first, where the model's own configuration
        asks for one. With `parse_special` the spellings of control tokens in `text` become their
        ids (for rendered chat templates only); without it they are text like any other.
        `shields` maps code points that hide a spelling from that search to the ones they stand
        for, which are put back once the control tokens are found (see chat_template.py).
        """

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the id stands for inside a text; empty for control ids."""

    def token_text(self, token_id: int) -> str:
        """The id's spelling, control ids included (for logprobs and /detokenize)."""

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""

    def detokenizer(self) -> "Detokenizer":
        """A new incremental decoder for one stream."""


class Detokenizer(Protocol):
    """Incremental decoding of one stream. `decode(ids)` equals the pieces joined."""

    def push(self, token_id: int) -> str:
        """Text that became complete with this id; never half a UTF-8 character."""

    def flush(self) -> str:
        """What is left at the end of the stream, broken bytes as U+FFFD."""
