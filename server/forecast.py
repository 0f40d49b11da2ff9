"""Predicts when a request would get its first and its last token: pure functions of numbers.

Admission calls `forecast`. It plays the scheduler's rules forward in steps: sequences hold lanes
and KV blocks until their expected end, and those that wait take them in order of rank.
"""

import heapq
import math
from collections.abc import Iterable

import msgspec

from engine.mixed_steps import mixed_chunk
from server.cost_model import Costs


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the server may hold, and the first token's latest time. 0 blocks: not known."""

    max_sequences: int  # that the engine runs at once
    max_queue: int  # that may wait beyond those
    max_step_tokens: int = 512
    num_blocks: int = 0
    block_size: int = 16
    max_ttft_s: float = math.inf
    # Beside which a sequence may be computed, where that is more than may be promised.
    max_company: int = 0

    @property
    def capacity(self) -> int:
        return self.max_sequences + self.max_queue

    def scaled(self, factor: float) -> "Limits":
        """The limits of a device of which only this share can be relied on; at least 1 of each."""
        if factor >= 1:
            return self
        return msgspec.structs.replace(
            self,
            # The engine knows nothing of it and starts whoever waits.
            max_company=max(self.max_company, self.max_sequences),
            max_sequences=max(1, int(self.max_sequences * factor)),
            max_queue=int(self.max_queue * factor),
            num_blocks=math.ceil(self.num_blocks * factor),
        )


class OpenSequence(msgspec.Struct, frozen=True):
    """A sequence that the server has promised an answer."""

    rank_s: float
    num_prompt_tokens: int
    num_output_tokens: int  # so far; 0: it waits, or its prompt is being computed
    max_tokens: int
    ignore_eos: bool = False


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What a request wants. Before its prompts are encoded they count as one of 1 token."""

    rank_s: float
    num_sequences: int = 1  # as many for each prompt
    prompt_lengths: tuple[int, ...] = (1,)
    max_tokens: int | None = None  # None: not known yet
    ignore_eos: bool = False
    priority: int = 0
    timeout_s: float | None = None  # that is left
    is_promised: bool = False  # it was told to come again now

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lengths)


class Forecast(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds from now, for the last of the request's sequences."""

    ttft_s: float
    end_s: float
    idle_end_s: float  # as if nothing else were open
    work_s: float  # of the engine's time, at full concurrency
    num_blocks: int  # that the request is expected to need
    most_blocks: int  # of these, for one sequence
    starts_now: bool  # lanes and blocks are free for all of it


def forecast(
    ask: Ask, open_sequences: Iterable[OpenSequence], costs: Costs, limits: Limits
) -> Forecast:
    """Predict for `ask` beside what is open; times are 0 while nothing is known of steps."""
    return Outlook(ask.rank_s, open_sequences, costs, limits).forecast(ask)


class Outlook:
    """What is open, played forward to where a request of one rank would have its turn.

    It takes most of the time of a forecast, and serves several: every refusal needs them.
    """

    def __init__(
        self, rank_s: float, open_sequences: Iterable[OpenSequence], costs: Costs, limits: Limits
    ) -> None:
        self._costs = costs
        self._limits = limits
        held, ahead = [], []
        for seq in open_sequences:
            if seq.num_output_tokens:
                held.append(_needs(seq, costs, limits))
            elif seq.rank_s <= rank_s:
                ahead.append(seq)
        self._lanes = _Lanes(limits, held)
        ahead.sort(key=_rank_s)
        self._lanes.start([_needs(seq, costs, limits) for seq in ahead])
        self._num_ahead = len(ahead)
        self._num_ahead_tokens = costs.uncached_share * sum(seq.num_prompt_tokens for seq in ahead)

    def put_ahead(self, seq: OpenSequence, count: int = 1) -> None:
        """Let so many more sequences like `seq` have their turn first."""
        self._lanes.start([_needs(seq, self._costs, self._limits)] * count)
        self._num_ahead += count
        self._num_ahead_tokens += count * seq.num_prompt_tokens * self._costs.uncached_share

    def forecast(self, ask: Ask) -> Forecast:
        """Predict for `ask`, which has the outlook's rank."""
        costs, limits, lanes = self._costs, self._limits, self._lanes
        num_output = _expected_output(ask.max_tokens, ask.ignore_eos, 0, costs)
        own_blocks = [_num_blocks(length + num_output, limits) for length in ask.prompt_lengths]
        num_choices = ask.num_sequences // len(own_blocks)
        # Whoever is there beside it, whenever they start: fewer blocks or lanes are not less
        # company.
        num_lanes = max(limits.max_company, limits.max_sequences)
        num_decoding = min(lanes.num_held + self._num_ahead, num_lanes)
        num_steps = num_output / costs.tokens_per_step
        start_step = lanes.start(
            [(blocks, num_steps) for blocks in own_blocks for _ in range(num_choices)],
            is_trial=True,
        )
        # Choices of one prompt share its keys and values: it is computed once.
        num_own_tokens = sum(
            max(1.0, length * costs.uncached_share) for length in ask.prompt_lengths
        )
        num_work_tokens = num_own_tokens
        if ask.max_tokens is None:  # its prompt is not encoded yet: it counts as a mean one
            num_work_tokens = costs.mean_prompt_tokens * costs.uncached_share
        steady_s = costs.step_s(_steady_tokens(num_decoding, costs, limits))
        wait_s = max(
            start_step * steady_s,
            _prefill_s(self._num_ahead_tokens, num_decoding, costs, limits),
        )
        if num_decoding:
            wait_s += steady_s / 2  # the step that is being computed
        own_s = _prefill_s(num_own_tokens, num_decoding, costs, limits)
        ttft_s = (wait_s + own_s) * costs.ttft_scale
        width = min(num_lanes, num_decoding + ask.num_sequences)
        idle_ttft_s = _prefill_s(num_own_tokens, 0, costs, limits)
        share_s = costs.decode_s(limits.max_sequences) / limits.max_sequences
        num_full_tokens = limits.max_sequences * costs.verified_per_step
        chunk = _chunk(num_work_tokens, limits.max_sequences, costs, limits)
        mixed_s = costs.step_s(chunk + num_full_tokens)
        prompt_token_s = (mixed_s - costs.step_s(num_full_tokens)) / chunk
        return Forecast(
            ttft_s=ttft_s,
            end_s=ttft_s + (num_output - 1) * costs.decode_s(width),
            idle_end_s=idle_ttft_s + (num_output - 1) * costs.decode_s(ask.num_sequences),
            work_s=ask.num_sequences * num_output * share_s + num_work_tokens * prompt_token_s,
            num_blocks=sum(own_blocks) * num_choices,
            most_blocks=max(own_blocks),
            starts_now=start_step == 0,
        )


