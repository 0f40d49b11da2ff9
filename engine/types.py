"""Every type that crosses a boundary between the event loop, the engine thread and the core.

Messages are frozen: they may be handed to another thread without a lock. The two mutable
types live elsewhere, each with its owner: `Stream` in the server, `Sequence` in the engine.
"""

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one sequence are drawn; validated by the server, trusted by the engine.

    `seed` is always set: the server draws one where the client gave none, so that a sequence
    that is recomputed after preemption continues with the same text.
    """

    max_tokens: int  # upper bound on generated tokens; at least 1
    min_tokens: int = 0  # end-of-sequence and stop ids cannot be sampled before this many
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers does
    presence_penalty: float = 0.0  # over output only, as OpenAI's
    frequency_penalty: float = 0.0  # over output only, as OpenAI's
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0  # 64 bits, unsigned
    stop_token_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence ids
    ignore_eos: bool = False
    num_logprobs: int | None = None  # None: none; 0: the sampled token's own; up to 20 alternatives
    num_prompt_logprobs: int | None = None  # likewise, for the prompt's tokens (echo)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural-log probabilities at one position, of the model's own distribution.

    They are taken before penalties, bias, temperature and truncation.
    """

    token_id: int
    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


DrafterChoice = Literal["auto", "off", "ngram", "mtp", "draft"]


class DraftSummary(msgspec.Struct, frozen=True):
    """What speculation did for one sequence."""

    num_steps: int  # that sampled tokens of it
    num_drafted: int  # tokens verified
    num_accepted: int
    accepted_by_position: tuple[int, ...]
    drafters: dict[str, int]  # accepted tokens by drafter


class Submit(msgspec.Struct, frozen=True):
    """Server to engine: compute this sequence."""

    seq_id: int
    prompt_ids: tuple[int, ...]  # at least one
    params: SamplingParams
    arrived_at_s: float  # time.monotonic() at the handler
    priority: int = 0  # lower goes first; see `rank_s`
    drafter: DrafterChoice = "auto"  # who may draft for it
    wants_draft_stats: bool = False


# What a step of priority is worth in waiting time. It is finite, so that nobody starves: a
# sequence is overtaken only by what arrives within this time of each step between the two.
PRIORITY_STEP_S = 10.0


def rank_s(arrived_at_s: float, priority: int) -> float:
    """Place in the queue: the lowest goes first. Fixed at arrival, however long it waits."""
    return arrived_at_s + PRIORITY_STEP_S * priority


class Abort(msgspec.Struct, frozen=True):
    """Server to engine: nobody reads this sequence any more. Unknown ids are ignored."""

    seq_id: int


class TokenEvent(msgspec.Struct, frozen=True):
    """Engine to server: what one step did for one sequence.

    A sequence ends with exactly one event whose `finish_reason` is set. The end-of-sequence or
    stop id that ended it is the last of `token_ids`, so that usage counts it.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None  # one per token id, if asked for
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None  # once, the first one None
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache; set on the first event
    queued_s: float | None = None  # arrival to first scheduling; set on the first event
    error: str | None = None  # with finish_reason "error"
    drafts: DraftSummary | None = None  # so far, where it was asked for


class EngineLoad(msgspec.Struct, frozen=True):
    """The engine's state after a step: what admission and the metrics read."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0  # blocks that a sequence could get now, cached ones included
    num_held_blocks: int = 0
    num_total_blocks: int = 0
    num_preemptions: int = 0  # since the start, as the three below
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_steps: int = 0


class StepReport(msgspec.Struct, frozen=True):
    """Engine to server, once per step: all events of the step, in one wake-up."""

    events: tuple[TokenEvent, ...]
    load: EngineLoad
    step_s: float = 0.0  # wall time of the step, 0 where nothing was computed
    num_step_tokens: int = 0  # T of the step
    num_drafted: int = 0  # of these, drafted ones that it verified
    num_decoding: int = 0  # of these, next tokens of sequences that lacked nothing else
    num_emitted: int = 0  # tokens that those sequences got
    # (tokens, seconds) of steps on the core that serves from now on, as far as they were timed;
    # None: the core is the same as before.
    step_costs: tuple[tuple[int, float], ...] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of prompts, and of preempted sequences that are computed again."""
        return self.num_step_tokens - self.num_drafted - self.num_decoding
