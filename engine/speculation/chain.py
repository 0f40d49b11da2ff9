"""Drafts by a model of the core, token after token, such as a multi-token-prediction module.

The core does it in one call (cpp/draft.h); here is which positions the model still has to catch up
with, for each of the engine's lanes.
"""

import time
from bisect import bisect_right
from collections.abc import Sequence as Row
from typing import Any

import fulcrum_core
import numpy as np
from numpy.typing import NDArray

from engine.lanes import Float32Array, Lanes
from engine.sequence import Sequence
from engine.speculation.drafter import USUAL_CONFIDENCE, Draft

# Classes of a draft's own probability, on which its acceptance depends.
_CLASS_BOUNDS = (0.08, 0.16, 0.26, 0.38, 0.5, 0.62, 0.74, 0.84, 0.92, 0.97)
_CLASS_PRIORS = (0.05, 0.12, 0.2, 0.3, 0.42, 0.54, 0.66, 0.77, 0.86, 0.93, 0.97)
_UNKNOWN_PRIOR = 0.5  # of a position that was never measured
# A model that reads no hidden states can catch up with any text, but not all at once: a whole
# prompt would be a pause of several steps in every running stream. Tokens of a call, at most.
_CATCH_UP_TOKENS = 128
# Positions of a text that a call computes beside its drafts where it is asked in most steps. More
# are a call of their own: they are no part of what drafting costs.
_USUAL_POSITIONS = 10

# A sequence in a call: its place among the drafts, itself, its positions and the drafts wanted.
_Call = tuple[int, Sequence, tuple[int, int], int]


