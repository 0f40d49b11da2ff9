"""One sequence as the engine thread sees it: its tokens, what of them is computed, its blocks.

The scheduler creates and moves sequences; the batch reads them. No other thread sees one.
"""

import enum

from engine.speculation.stats import DraftStats
from engine.types import (
    FinishReason,
    SamplingParams,
    Submit,
    TokenEvent,
    TokenLogprobs,
    rank_s,
)


class SequenceStatus(enum.Enum):
    WAITING = enum.auto()  # holds no blocks and no lane
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """A prompt, the output so far, and how much of both the KV cache holds."""

    __slots__ = (
        "arrived_at_s",
        "awaited_digest",
        "block_digests",
        "block_ids",
        "draft_ids",
        "draft_stats",
        "drafter",
        "first_computed",
        "lane",
        "needs_prompt_logprobs",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "num_published_blocks",
        "num_starts",
        "params",
        "prompt_logprobs",
        "queued_s",
        "rank",
        "reported",
        "seq_id",
        "status",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self, message: Submit, eos_token_ids: frozenset[int], arrival_index: int = 0
    ) -> None:
        params: SamplingParams = message.params
        self.seq_id = message.seq_id
        self.params = params
        self.arrived_at_s = message.arrived_at_s
        # Lower goes first: by priority and arrival, and among equals first come, first served.
        self.rank = (rank_s(message.arrived_at_s, message.priority), arrival_index)
        self.token_ids = list(message.prompt_ids)
        self.num_prompt_tokens = len(message.prompt_ids)
        # Tokens whose keys and values are in the cache. Every step advances it to at most
        # len(token_ids), prefill or decode; preemption puts it back to 0.
        self.num_computed_tokens = 0
        self.block_ids: list[int] = []
        self.block_digests: list[bytes] = []  # of the full blocks of token_ids, as far as known
        self.num_published_blocks = 0
        # While waiting: a block that a running sequence is computing and this one can share.
        self.awaited_digest: bytes | None = None
        self.status = SequenceStatus.WAITING
        self.lane = -1  # its row in the batch's tables while running
        self.num_starts = 0  # how often it was given a lane: once more after each preemption
        self.first_computed = 0  # since the last start; the prefix cache had what lies before
        # Tokens proposed to follow token_ids; those that the coming step verifies.
        self.draft_ids: list[int] = []
        self.drafter = message.drafter
        self.draft_stats = DraftStats() if message.wants_draft_stats else None
        stop_ids = frozenset(params.stop_token_ids)
        self.stop_ids = stop_ids if params.ignore_eos else stop_ids | eos_token_ids
        self.num_cached_tokens = 0
        self.queued_s: float | None = None
        self.reported = False  # whether its first event is out
        self.needs_prompt_logprobs = params.num_prompt_logprobs is not None
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def event(
        self,
        token_ids: tuple[int, ...] = (),
        finish_reason: FinishReason | None = None,
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        error: str | None = None,
    ) -> TokenEvent:
        """Make the next event of this sequence; the first one carries what is said only once."""
        # In every event: the server may end a sequence, at a stop string, before the engine does.
        drafts = None if self.draft_stats is None else self.draft_stats.summary()
        if self.reported:
            return TokenEvent(
                self.seq_id, token_ids, finish_reason, logprobs, None, 0, None, error, drafts
            )
        self.reported = True
        prompt_logprobs = None
        if self.params.num_prompt_logprobs is not None and token_ids:
            prompt_logprobs = tuple(self.prompt_logprobs)
        return TokenEvent(
            self.seq_id,
            token_ids,
            finish_reason,
            logprobs,
            prompt_logprobs,
            self.num_cached_tokens,
            self.queued_s,
            error,
            drafts,
        )
