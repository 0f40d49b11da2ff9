"""Flat tensors of a step, allocated once and refilled: the core reads and writes them in place.

The engine loop fills a `Batch` from the scheduler's plan before each step and reads the sampled
rows after it. What a running sequence needs in every step is written once, into its lane.
"""

import time
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.block_table import BlockTable
from engine.lanes import Float32Array, Int32Array, Lanes
from engine.row_params import RowParams
from engine.sequence import Sequence
from engine.step_buffers import allocate_buffers
from engine.types import TokenLogprobs

FEW_TOKENS = 16  # of one sequence, that are laid out one by one


class Core(Protocol):
    """What the engine thread asks of `fulcrum_core.Model`."""

    block_size: int

    def bind(self, **buffers: NDArray[Any]) -> None: ...

    def step(self, num_tokens: int, num_sequences: int, num_rows: int) -> None: ...


@dataclass(slots=True)
class SampledRows:
    """What a step sampled; entry i of its plan owns rows start[i] … start[i + 1] - 1."""

    start: list[int]
    token_ids: list[int]  # a target row's is its target; -1: the row could not be sampled
    logprobs: Float32Array
    top_ids: Int32Array
    top_logprobs: Float32Array

    def logprobs_of(self, row: int, token_id: int, num_alternatives: int) -> TokenLogprobs:
        return TokenLogprobs(
            token_id,
            float(self.logprobs[row]),
            tuple(self.top_ids[row, :num_alternatives].tolist()),
            tuple(self.top_logprobs[row, :num_alternatives].tolist()),
        )


