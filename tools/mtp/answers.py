"""The model's own answers, with the hidden states that it had on the way: what a head learns from.

The engine's scheduler and batch compute them as they would when serving, many at a time. Answers
are written in shards, so that a run that was interrupted goes on where it stopped.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.block_manager import BlockManager
from engine.loader import LoadedModel
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import SamplingParams, Submit

_SHARD_ANSWERS = 256
_SAMPLED_SHARE = 0.4  # of the answers, at _TEMPERATURE; the others are greedy
_TEMPERATURE = 0.8
_TOP_P = 0.95


@dataclass(frozen=True)
class Answer:
    """A conversation of two messages; hidden (n, D) belongs to token_ids[first : first + n]."""

    token_ids: NDArray[np.int32]
    num_prompt_tokens: int
    first: int
    hidden: NDArray[np.uint16]  # bf16 after the final norm


class AnswerWriter:
    """Draws prompts and lets the model answer them."""

    def __init__(self, model: LoadedModel, *, num_sequences: int, max_answer_tokens: int) -> None:
        """Bind buffers of its own to the model's core, which serves nothing else."""
        self._model = model
        self._max_answer_tokens = max_answer_tokens
        self._num_sequences = num_sequences
        self._scheduler = Scheduler(
            BlockManager(model.num_kv_blocks, model.core.block_size),
            max_sequences=num_sequences,
            max_step_tokens=_STEP_TOKENS,
            max_model_len=model.max_model_len,
        )
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._batch = Batch(
            model.core,
            max_sequences=num_sequences,
            max_step_tokens=_STEP_TOKENS,
            max_model_len=model.max_model_len,
            eos_token_ids=self._eos_token_ids,
        )
        self._hidden = np.zeros((_STEP_TOKENS, model.spec.hidden_size), np.float32)
        model.core.bind(hidden=self._hidden)
        self._num_submitted = 0

    def answers(
        self, prompts: Iterator[str], seed: int, max_prompt_tokens: int
    ) -> Iterator[Answer]:
        """Answers in the order in which they end, without end."""
        rng = random.Random(seed)
        parts: dict[int, list[NDArray[np.uint16]]] = {}
        sequences: dict[int, tuple[Sequence, int]] = {}
        while True:
            while len(sequences) < 2 * self._num_sequences:
                seq = self._submit(next(prompts), rng, max_prompt_tokens)
                if seq is not None:
                    sequences[seq.seq_id] = (seq, -1)
                    parts[seq.seq_id] = []
            for seq_id in self._step(sequences, parts):
                seq, first = sequences.pop(seq_id)
                hidden = np.concatenate(parts.pop(seq_id))
                yield Answer(
                    np.array(seq.token_ids, np.int32), seq.num_prompt_tokens, first, hidden
                )

    def _submit(self, prompt: str, rng: random.Random, max_prompt_tokens: int) -> Sequence | None:
        model = self._model
        sampled = rng.random() < _SAMPLED_SHARE
        seed = rng.getrandbits(63)
        if model.chat_template is not None:
            messages = [{"role": "user", "content": prompt}]
            ids = model.chat_template.encode(messages, model.tokenizer)
        else:
            ids = model.tokenizer.encode(prompt, add_bos=True, parse_special=False)
        if not 0 < len(ids) <= max_prompt_tokens:
            return None
        self._num_submitted += 1
        params = SamplingParams(
            max_tokens=self._max_answer_tokens,
            temperature=_TEMPERATURE if sampled else 0.0,
            top_p=_TOP_P if sampled else 1.0,
            seed=seed,
        )
        message = Submit(self._num_submitted, tuple(ids), params, 0.0)
        seq = Sequence(message, self._eos_token_ids, self._num_submitted)
        self._scheduler.add(seq)
        return seq

    def _step(
        self,
        sequences: dict[int, tuple[Sequence, int]],
        parts: dict[int, list[NDArray[np.uint16]]],
    ) -> list[int]:
        """Compute a step, keep its hidden states, and return the sequences that it ended."""
        plan = self._scheduler.schedule()
        for seq in plan.admitted:
            self._batch.open_lane(seq)
            # Preemption computes a sequence again from its beginning.
            sequences[seq.seq_id] = (seq, seq.num_computed_tokens)
            parts[seq.seq_id] = []
        self._model.core.step(*self._batch.fill(plan.entries))
        begin = 0
        for seq, num_new_tokens in plan.entries:
            parts[seq.seq_id].append(to_bf16(self._hidden[begin : begin + num_new_tokens]))
            begin += num_new_tokens
        events = self._scheduler.commit(plan, self._batch.sampled())
        return [event.seq_id for event in events if event.finish_reason is not None]


_STEP_TOKENS = 256


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to the nearest bf16, ties to even, as bits."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_shards(folder: Path, answers: Iterator[Answer], num_tokens: int, report: Any) -> None:
    """Write answers until the folder holds `num_tokens` answer tokens; what is there counts."""
    folder.mkdir(parents=True, exist_ok=True)
    done, shard = count_tokens(folder)
    while done < num_tokens:
        batch = [next(answers) for _ in range(_SHARD_ANSWERS)]
        arrays = {
            "token_ids": np.concatenate([a.token_ids for a in batch]),
            "lengths": np.array([len(a.token_ids) for a in batch], np.int32),
            "prompt_lengths": np.array([a.num_prompt_tokens for a in batch], np.int32),
            "first": np.array([a.first for a in batch], np.int32),
            "hidden_lengths": np.array([len(a.hidden) for a in batch], np.int32),
            "hidden": np.concatenate([a.hidden for a in batch]),
        }
        path = folder / f"answers-{shard:05d}.npz"
        np.savez(path.with_suffix(".part.npz"), **arrays)
        path.with_suffix(".part.npz").rename(path)
        shard += 1
        done += int(arrays["lengths"].sum() - arrays["prompt_lengths"].sum())
        (folder / "count.json").write_text(json.dumps({"answer_tokens": done, "shards": shard}))
        report(done, num_tokens)


def count_tokens(folder: Path) -> tuple[int, int]:
    """Answer tokens and shards that the folder holds."""
    path = folder / "count.json"
    if not path.exists():
        return 0, 0
    count = json.loads(path.read_text())
    return int(count["answer_tokens"]), int(count["shards"])
