"""The prompt as part of a completion (`echo`), and log probabilities in that endpoint's shape."""

from engine.tokenizer.protocol import Tokenizer
from engine.types import TokenLogprobs
from server import protocol
from server.tokens import spelling


class Echo:
    """One prompt as it is repeated before its completions."""

    def __init__(self, tokenizer: Tokenizer, given: str | list[int], ids: list[int]) -> None:
        self.text = given if isinstance(given, str) else tokenizer.decode(ids)
        self._tokenizer = tokenizer
        self._ids = ids

    def logprobs(
        self, entries: tuple[TokenLogprobs | None, ...], num_alternatives: int
    ) -> protocol.CompletionLogprobs:
        """The prompt's own log probabilities; nothing precedes the first token, so it has none."""
        detokenizer = self._tokenizer.detokenizer()
        offset = 0
        placed: list[tuple[int, int, TokenLogprobs | None]] = []
        for token_id, entry in zip(self._ids, entries, strict=True):
            placed.append((offset, token_id, entry))
            offset += len(detokenizer.push(token_id))
        return completion_logprobs(self._tokenizer, placed, num_alternatives)


def completion_logprobs(
    tokenizer: Tokenizer,
    placed: list[tuple[int, int, TokenLogprobs | None]],
    num_alternatives: int,
) -> protocol.CompletionLogprobs:
    """From (offset in the text, token id, entry) to the four parallel lists of the answer."""
    top_logprobs: list[dict[str, float] | None] = []
    for _, _, entry in placed:
        if entry is None:
            top_logprobs.append(None)
            continue
        by_token = {
            spelling(tokenizer, token_id)[0]: logprob
            for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True)
        }
        # As with OpenAI's, the sampled token is there even if it is none of the likeliest.
        by_token.setdefault(spelling(tokenizer, entry.token_id)[0], entry.logprob)
        top_logprobs.append(by_token)
    return protocol.CompletionLogprobs(
        tokens=[spelling(tokenizer, token_id)[0] for _, token_id, _ in placed],
        token_logprobs=[None if entry is None else entry.logprob for _, _, entry in placed],
        top_logprobs=top_logprobs if num_alternatives else None,
        text_offset=[offset for offset, _, _ in placed],
    )
