"""One sequence through a core that serves nobody, chunk by chunk, with its logits.

Quality is measured by it, and a new core checks itself by it before it serves.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.batch import Core
from engine.step_buffers import MAX_LOGPROBS

_INT32_ROWS = (
    "token_ids", "positions", "slot_mapping", "logits_rows", "target_ids", "top_k",
    "num_logprobs", "noise_position", "history_start", "history_output_start", "history_end",
    "sampled_ids",
)  # fmt: skip
_FLOAT32_ROWS = (
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "sampled_logprobs",
)  # fmt: skip


class CoreProbe:
    """Binds buffers of its own; whoever serves afterwards binds theirs."""

    def __init__(self, core: Core, vocab_size: int, *, max_tokens: int, max_rows: int) -> None:
        self._core = core
        num_blocks = -(-max_tokens // core.block_size)
        buffers: dict[str, NDArray[Any]] = {
            **{name: np.zeros(max_rows, np.int32) for name in _INT32_ROWS},
            **{name: np.zeros(max_rows, np.float32) for name in _FLOAT32_ROWS},
            "query_start": np.zeros(2, np.int32),
            "seq_lens": np.zeros(1, np.int32),
            "block_table": np.arange(num_blocks, dtype=np.int32)[None],
            "seed": np.zeros(max_rows, np.uint64),
            "bias_start": np.zeros(max_rows + 1, np.int32),
            "history_ids": np.zeros(1, np.int32),
            "bias_ids": np.zeros(1, np.int32),
            "bias_values": np.zeros(1, np.float32),
            "top_ids": np.zeros((max_rows, MAX_LOGPROBS), np.int32),
            "top_logprobs": np.zeros((max_rows, MAX_LOGPROBS), np.float32),
            "logits": np.zeros((max_rows, vocab_size), np.float32),
        }
        for name, value in (("target_ids", -1), ("num_logprobs", -1), ("repetition_penalty", 1)):
            buffers[name][:] = value
        buffers["top_p"][:] = 1
        self._buffers = buffers
        core.bind(**buffers)

    def logits(self, begin: int, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (T, V) of the ids at positions from `begin` on; valid until the next call."""
        count = len(token_ids)
        buffers = self._buffers
        positions = np.arange(begin, begin + count, dtype=np.int32)
        buffers["token_ids"][:count] = token_ids
        buffers["positions"][:count] = positions
        buffers["slot_mapping"][:count] = positions  # its blocks lie in order
        buffers["logits_rows"][:count] = np.arange(count)
        buffers["query_start"][1] = count
        buffers["seq_lens"][0] = begin + count
        self._core.step(count, 1, count)
        rows: NDArray[np.float32] = buffers["logits"][:count]
        return rows


def self_check(core: Core, vocab_size: int, *, num_tokens: int = 24) -> str | None:
    """What is wrong with a core that is to serve, or None.

    A text computed at once and the same token by token must agree to the bit, in finite numbers:
    that holds only where weights, cache and kernels fit together.
    """
    probe = CoreProbe(core, vocab_size, max_tokens=num_tokens, max_rows=num_tokens)
    token_ids = (np.arange(1, num_tokens + 1) * 7919 % vocab_size).tolist()
    together = probe.logits(0, token_ids).copy()
    if not np.isfinite(together).all():
        return "its logits are not finite"
    if float(np.ptp(together[-1])) == 0.0:
        return "its logits are all equal"
    for position, token_id in enumerate(token_ids):
        if not np.array_equal(probe.logits(position, [token_id])[0], together[position]):
            return f"token {position} computed alone differs from the same in a chunk"
    return None