class _Lanes:
    """Lanes and blocks over the coming steps, as the open sequences are expected to free them."""

    def __init__(self, limits: Limits, held: list[tuple[int, float]]) -> None:
        """`held` are blocks, and steps that are left, of those that run: each has its lane,
        whatever the limits say."""
        self._num_free = limits.max_sequences - len(held)
        num_blocks = limits.num_blocks if limits.num_blocks else math.inf
        self._num_free_blocks = num_blocks - sum(blocks for blocks, _ in held)
        self._ends = [(num_steps, blocks) for blocks, num_steps in held]  # a heap
        heapq.heapify(self._ends)
        self.num_held = len(held)
        self._step = 0.0  # of the last start: nobody overtakes who waits for blocks

    def start(self, needs: Iterable[tuple[int, float]], *, is_trial: bool = False) -> float:
        """Step at which the last of new sequences, one after the other, gets a lane and blocks."""
        step, ends = self._step, self._ends.copy() if is_trial else self._ends
        num_free, num_free_blocks = self._num_free, self._num_free_blocks
        for num_blocks, num_steps in needs:
            while ends and (num_free < 1 or num_free_blocks < num_blocks):
                end, freed = heapq.heappop(ends)
                if end > step:
                    step = end
                num_free += 1
                num_free_blocks += freed
            num_free -= 1
            num_free_blocks -= num_blocks
            heapq.heappush(ends, (step + num_steps, num_blocks))
        if not is_trial:
            self._step = step
            self._num_free, self._num_free_blocks = num_free, num_free_blocks
        return step


def _chunk(num_tokens: float, num_decoding: int, costs: Costs, limits: Limits) -> int:
    """Tokens of prompts that a step computes beside so many decoding sequences."""
    num_drafted = num_decoding * (costs.verified_per_step - 1)
    chunk = mixed_chunk(num_decoding, num_decoding, num_drafted, num_tokens)
    return max(1, min(chunk, limits.max_step_tokens - num_decoding))


def _prefill_s(num_tokens: float, num_decoding: int, costs: Costs, limits: Limits) -> float:
    """Seconds to compute so many tokens of prompts beside decoding sequences."""
    if num_tokens <= 0:
        return 0.0
    chunk = (
        _chunk(num_tokens, num_decoding, costs, limits) if num_decoding else limits.max_step_tokens
    )
    num_full, rest = divmod(num_tokens, chunk)
    num_beside = num_decoding * costs.verified_per_step
    full_s = num_full * costs.step_s(chunk + num_beside) if num_full else 0.0
    return full_s + (costs.step_s(rest + num_beside) if rest else 0.0)


def _steady_tokens(num_decoding: int, costs: Costs, limits: Limits) -> float:
    """Tokens of a mean step while one sequence follows the other."""
    num_steps = costs.mean_output_tokens / costs.tokens_per_step
    per_sequence = costs.mean_prompt_tokens * costs.uncached_share / num_steps
    num_drafts = num_decoding * (costs.verified_per_step - 1)
    most = num_decoding + _chunk(
        num_decoding * costs.mean_prompt_tokens, num_decoding, costs, limits
    )
    mixed = min(num_decoding * (1 + per_sequence), most)
    return mixed + num_drafts


def _expected_output(
    max_tokens: int | None, ignore_eos: bool, num_output_tokens: int, costs: Costs
) -> float:
    """Tokens that a sequence is expected to generate in all, more than it has."""
    if max_tokens is not None and ignore_eos:
        return max_tokens
    # Who has outlived the mean is expected to go on for a while.
    expected = max(costs.mean_output_tokens, num_output_tokens + costs.mean_output_tokens / 4)
    return max(1.0, expected if max_tokens is None else min(expected, max_tokens))


def _needs(seq: OpenSequence, costs: Costs, limits: Limits) -> tuple[int, float]:
    """The blocks that a sequence will have at its end, and the steps until then."""
    num_sofar = seq.num_output_tokens
    total = _expected_output(seq.max_tokens, seq.ignore_eos, num_sofar, costs)
    num_steps = (total - num_sofar) / costs.tokens_per_step
    return _num_blocks(seq.num_prompt_tokens + total, limits), num_steps if num_steps > 1 else 1.0


def _num_blocks(num_tokens: float, limits: Limits) -> int:
    return math.ceil(num_tokens / limits.block_size) if limits.num_blocks else 0


def _rank_s(seq: OpenSequence) -> float:
    return seq.rank_s
