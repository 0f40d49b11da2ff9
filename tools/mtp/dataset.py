"""Answers from their shards as windows of equal length, ready to train on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """One batch. Position p holds the state of token p; padding has weight 0."""

    hidden: Tensor  # (B, L, D)
    token_ids: Tensor  # (B, L + 1): token p + 1 is what position p is given
    is_answer: Tensor  # (B, L): whether token p + 2 is the model's own


class AnswerSet:
    """The answers of some shards, in memory as bf16."""

    def __init__(self, *, max_length: int, num_context_tokens: int) -> None:
        """Windows hold at most `max_length` positions, `num_context_tokens` of them prompt."""
        self._max_length = max_length
        self._num_context = num_context_tokens
        self._hidden: list[Tensor] = []
        self._token_ids: list[Tensor] = []
        self._prompt_lengths: list[int] = []

    def __len__(self) -> int:
        return len(self._hidden)

    def load(self, folder: Path) -> None:
        """Take in all shards of a folder."""
        for path in sorted(folder.glob("answers-?????.npz")):
            self._load_shard(path)

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token stands in the answers; (V,)."""
        counts = torch.zeros(vocab_size, dtype=torch.int64)
        for ids, num_prompt in zip(self._token_ids, self._prompt_lengths, strict=True):
            counts += torch.bincount(ids[num_prompt:], minlength=vocab_size)
        return counts

    def batches(self, rng: np.random.Generator, num_rows: int) -> Iterator[Windows]:
        """One pass over all windows in random order, about `num_rows` positions at a time.

        Windows of similar length go together, so that little of a batch is padding.
        """
        order = rng.permutation(len(self))
        chunk = 64 * max(1, num_rows // self._max_length)
        for begin in range(0, len(order), chunk):
            part = sorted(order[begin : begin + chunk], key=lambda i: self._length(int(i)))
            groups: list[list[int]] = [[]]
            for index in part:
                length = self._length(int(index))
                if groups[-1] and length * (len(groups[-1]) + 1) > num_rows:
                    groups.append([])
                groups[-1].append(int(index))
            for group in rng.permutation(len(groups)):
                yield self._collate(groups[int(group)])

    def _span(self, index: int) -> tuple[int, int]:
        """Positions [begin, end) of the window, relative to the first hidden state."""
        first = len(self._token_ids[index]) - 1 - len(self._hidden[index])
        begin = max(0, self._prompt_lengths[index] - 1 - first - self._num_context)
        return begin, min(len(self._hidden[index]), begin + self._max_length)

    def _length(self, index: int) -> int:
        begin, end = self._span(index)
        return end - begin

    def _collate(self, indices: list[int]) -> Windows:
        length = max(self._length(index) for index in indices)
        size = self._hidden[indices[0]].shape[1]
        hidden = torch.zeros(len(indices), length, size)
        token_ids = torch.zeros(len(indices), length + 1, dtype=torch.int64)
        is_answer = torch.zeros(len(indices), length, dtype=torch.bool)
        for row, index in enumerate(indices):
            begin, end = self._span(index)
            ids = self._token_ids[index]
            first = len(ids) - 1 - len(self._hidden[index])
            hidden[row, : end - begin] = self._hidden[index][begin:end]
            token_ids[row, : end - begin + 1] = ids[first + begin : first + end + 1]
            # Position p drafts token p + 2, whose distribution is that of state p + 1.
            start = max(0, self._prompt_lengths[index] - 2 - first - begin)
            is_answer[row, start : end - begin - 1] = True
        return Windows(hidden, token_ids, is_answer)

    def _load_shard(self, path: Path) -> None:
        with np.load(path) as arrays:
            hidden = torch.from_numpy(arrays["hidden"].view(np.int16)).view(torch.bfloat16)
            token_ids = torch.from_numpy(arrays["token_ids"].astype(np.int64))
            lengths = arrays["lengths"].tolist()
            hidden_lengths = arrays["hidden_lengths"].tolist()
            prompt_lengths = arrays["prompt_lengths"].tolist()
        ids_begin = hidden_begin = 0
        for length, num_hidden, num_prompt in zip(
            lengths, hidden_lengths, prompt_lengths, strict=True
        ):
            ids = token_ids[ids_begin : ids_begin + length]
            states = hidden[hidden_begin : hidden_begin + num_hidden]
            ids_begin += length
            hidden_begin += num_hidden
            if length - num_prompt >= 4:
                self._token_ids.append(ids)
                self._hidden.append(states)
                self._prompt_lengths.append(num_prompt)
