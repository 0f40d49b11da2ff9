"""Answers from their shards as windows of equal length, ready to train on."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Positions before an answer that its first drafts go on from: one for each step after the first.
_LEAD = 2

_SIMILAR_LENGTHS = 32


@dataclass(frozen=True)
class Windows:
    """One batch. Position p holds the state of token p. Windows begin after padding, so that all
    answers begin at one position, and end before it."""

    hidden: Tensor  # (B, L, D)
    token_ids: Tensor  # (B, L + 1): token p + 1 is what position p is given
    is_answer: Tensor  # (B, L): whether token p + 2 is the model's own
    begins: Tensor  # (B,): the first position that is no padding
    num_context: int  # C: positions that later ones read and nothing else


@dataclass(frozen=True)
class _Window:
    """Positions of one text, relative to the first whose hidden state is kept."""

    begin: int
    answer: int  # the first that drafts a token of the model's own
    end: int
    first: int  # of the text, that `begin` and the others are relative to

    @property
    def num_context(self) -> int:
        return self.answer - self.begin

    @property
    def num_answer(self) -> int:
        return self.end - self.answer

    @property
    def shape(self) -> tuple[int, int]:
        """By which windows are sorted: answers that are about as long, then contexts."""
        return self.num_answer // _SIMILAR_LENGTHS, self.num_context


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
        """One pass over all windows in random order, about `num_rows` positions at a time, those
        of contexts at a quarter: that is what they cost.

        Windows whose contexts and answers are of similar lengths go together, so that little of a
        batch is padding.
        """
        order = rng.permutation(len(self))
        chunk = 64 * max(1, num_rows // self._max_length)
        for begin in range(0, len(order), chunk):
            part = sorted(order[begin : begin + chunk], key=lambda i: self._window(int(i)).shape)
            groups: list[list[int]] = [[]]
            longest = (0, 0)
            for index in part:
                window = self._window(int(index))
                longest = max(longest[0], window.num_context), max(longest[1], window.num_answer)
                cost = longest[1] + longest[0] / 4
                if groups[-1] and cost * (len(groups[-1]) + 1) > num_rows:
                    groups.append([])
                    longest = window.num_context, window.num_answer
                groups[-1].append(int(index))
            for group in rng.permutation(len(groups)):
                yield self._collate(groups[int(group)])

    def _window(self, index: int) -> "_Window":
        first = len(self._token_ids[index]) - 1 - len(self._hidden[index])
        prompt_length = self._prompt_lengths[index] - first
        begin = max(0, prompt_length - 1 - self._num_context)
        end = min(len(self._hidden[index]), begin + self._max_length)
        # Position p drafts token p + 2, whose distribution is that of state p + 1.
        return _Window(begin, max(begin, prompt_length - 2), end, first)

    def _collate(self, indices: list[int]) -> Windows:
        windows = [self._window(index) for index in indices]
        start = max(window.num_context for window in windows)
        length = start + max(window.num_answer for window in windows)
        size = self._hidden[indices[0]].shape[1]
        hidden = torch.zeros(len(indices), length, size)
        token_ids = torch.zeros(len(indices), length + 1, dtype=torch.int64)
        is_answer = torch.zeros(len(indices), length, dtype=torch.bool)
        begins = torch.tensor([start - window.num_context for window in windows])
        for row, (index, window) in enumerate(zip(indices, windows, strict=True)):
            begin, end = start - window.num_context, start + window.num_answer
            hidden[row, begin:end] = self._hidden[index][window.begin : window.end]
            ids = self._token_ids[index][window.first + window.begin :]
            token_ids[row, begin : end + 1] = ids[: end - begin + 1]
            is_answer[row, start : end - 1] = True
        return Windows(hidden, token_ids, is_answer, begins, max(0, start - _LEAD))

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
