"""What the batch keeps of each running sequence from step to step, one lane for each.

Sampling parameters are written once, when a sequence starts; tokens and blocks grow in place.
A step's tensors are then gathered from the lanes without Python work per token. Only the batch
uses them; the scheduler hands out the lanes' numbers.
"""

from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.sequence import Sequence

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

# What of SamplingParams goes into a buffer of the same name, one value a row.
PARAM_TYPES: dict[str, Any] = {
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "top_k": np.int32,
    "seed": np.uint64,
}


@dataclass(slots=True)
class Bias:
    """Additions to the logits of one sequence: at first with stop ids banned, later without."""

    min_position: int  # stop ids are banned while the sampled token's index is below this
    early: tuple[Int32Array, Float32Array]
    late: tuple[Int32Array, Float32Array]

    def at(self, position: int) -> tuple[Int32Array, Float32Array]:
        return self.early if position < self.min_position else self.late


class Lanes:
    """Columns of state, indexed by lane."""

    def __init__(
        self, num_lanes: int, max_model_len: int, block_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._eos_token_ids = eos_token_ids
        # Whole texts: a step's ids and the penalties' history are both ranges of them, so that
        # neither is copied. Pages that no text reaches are never touched and cost no memory.
        self.tokens = np.zeros((num_lanes, max_model_len), np.int32)
        self.blocks = np.zeros((num_lanes, -(-max_model_len // block_size)), np.int32)
        # Both as one row each: to gather from two dimensions NumPy releases the interpreter's lock,
        # which another thread may then keep for milliseconds.
        self.flat_tokens = self.tokens.reshape(-1)
        self.flat_blocks = self.blocks.reshape(-1)
        self._num_blocks = [0] * num_lanes
        self.params = {name: np.zeros(num_lanes, dtype) for name, dtype in PARAM_TYPES.items()}
        self.num_logprobs = np.zeros(num_lanes, np.int32)
        self.num_prompt_logprobs = np.zeros(num_lanes, np.int32)
        self.num_prompt_tokens = np.zeros(num_lanes, np.int32)
        self.is_penalised = np.zeros(num_lanes, np.int32)  # 0 or 1
        self.is_biased = np.zeros(num_lanes, np.bool_)
        self.bias: dict[int, Bias] = {}  # of the biased lanes; stale entries for others

    def open(self, seq: Sequence) -> None:
        """Write what does not change while `seq` runs, and its tokens so far."""
        lane, params = seq.lane, seq.params
        self.tokens[lane, : len(seq.token_ids)] = seq.token_ids
        self._num_blocks[lane] = 0
        for name, values in self.params.items():
            values[lane] = getattr(params, name)
        self.num_logprobs[lane] = _count_or_none(params.num_logprobs)
        self.num_prompt_logprobs[lane] = _count_or_none(params.num_prompt_logprobs)
        self.num_prompt_tokens[lane] = seq.num_prompt_tokens
        self.is_penalised[lane] = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self.is_biased[lane] = bool(params.logit_bias) or params.min_tokens > 0
        if self.is_biased[lane]:
            self.bias[lane] = self._make_bias(seq)

    def write_drafts(self, seq: Sequence) -> None:
        """Put the drafts behind the tokens, as penalties see them."""
        end = len(seq.token_ids)
        self.tokens[seq.lane, end : end + len(seq.draft_ids)] = seq.draft_ids

    def write_new_blocks(self, entries: Row[tuple[Sequence, int]]) -> None:
        """Append the blocks that sequences were given since the step before."""
        for seq, _ in entries:
            lane = seq.lane
            num_written = self._num_blocks[lane]
            num_blocks = len(seq.block_ids)
            if num_blocks != num_written:
                self.blocks[lane, num_written:num_blocks] = seq.block_ids[num_written:]
                self._num_blocks[lane] = num_blocks

    def _make_bias(self, seq: Sequence) -> Bias:
        params = seq.params
        late = dict(params.logit_bias)
        banned = {*self._eos_token_ids, *params.stop_token_ids} if params.min_tokens > 0 else ()
        early = late | dict.fromkeys(banned, -np.inf)
        return Bias(seq.num_prompt_tokens + params.min_tokens, _as_arrays(early), _as_arrays(late))


def _as_arrays(bias: dict[int, float]) -> tuple[Int32Array, Float32Array]:
    return np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)


def _count_or_none(count: int | None) -> int:
    return -1 if count is None else count
