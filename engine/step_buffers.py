"""The buffers that a step is laid out in: the batch owns them, the core reads and writes them."""

# Names, shapes and types of the buffers that `fulcrum_core.Model.bind` takes. S = max_sequences,
# T = max_step_tokens, R = rows that need logits (at most T), M = blocks per sequence.
#
#   token_ids, positions, slot_mapping   int32 (T,)    slot = block * block_size + offset
#   query_start                          int32 (S+1,)  first row of each sequence
#   seq_lens                             int32 (S,)    tokens in the cache after this step
#   block_table                          int32 (S, M)
#   logits_rows                          int32 (R,)    ascending indices into T
# per row of R:
#   target_ids       int32   -1: sample; else: only the log probability of this id
#   temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty   float32
#   top_k            int32   0: off
#   num_logprobs     int32   -1: none wanted, else the number of alternatives, at most 20
#   seed             uint64
#   noise_position   int32   index in the sequence of the token being sampled
#   history_start, history_output_start, history_end   int32   ranges of history_ids: the
#       sequence's tokens so far, where its output begins; equal start and end: no penalties
#   bias_start       int32 (R+1,)  ranges of bias_ids / bias_values, added to the logits
# variable length, bound again when they must grow:
#   history_ids int32, bias_ids int32, bias_values float32
# written by the core:
#   sampled_ids int32 (R,)   the target where there is one; -1 where the row's logits are unusable
#   sampled_logprobs float32 (R,) (only where num_logprobs >= 0)
#   top_ids int32 (R, 20), top_logprobs float32 (R, 20)   descending, num_logprobs of them
#   logits float32 (R, V), optional: bound by tests and tools only
#   hidden float32 (any, D), optional: states after the final norm, that of token t in row
#       hidden_rows[t] (int32 (T,), -1: not wanted)

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.lanes import PARAM_TYPES

MAX_LOGPROBS = 20


def allocate_buffers(
    max_sequences: int, max_step_tokens: int, num_blocks: int
) -> dict[str, NDArray[Any]]:
    """All of them but `history_ids`, which is the lanes' table of tokens."""
    per_row: dict[str, Any] = {
        **PARAM_TYPES,
        "target_ids": np.int32,
        "num_logprobs": np.int32,
        "noise_position": np.int32,
        "history_start": np.int32,
        "history_output_start": np.int32,
        "history_end": np.int32,
        "logits_rows": np.int32,
        "sampled_ids": np.int32,
        "sampled_logprobs": np.float32,
    }
    per_token = ("token_ids", "positions", "slot_mapping")
    buffers: dict[str, NDArray[Any]] = {
        name: np.zeros(max_step_tokens, np.int32) for name in per_token
    }
    buffers |= {name: np.zeros(max_step_tokens, dtype) for name, dtype in per_row.items()}
    buffers |= {
        "query_start": np.zeros(max_sequences + 1, np.int32),
        "seq_lens": np.zeros(max_sequences, np.int32),
        "block_table": np.zeros((max_sequences, num_blocks), np.int32),
        "bias_start": np.zeros(max_step_tokens + 1, np.int32),
        "bias_ids": np.zeros(1024, np.int32),
        "bias_values": np.zeros(1024, np.float32),
        "top_ids": np.zeros((max_step_tokens, MAX_LOGPROBS), np.int32),
        "top_logprobs": np.zeros((max_step_tokens, MAX_LOGPROBS), np.float32),
    }
    return buffers
