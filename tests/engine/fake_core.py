"""A core without arithmetic: it keeps token ids where the real one keeps keys and values.

The next id is a hash of everything that may influence it, gathered through the block table as
attention would. A wrong slot, block, length or parameter therefore changes the text or fails an
assertion. `expected_output` says what the engine must produce, without any of its machinery.
"""

import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.types import SamplingParams

VOCAB_SIZE = 50
POISON_ID = 49  # a prefix that ends with it yields logits that are not numbers

PARAM_TYPES = {
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
    "repetition_penalty": np.float32,
    "presence_penalty": np.float32,
    "frequency_penalty": np.float32,
    "top_k": np.int32,
    "seed": np.uint64,
}
_BUFFER_TYPES = {
    **PARAM_TYPES,
    "token_ids": np.int32,
    "positions": np.int32,
    "slot_mapping": np.int32,
    "query_start": np.int32,
    "seq_lens": np.int32,
    "block_table": np.int32,
    "logits_rows": np.int32,
    "target_ids": np.int32,
    "num_logprobs": np.int32,
    "noise_position": np.int32,
    "history_start": np.int32,
    "history_output_start": np.int32,
    "history_end": np.int32,
    "history_ids": np.int32,
    "bias_start": np.int32,
    "bias_ids": np.int32,
    "bias_values": np.float32,
    "sampled_ids": np.int32,
    "sampled_logprobs": np.float32,
    "top_ids": np.int32,
    "top_logprobs": np.float32,
}