class ChainDrafter:
    """Drafts for any number of sequences in one call of the core, whose KV blocks it shares."""

    is_free = False
    priors = _CLASS_PRIORS

    def __init__(
        self,
        name: str,
        model: fulcrum_core.Model,
        lanes: Lanes,
        *,
        max_drafts: int,
        max_step_tokens: int,
        position_priors: Row[float],
        hidden: Float32Array | None = None,
        num_ids: int | None = None,
    ) -> None:
        """`model` has a KV cache of as many blocks as the target. `position_priors` are
        acceptances known beforehand; `hidden` is what the batch keeps of the target's hidden
        states, (lanes * W, D), where the model reads them. Ids from `num_ids` on are tokens of
        one of the two models only: no text that holds one is drafted for."""
        num_lanes = len(lanes.tokens)
        self.name = name
        self.max_drafts = max_drafts
        self.min_confidence = USUAL_CONFIDENCE
        self.draft_s = 0.0
        missing = max_drafts - len(position_priors)
        self.position_priors = (*position_priors, *(_UNKNOWN_PRIOR,) * missing)
        self._block_size = model.block_size
        self._window = 0 if hidden is None else len(hidden) // num_lanes
        self._max_tokens = max(max_step_tokens, self._window)
        self._num_ids = num_ids
        self._tokens = lanes.tokens
        self._core = fulcrum_core.Drafter(model, self._max_tokens, num_lanes, max_drafts)
        names = ("lanes", "begin", "end", "start", "num_drafts", "num_drafted")
        self._call: dict[str, NDArray[Any]] = {n: np.zeros(num_lanes, np.int32) for n in names}
        self._call["draft_ids"] = np.zeros((num_lanes, max_drafts), np.int32)
        self._call["draft_probs"] = np.zeros((num_lanes, max_drafts), np.float32)
        texts = {n: lanes.params[n] for n in ("temperature", "top_p", "min_p", "top_k", "seed")}
        if hidden is not None:
            texts["hidden"] = hidden
        self._blocks = lanes.blocks
        self._core.bind(tokens=lanes.tokens, blocks=lanes.blocks, **texts, **self._call)
        # Of each lane: whose text this is about, from where on it is seen, how far it is computed.
        self._owners: list[tuple[int, int] | None] = [None] * num_lanes
        self._starts = [0] * num_lanes
        self._ends = [0] * num_lanes

    def propose(self, sequences: Row[Sequence], max_drafts: Row[int]) -> list[Draft]:
        """Draft at most max_drafts[i] tokens for sequences[i], whose lane is written."""
        drafts = [Draft(self.name, [], [])] * len(sequences)
        calls: list[_Call] = []
        behind: list[_Call] = []
        budget = _CATCH_UP_TOKENS
        for index, (seq, wanted) in enumerate(zip(sequences, max_drafts, strict=True)):
            if wanted <= 0:
                continue
            span = self._hidden_span(seq) if self._window else self._text_span(seq, budget)
            if span is None:
                continue
            begin, end = span
            budget -= end - begin
            if not self._window and end < len(seq.token_ids):
                wanted = 0  # not caught up yet
            # Of several sequences some are behind in most calls: it belongs to their cost.
            if end - begin > _USUAL_POSITIONS and len(sequences) == 1:
                behind.append((index, seq, (begin, end - 1), 0))
                begin = end - 1
            calls.append((index, seq, (begin, end), min(wanted, self.max_drafts)))
        self._run_all(behind, drafts)
        began_s = time.perf_counter()
        self._run_all(calls, drafts)
        self.draft_s = time.perf_counter() - began_s
        return drafts

    def _run_all(self, calls: Row[_Call], drafts: list[Draft]) -> None:
        """Compute in as many calls as the hidden states of a step make necessary."""
        group: list[int] = []
        num_tokens = 0
        for index, seq, span, num_drafts in calls:
            count = span[1] - span[0]
            if self._window and num_tokens + count > self._max_tokens:
                self._run(group, drafts)
                group, num_tokens = [], 0
            self._write(len(group), seq, span, num_drafts)
            group.append(index)
            num_tokens += count
        self._run(group, drafts)

    def time_probe(self, num_sequences: int, *, num_drafts: int, blocks: Row[int]) -> float:
        """Draft behind the first token of as many lanes; return the seconds.

        Between two steps: `blocks` of the cache, one for each lane, are written to.
        """
        rows = np.arange(num_sequences, dtype=np.int32)
        values = {"lanes": rows, "begin": 0, "end": 1, "start": 0, "num_drafts": num_drafts}
        for name, value in values.items():
            self._call[name][:num_sequences] = value
        first_blocks = self._blocks[:num_sequences, 0]
        kept = first_blocks.copy()
        first_blocks[:] = blocks[:num_sequences]
        began_s = time.perf_counter()
        self._core.propose(num_sequences, 0.0)
        seconds = time.perf_counter() - began_s
        first_blocks[:] = kept
        return seconds

    def _text_span(self, seq: Sequence, budget: int) -> tuple[int, int] | None:
        """Positions to catch up with, and note that they are; None where there are none.

        What the prefix cache spared the target is computed here: its keys and values are others.
        """
        lane = seq.lane
        self._take_over(seq, 0)
        begin = self._ends[lane]
        # Every sequence can take at least what a step may have given it.
        end = min(len(seq.token_ids), begin + max(budget, self.max_drafts + 1))
        if begin >= end:
            return None
        if self._num_ids is not None and self._tokens[lane, begin:end].max() >= self._num_ids:
            return None
        self._ends[lane] = end
        return begin, end

    def _take_over(self, seq: Sequence, first: int) -> None:
        """Forget what the lane held before, if that was another text; this one is seen from
        `first` on."""
        owner = (seq.seq_id, seq.num_starts)
        if self._owners[seq.lane] != owner:
            self._owners[seq.lane] = owner
            self._starts[seq.lane] = self._ends[seq.lane] = first

    def _hidden_span(self, seq: Sequence) -> tuple[int, int] | None:
        """The same for a model that reads hidden states; None where too little is known."""
        lane = seq.lane
        self._take_over(seq, seq.first_computed)
        # With a hidden state goes the token after it: the last token has none yet.
        end = len(seq.token_ids) - 1
        begin = self._ends[lane]
        if begin < end - self._window:
            # The states in between are gone: the text is seen from a later block on.
            oldest = end - self._window
            begin = self._starts[lane] = -(-oldest // self._block_size) * self._block_size
        if begin >= end:
            return None
        self._ends[lane] = end
        return begin, end

    def _write(self, row: int, seq: Sequence, span: tuple[int, int], num_drafts: int) -> None:
        call = self._call
        call["lanes"][row] = seq.lane
        call["begin"][row], call["end"][row] = span
        call["start"][row] = self._starts[seq.lane]
        call["num_drafts"][row] = num_drafts

    def _run(self, group: Row[int], drafts: list[Draft]) -> None:
        """Compute what is written for a group and put it into its places of `drafts`."""
        count = len(group)
        if not count:
            return
        self._core.propose(count, self.min_confidence)
        for index, number, ids, probs in zip(
            group,
            self._call["num_drafted"][:count].tolist(),
            self._call["draft_ids"][:count].tolist(),
            self._call["draft_probs"][:count].tolist(),
            strict=True,
        ):
            if self._num_ids is not None:
                number = next((i for i in range(number) if ids[i] >= self._num_ids), number)
            buckets = [bisect_right(_CLASS_BOUNDS, prob) for prob in probs[:number]]
            drafts[index] = Draft(self.name, ids[:number], buckets)