class Batch:
    """The buffers of a step, and the lanes that they are gathered from."""

    def __init__(
        self,
        core: Core,
        *,
        max_sequences: int,
        max_step_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        hidden: Float32Array | None = None,
    ) -> None:
        """`hidden` (max_sequences * W, D) is given the last W hidden states of every lane: that of
        position p in row p % W of the lane's."""
        self._core = core
        self._block_size = core.block_size
        self._lanes = Lanes(max_sequences, max_model_len, core.block_size, eos_token_ids)
        self._max_model_len = max_model_len
        self._max_blocks = self._lanes.blocks.shape[1]
        self._buffers = allocate_buffers(max_sequences, max_step_tokens, self._max_blocks)
        self._buffers["history_ids"] = self._lanes.flat_tokens
        self._hidden_window = 0
        self.keep_hidden(hidden)
        # Of the step that is laid out: the lane of each row, whether it is a sample (None: all
        # are), and the first row of each sequence.
        self._row_lanes: NDArray[np.intp] = np.zeros(0, np.intp)
        self._row_samples: NDArray[np.bool_] | None = None
        self._row_start: list[int] = [0]
        self._table = BlockTable(self._lanes)
        self._params = RowParams(self._lanes, max_model_len)
        # Each lane's number, as often as a step of it alone may have rows; and consecutive numbers.
        self._few_lanes: dict[int, NDArray[np.intp]] = {}
        self._num_few = min(FEW_TOKENS, max_step_tokens)
        self._consecutive = np.arange(max_model_len + 2, dtype=np.int32)

    @property
    def lanes(self) -> Lanes:
        """The running sequences' texts, blocks and parameters: what drafters read."""
        return self._lanes

    def keep_hidden(self, hidden: Float32Array | None) -> None:
        """Keep the hidden states of the steps to come in other memory than before; None: nowhere.

        `hidden` is (max_sequences * W, D).
        """
        buffers = {name: array for name, array in self._buffers.items() if "hidden" not in name}
        if hidden is not None:
            buffers["hidden"] = hidden
            buffers["hidden_rows"] = np.zeros(len(buffers["token_ids"]), np.int32)
        self._core.bind(**buffers)
        self._buffers = buffers
        self._hidden_window = 0 if hidden is None else len(hidden) // len(self._lanes.tokens)

    def open_lane(self, seq: Sequence) -> None:
        """Take in a sequence that the coming step is the first to advance."""
        self._params.forget()
        self._table.forget()
        self._lanes.open(seq)

    def fill(self, entries: Row[tuple[Sequence, int]]) -> tuple[int, int, int]:
        """Lay out a step and return its numbers of tokens, sequences and logits rows."""
        if len(entries) == 1 and self._is_few(*entries[0]):
            return self._fill_few(*entries[0])
        buffers = self._buffers
        num_sequences = len(entries)
        self._lanes.write_new_blocks(entries)
        lanes = self._table.fill(buffers["block_table"], entries)
        computed = np.array([seq.num_computed_tokens for seq, _ in entries], np.int32)
        lengths = np.array([len(seq.token_ids) for seq, _ in entries], np.int32)
        num_new = np.array([count for _, count in entries], np.int32)
        for seq, _ in entries:
            if seq.draft_ids:
                self._lanes.write_drafts(seq)
        query_start = buffers["query_start"]
        np.cumsum(num_new, out=query_start[1 : num_sequences + 1])
        num_tokens = int(query_start[num_sequences])
        seq_lens = np.add(computed, num_new, out=buffers["seq_lens"][:num_sequences])
        if num_tokens == num_sequences:
            token_lanes, positions = lanes, computed
        else:
            token_lanes = np.repeat(lanes, num_new)
            positions = np.arange(num_tokens, dtype=np.int32)
            positions += np.repeat(computed - query_start[:num_sequences], num_new)
        buffers["positions"][:num_tokens] = positions
        indices = token_lanes * self._max_model_len + positions
        buffers["token_ids"][:num_tokens] = self._lanes.flat_tokens[indices]
        block_index, offset = np.divmod(positions, self._block_size)
        block_ids = self._lanes.flat_blocks[token_lanes * self._max_blocks + block_index]
        slots = block_ids * self._block_size
        np.add(slots, offset, out=buffers["slot_mapping"][:num_tokens])
        if self._hidden_window:
            self._keep_hidden(token_lanes, positions, np.repeat(seq_lens, num_new))
        if num_tokens == num_sequences and (seq_lens == lengths).all():
            self._select_rows(lanes, lengths)
        else:
            first_samples = np.repeat(lengths, num_new) - 1
            self._select_any_rows(entries, positions >= first_samples, token_lanes, positions)
        if self._params.fill(buffers, self._row_lanes, self._row_samples):
            self._core.bind(**buffers)
        return num_tokens, num_sequences, self._row_start[-1]

    def _is_few(self, seq: Sequence, num_new: int) -> bool:
        """Whether this is one sequence that decodes, its drafts included."""
        is_decoding = seq.num_computed_tokens + num_new >= len(seq.token_ids)
        return is_decoding and num_new <= self._num_few and not seq.needs_prompt_logprobs

    def _fill_few(self, seq: Sequence, num_new: int) -> tuple[int, int, int]:
        """The same for a step of one sequence that decodes: its columns are ranges, and gathering
        them as for many takes several times as long."""
        buffers, lanes, lane = self._buffers, self._lanes, seq.lane
        self._table.forget()
        lanes.write_new_blocks([(seq, num_new)])
        if seq.draft_ids:
            lanes.write_drafts(seq)
        begin, block_size = seq.num_computed_tokens, self._block_size
        end = begin + num_new
        buffers["query_start"][1] = num_new
        buffers["seq_lens"][0] = end
        num_columns = -(-end // block_size)
        buffers["block_table"][0, :num_columns] = lanes.blocks[lane, :num_columns]
        buffers["positions"][:num_new] = self._consecutive[begin:end]
        buffers["token_ids"][:num_new] = lanes.tokens[lane, begin:end]
        block_ids, positions = seq.block_ids, range(begin, end)
        buffers["slot_mapping"][:num_new] = [
            block_ids[p // block_size] * block_size + p % block_size for p in positions
        ]
        window = self._hidden_window
        if window:
            buffers["hidden_rows"][:num_new] = [
                lane * window + p % window if p >= end - window else -1 for p in positions
            ]
        first = len(seq.token_ids) - 1  # whose next token is the first sample
        num_rows = end - first
        self._row_start = [0, num_rows]
        buffers["logits_rows"][:num_rows] = self._consecutive[first - begin : num_new]
        buffers["noise_position"][:num_rows] = self._consecutive[first + 1 : end + 1]
        buffers["target_ids"][:num_rows] = -1
        few = self._few_lanes.get(lane)
        if few is None:
            few = self._few_lanes[lane] = np.full(self._num_few, lane, np.intp)
        self._row_samples = None
        self._row_lanes = few[:num_rows]
        if self._params.fill_few(buffers, few, num_rows):
            self._core.bind(**buffers)
        return num_new, 1, num_rows

    def sampled(self) -> SampledRows:
        """Read the step's results, and append each sample to the tokens of its lane."""
        buffers = self._buffers
        num_rows = self._row_start[-1]
        token_ids = buffers["sampled_ids"][:num_rows]
        noise_position = buffers["noise_position"][:num_rows]
        indices = self._row_lanes * self._max_model_len + noise_position
        samples = self._row_samples
        if samples is None:
            self._lanes.flat_tokens[indices] = token_ids
        else:
            self._lanes.flat_tokens[indices[samples]] = token_ids[samples]
        return SampledRows(
            self._row_start,
            token_ids.tolist(),
            buffers["sampled_logprobs"],
            buffers["top_ids"],
            buffers["top_logprobs"],
        )

    def time_probe(
        self, num_tokens: int, block_ids: Row[int], *, num_rows: int | None = None
    ) -> float:
        """Compute a made-up text of so many tokens; return the seconds.

        The first `num_rows` of them are sampled, by default all. Between two steps: it writes into
        these blocks, which nobody may hold.
        """
        buffers = self._buffers
        positions = np.arange(num_tokens, dtype=np.int32)
        for name in ("positions", "logits_rows"):
            buffers[name][:num_tokens] = positions
        buffers["noise_position"][:num_tokens] = positions + 1  # as of an output's token
        index, offset = np.divmod(positions, self._block_size)
        blocks = np.array(block_ids, np.int32)
        buffers["slot_mapping"][:num_tokens] = blocks[index] * self._block_size + offset
        buffers["token_ids"][:num_tokens] = 0
        buffers["query_start"][:2] = (0, num_tokens)
        buffers["seq_lens"][0] = num_tokens
        num_columns = -(-num_tokens // self._block_size)
        buffers["block_table"][0, :num_columns] = blocks[:num_columns]
        self._table.forget()
        self._params.forget()  # the rows' parameters are the probe's
        for name, value in (("target_ids", -1), ("num_logprobs", -1), ("repetition_penalty", 1)):
            buffers[name][:num_tokens] = value
        buffers["temperature"][:num_tokens] = 0
        if self._hidden_window:
            buffers["hidden_rows"][:num_tokens] = -1
        began_s = time.perf_counter()
        self._core.step(num_tokens, 1, num_tokens if num_rows is None else num_rows)
        return time.perf_counter() - began_s

    def _keep_hidden(
        self, token_lanes: NDArray[np.intp], positions: Int32Array, ends: Int32Array
    ) -> None:
        """Ask for the last hidden states of each sequence, as far as its window holds them."""
        window = self._hidden_window
        rows = token_lanes * window + positions % window
        rows[positions < ends - window] = -1
        self._buffers["hidden_rows"][: len(rows)] = rows

    def _select_rows(self, lanes: NDArray[np.intp], lengths: Int32Array) -> None:
        """One row for each sequence, all of which decode without drafts."""
        buffers = self._buffers
        num_rows = len(lanes)
        self._row_start = list(range(num_rows + 1))
        buffers["logits_rows"][:num_rows] = self._consecutive[:num_rows]
        buffers["noise_position"][:num_rows] = lengths
        buffers["target_ids"][:num_rows] = -1
        self._row_lanes = lanes
        self._row_samples = None

    def _select_any_rows(
        self,
        entries: Row[tuple[Sequence, int]],
        samples: NDArray[np.bool_],
        token_lanes: NDArray[np.intp],
        positions: Int32Array,
    ) -> None:
        """A row for every token whose next one is sampled, which `samples` marks, and for all
        tokens of sequences that ask for the prompt's log probabilities."""
        buffers = self._buffers
        query_start = buffers["query_start"]
        wanted = samples
        wants_prompt = any(seq.needs_prompt_logprobs for seq, _ in entries)
        if wants_prompt:
            wanted = samples.copy()
            for index, (seq, _) in enumerate(entries):
                if seq.needs_prompt_logprobs:
                    wanted[query_start[index] : query_start[index + 1]] = True
        rows = np.flatnonzero(wanted)
        num_rows = len(rows)
        self._row_lanes = token_lanes[rows]
        self._row_samples = samples[rows] if wants_prompt else None
        noise_position = np.add(positions[rows], 1, out=buffers["noise_position"][:num_rows])
        buffers["logits_rows"][:num_rows] = rows
        if self._row_samples is None:
            buffers["target_ids"][:num_rows] = -1
        else:
            # A sample's own position may lie past the end of the lane's tokens: it is not read.
            known = self._lanes.tokens[self._row_lanes, noise_position * ~self._row_samples]
            buffers["target_ids"][:num_rows] = np.where(self._row_samples, -1, known)
        counts = np.concatenate(([0], np.cumsum(wanted)))
        self._row_start = counts[query_start[: len(entries) + 1]].tolist()