def _digest(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def draw(prefix: Sequence[int], params: dict[str, float], bias: dict[int, float]) -> int:
    """The id after `prefix`, never a banned one; -1 after the poison id."""
    if prefix[-1] == POISON_ID:
        return -1
    banned = {token_id for token_id, value in bias.items() if value == -np.inf}
    kept = tuple(sorted((i, v) for i, v in bias.items() if v != -np.inf))
    settings = tuple((name, float(np.float32(params[name]))) for name in PARAM_TYPES)
    # The poison id comes from prompts alone, so that a test knows which sequence it ends.
    allowed = [i for i in range(VOCAB_SIZE) if i not in banned and i != POISON_ID]
    return allowed[_digest(tuple(prefix), settings, kept) % len(allowed)]


def logprob(prefix: Sequence[int], token_id: int) -> float:
    return float(np.float32(-(_digest(tuple(prefix), token_id, "logprob") % 1000) / 64))


def top_ids(prefix: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(_digest(tuple(prefix), rank, "top") % VOCAB_SIZE for rank in range(count))


def is_penalised(params: dict[str, float]) -> bool:
    return (
        params["repetition_penalty"] != 1
        or params["presence_penalty"] != 0
        or params["frequency_penalty"] != 0
    )


def expected_output(
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    max_model_len: int,
    eos_token_ids: Sequence[int] = (),
) -> tuple[list[int], str]:
    """Token ids and finish reason of a sequence computed alone, one whole prefix at a time."""
    values = {name: getattr(params, name) for name in PARAM_TYPES}
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    tokens = list(prompt_ids)
    while True:
        num_output = len(tokens) - len(prompt_ids)
        bias = dict(params.logit_bias)
        if num_output < params.min_tokens:
            bias |= dict.fromkeys((*params.stop_token_ids, *eos_token_ids), -np.inf)
        token_id = draw(tokens, values, bias)
        if token_id < 0:
            return tokens[len(prompt_ids) :], "error"
        tokens.append(token_id)
        if token_id in stop_ids:
            return tokens[len(prompt_ids) :], "stop"
        if num_output + 1 >= params.max_tokens or len(tokens) >= max_model_len:
            return tokens[len(prompt_ids) :], "length"


class FakeCore:
    """Binds and steps as `fulcrum_core.Model` does."""

    def __init__(self, num_blocks: int, block_size: int = 4) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.cached_ids = np.full(num_blocks * block_size, -1, np.int32)
        self.cached_positions = np.full(num_blocks * block_size, -1, np.int32)
        self.buffers: dict[str, NDArray[Any]] = {}
        self.step_sizes: list[int] = []  # tokens of each step, the failed ones included
        self.failing_steps: set[int] = set()  # by index
        self.gate = threading.Event()  # cleared: steps hang
        self.gate.set()
        self.entered = threading.Event()  # set at the start of every step

    def bind(self, **buffers: NDArray[Any]) -> None:
        assert {name: buffer.dtype for name, buffer in buffers.items()} == _BUFFER_TYPES
        assert all(buffer.flags.c_contiguous for buffer in buffers.values())
        self.buffers = buffers

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None:
        self.entered.set()
        assert self.gate.wait(30), "a test left the gate closed"
        self.step_sizes.append(num_tokens)
        if len(self.step_sizes) - 1 in self.failing_steps:
            # What a failed step leaves in its slots is garbage that nobody may read.
            self.cached_ids[self.buffers["slot_mapping"][:num_tokens]] = -5
            raise RuntimeError("planted failure")
        b = self.buffers
        slots = b["slot_mapping"][:num_tokens]
        assert len(set(slots.tolist())) == num_tokens, "two tokens share a slot"
        self.cached_ids[slots] = b["token_ids"][:num_tokens]
        self.cached_positions[slots] = b["positions"][:num_tokens]
        query_start = b["query_start"][: num_sequences + 1]
        assert (query_start[0], query_start[-1]) == (0, num_tokens)
        last = query_start[1:] - 1
        assert np.array_equal(b["positions"][last] + 1, b["seq_lens"][:num_sequences])
        rows = b["logits_rows"][:num_rows]
        assert np.all(np.diff(rows) > 0), "rows are not ascending"
        for row, token_row in enumerate(rows.tolist()):
            sequence = int(np.searchsorted(query_start, token_row, "right")) - 1
            self._compute_row(row, self._gather(sequence, int(b["positions"][token_row]) + 1))

    def _gather(self, sequence: int, num_tokens: int) -> list[int]:
        """The prefix of a sequence as attention would see it."""
        positions = np.arange(num_tokens)
        blocks = self.buffers["block_table"][sequence, positions // self.block_size]
        slots = blocks * self.block_size + positions % self.block_size
        assert np.array_equal(self.cached_positions[slots], positions), "wrong block table"
        prefix: list[int] = self.cached_ids[slots].tolist()
        return prefix

    def _compute_row(self, row: int, prefix: list[int]) -> None:
        b = self.buffers
        assert b["noise_position"][row] == len(prefix)
        count = int(b["num_logprobs"][row])
        target_id = int(b["target_ids"][row])
        if target_id >= 0:
            token_id = b["sampled_ids"][row] = -1 if prefix[-1] == POISON_ID else target_id
        else:
            token_id = b["sampled_ids"][row] = self._sample(row, prefix)
        if count >= 0:
            b["sampled_logprobs"][row] = logprob(prefix, token_id)
            b["top_ids"][row, :count] = top_ids(prefix, count)
            b["top_logprobs"][row, :count] = [-rank for rank in range(count)]

    def _sample(self, row: int, prefix: list[int]) -> int:
        b = self.buffers
        params = {name: b[name][row].item() for name in PARAM_TYPES}
        start, end = int(b["history_start"][row]), int(b["history_end"][row])
        if is_penalised(params):
            assert b["history_ids"][start:end].tolist() == prefix, "wrong history"
            assert start < b["history_output_start"][row] <= end
        else:
            assert start == end, "a history that nobody asked for"
        first, last = int(b["bias_start"][row]), int(b["bias_start"][row + 1])
        ids, values = b["bias_ids"][first:last].tolist(), b["bias_values"][first:last].tolist()
        return draw(prefix, params, dict(zip(ids, values, strict=True)))
