"""The model's own answers, with the hidden states that it had on the way: what a head learns from.

The engine's scheduler and batch compute them as they would when serving, many at a time. Answers
are written in shards; an answer depends on its prompt's index alone, so that a run that was
interrupted goes on with the first shard that is missing and ends with the same files.
"""

import random
from collections.abc import Callable, Generator
from collections.abc import Sequence as Row
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch
from engine.block_manager import BlockManager
from engine.loader import LoadedModel
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import SamplingParams, Submit
from tools.mtp.prompts import PromptSet
from tools.safetensors_writer import to_bf16

NUM_CONTEXT_TOKENS = 64  # of the prompt whose hidden states are kept: what a head sees of it
SHARD_PROMPTS = 256
_SAMPLED_SHARE = 0.4  # of the answers, at _TEMPERATURE; the others are greedy
_TEMPERATURE = 0.8
_TOP_P = 0.95
_STEP_TOKENS = 256


@dataclass(frozen=True)
class Answer:
    """A conversation of two messages. The last of its tokens has no hidden state."""

    token_ids: NDArray[np.int32]
    num_prompt_tokens: int
    hidden: NDArray[np.uint16]  # bf16 after the final norm, of the tokens up to the last but one


@dataclass(slots=True)
class _Running:
    sequence: Sequence
    hidden: list[NDArray[np.uint16]] = field(default_factory=list)  # since its last start


class _UnsharedBlocks(BlockManager):
    """Without the prefix cache: which states are kept must not depend on earlier prompts."""

    def find_prefix(self, digests: Row[bytes], max_blocks: int) -> list[int]:
        return []


class AnswerWriter:
    """Lets the model answer prompts."""

    def __init__(
        self,
        model: LoadedModel,
        *,
        num_sequences: int,
        max_prompt_tokens: int,
        max_answer_tokens: int,
    ) -> None:
        """Bind buffers of its own to the model's core, which serves nothing else."""
        self._model = model
        self._max_prompt_tokens = max_prompt_tokens
        self._max_answer_tokens = max_answer_tokens
        self._num_sequences = num_sequences
        step_tokens = max(_STEP_TOKENS, num_sequences)
        self._scheduler = Scheduler(
            _UnsharedBlocks(model.num_kv_blocks, model.core.block_size),
            max_sequences=num_sequences,
            max_step_tokens=step_tokens,
            max_model_len=model.max_model_len,
        )
        self._eos_token_ids = frozenset(model.eos_token_ids)
        self._hidden = np.zeros((step_tokens, model.spec.hidden_size), np.float32)
        self._batch = Batch(
            model.core,
            max_sequences=num_sequences,
            max_step_tokens=step_tokens,
            max_model_len=model.max_model_len,
            eos_token_ids=self._eos_token_ids,
        )
        model.core.bind(hidden=self._hidden, hidden_rows=np.arange(step_tokens, dtype=np.int32))

    def answers(
        self, prompts: PromptSet, seed: int, begin: int
    ) -> Generator[tuple[int, Answer | None], None, None]:
        """Answers to the prompts from `begin` on, without end, in the order in which they end,
        each with its prompt's index; None where a prompt is too long."""
        running: dict[int, _Running] = {}
        index = begin
        try:
            while True:
                while len(running) < 2 * self._num_sequences:
                    seq = self._submit(index, prompts[index], seed)
                    if seq is None:
                        yield index, None
                    else:
                        running[index] = _Running(seq)
                    index += 1
                for ended in self._step(running):
                    yield ended, self._answer(running.pop(ended))
        finally:
            self._scheduler.end_all("abort")

    def _submit(self, index: int, prompt: str, seed: int) -> Sequence | None:
        model = self._model
        rng = random.Random(f"answer {seed} {index}")
        sampled = rng.random() < _SAMPLED_SHARE
        if model.chat_template is not None:
            messages = [{"role": "user", "content": prompt}]
            ids = model.chat_template.encode(messages, model.tokenizer)
        else:
            ids = model.tokenizer.encode(prompt, add_bos=True, parse_special=False)
        if not 0 < len(ids) <= self._max_prompt_tokens:
            return None
        params = SamplingParams(
            max_tokens=self._max_answer_tokens,
            temperature=_TEMPERATURE if sampled else 0.0,
            top_p=_TOP_P if sampled else 1.0,
            seed=rng.getrandbits(63),
        )
        seq = Sequence(Submit(index, tuple(ids), params, 0.0), self._eos_token_ids, index)
        self._scheduler.add(seq)
        return seq

    def _step(self, running: dict[int, _Running]) -> list[int]:
        """Compute a step, keep its hidden states, and return the indices that it ended."""
        plan = self._scheduler.schedule()
        for seq in plan.admitted:
            self._batch.open_lane(seq)
            # Preemption computes a sequence again from its beginning.
            running[seq.seq_id].hidden.clear()
        self._model.core.step(*self._batch.fill(plan.entries))
        begin = 0
        for seq, num_new_tokens in plan.entries:
            states = self._hidden[begin : begin + num_new_tokens]
            running[seq.seq_id].hidden.append(to_bf16(states))
            begin += num_new_tokens
        events = self._scheduler.commit(plan, self._batch.sampled())
        for event in events:
            if event.error is not None:
                raise ArithmeticError(f"prompt {event.seq_id}: {event.error}")
        return [event.seq_id for event in events if event.finish_reason is not None]

    def _answer(self, ended: _Running) -> Answer:
        seq = ended.sequence
        first = max(0, seq.num_prompt_tokens - 1 - NUM_CONTEXT_TOKENS)
        hidden = np.concatenate(ended.hidden)[first:]
        return Answer(np.array(seq.token_ids, np.int32), seq.num_prompt_tokens, hidden)


def write_shards(
    folder: Path,
    writer: AnswerWriter,
    prompts: PromptSet,
    seed: int,
    num_tokens: int,
    report: Callable[[int], None],
    shard_prompts: int = SHARD_PROMPTS,
) -> None:
    """Write shards until the folder holds `num_tokens` answer tokens; what is there counts.

    `report` is told the number of answer tokens after each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = sorted(folder.glob("answers-?????.npz"))
    done, shard = sum(map(_count_tokens, shards)), len(shards)
    report(done)
    ended: dict[int, dict[int, Answer | None]] = {}
    with closing(writer.answers(prompts, seed, shard * shard_prompts)) as answers:
        while done < num_tokens:
            index, answer = next(answers)
            ended.setdefault(index // shard_prompts, {})[index] = answer
            while len(ended.get(shard, ())) == shard_prompts and done < num_tokens:
                path = folder / f"answers-{shard:05d}.npz"
                _save(path, [a for _, a in sorted(ended.pop(shard).items()) if a is not None])
                done += _count_tokens(path)
                shard += 1
                report(done)


def _save(path: Path, answers: list[Answer]) -> None:
    if not answers:
        raise ValueError("not one of the prompts of a shard is short enough; allow longer ones")
    partial = path.with_suffix(".part.npz")
    np.savez(
        partial,
        token_ids=np.concatenate([a.token_ids for a in answers]),
        lengths=np.array([len(a.token_ids) for a in answers], np.int32),
        prompt_lengths=np.array([a.num_prompt_tokens for a in answers], np.int32),
        hidden_lengths=np.array([len(a.hidden) for a in answers], np.int32),
        hidden=np.concatenate([a.hidden for a in answers]),
    )
    partial.rename(path)


def _count_tokens(path: Path) -> int:
    with np.load(path) as arrays:
        return int(arrays["lengths"].sum() - arrays["prompt_lengths"].sum())
