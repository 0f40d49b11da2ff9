"""Whether speculation samples from the model's distribution: `python -m bench.distribution`.

A model of random weights and ten tokens answers one prompt a great many times, each time with
another seed and with drafts that are right, wrong, or the same whatever the text; of the three
tokens of an answer the exact probabilities are known. For each option of the sampler a chi-square
test compares counts with them.
"""

import argparse
import math
import sys
import threading
import time
from collections.abc import Sequence as Row
from typing import Any

import msgspec
import numpy as np
from msgspec.structs import replace

from bench.exact_model import (
    MAX_LEN,
    NUM_LANES,
    NUM_TOKENS,
    PLAIN,
    PROMPT,
    VOCAB_SIZE,
    Floats,
    TinyModel,
)
from bench.options import positive
from engine.batch import Batch
from engine.loop import Engine
from engine.runner import EngineSettings
from engine.sequence import Sequence
from engine.speculation.candidates import Candidate
from engine.speculation.costs import Costs
from engine.speculation.drafter import Draft
from engine.speculation.policy import SpeculationPolicy
from engine.speculation.setup import Speculation
from engine.types import SamplingParams, StepReport, Submit

MIN_EXPECTED = 5.0  # counts of a cell; cells below it are taken together
OPTIONS = {
    "temperature": replace(PLAIN, temperature=0.7),
    "top_k": replace(PLAIN, top_k=4),
    "top_p": replace(PLAIN, top_p=0.8),
    "min_p": replace(PLAIN, min_p=0.15),
    "repetition_penalty": replace(PLAIN, repetition_penalty=1.4),
    "presence_penalty": replace(PLAIN, presence_penalty=0.8),
    "frequency_penalty": replace(PLAIN, frequency_penalty=0.8),
    "logit_bias": replace(PLAIN, logit_bias=((2, 1.5), (5, -2.0))),
    "all": replace(
        PLAIN,
        temperature=0.9,
        top_k=8,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.1,
        logit_bias=((4, 0.5),),
    ),
}


class Fit(msgspec.Struct, frozen=True):
    """How well the counts of one option's answers fit."""

    num_samples: int
    num_drafted: int
    num_accepted: int
    chi_square: float
    degrees: int
    p_value: float


class _AllDrafts(SpeculationPolicy):
    """Verifies whatever is drafted: the likeliest tokens, the same ones always, or any."""

    def __init__(self, model: TinyModel, num_step_tokens: int) -> None:
        super().__init__([], Costs(num_step_tokens, NUM_LANES))
        self.drafters: dict[str, Any] = {"planted": _Planted()}
        self.num_drafted = self.num_accepted = 0
        self._best = {answer: int(row.argmax()) for answer, row in model.logits.items()}
        self._rng = np.random.default_rng(2)

    def draft(self, candidates: list[Candidate], num_other_tokens: int = 0) -> list[Draft]:
        return [
            Draft("planted", self._ids(candidate.sequence)[: candidate.max_drafts], [])
            for candidate in candidates
        ]

    def _ids(self, seq: Sequence) -> list[int]:
        kind = seq.seq_id % 3
        if kind == 0:
            return [int(i) for i in self._rng.integers(0, VOCAB_SIZE, NUM_TOKENS - 1)]
        if kind == 1:
            return [3, 5]
        answer = tuple(seq.token_ids[len(PROMPT) :])
        ids: list[int] = []
        while len(answer) < NUM_TOKENS:
            ids.append(self._best[answer])
            answer = (*answer, ids[-1])
        return ids

    def observe(self, seq_id: int, num_verified: int, emitted_ids: Row[int]) -> int:
        self.num_drafted += num_verified
        self.num_accepted += len(emitted_ids) - 1
        return len(emitted_ids) - 1

    def observe_step(self, num_step_tokens: int, step_s: float) -> None:
        """Costs decide nothing here."""


class _Planted:
    max_drafts = NUM_TOKENS - 1


class _Planting(Speculation, frozen=True, kw_only=True):
    made: list[_AllDrafts]
    model: Any

    def policy(self, batch: Batch, hidden: Any, *, max_step_tokens: int) -> SpeculationPolicy:
        self.made.append(_AllDrafts(self.model, max_step_tokens))
        return self.made[0]


def sample(model: TinyModel, params: SamplingParams, num_samples: int) -> tuple[Floats, _AllDrafts]:
    """Counts of the answers, (V,) * NUM_TOKENS, that an engine gives with drafts."""
    planting = _Planting(made=[], model=model)
    counts = np.zeros((VOCAB_SIZE,) * NUM_TOKENS)
    open_answers: dict[int, list[int]] = {}
    room = threading.Semaphore(4 * NUM_LANES)
    ended = threading.Event()
    num_ended = 0

    def take(report: StepReport) -> None:
        nonlocal num_ended
        for event in report.events:
            answer = open_answers.setdefault(event.seq_id, [])
            answer += event.token_ids
            if event.finish_reason is not None:
                counts[tuple(open_answers.pop(event.seq_id))] += 1
                num_ended += 1
                room.release()
        if num_ended == num_samples:
            ended.set()

    settings = EngineSettings(
        max_model_len=MAX_LEN,
        num_kv_blocks=NUM_LANES * MAX_LEN // model.core.block_size,
        eos_token_ids=(),
        max_sequences=NUM_LANES,
        max_step_tokens=512,
    )
    engine = Engine(model.core, settings, take, planting)
    engine.start()
    for index in range(num_samples):
        room.acquire()
        engine.submit(Submit(index, PROMPT, replace(params, seed=index), time.monotonic()))
    ended.wait()
    engine.stop(1.0)
    return counts, planting.made[0]


def fit(counts: Floats, probs: Floats, policy: _AllDrafts) -> Fit:
    """Pearson's chi-square of counts against probabilities, rare answers taken together."""
    num_samples = int(counts.sum())
    expected = probs.ravel() * num_samples
    observed = counts.ravel()
    assert not observed[expected == 0].any(), "an answer that cannot be"
    is_rare = expected < MIN_EXPECTED
    cells = [(observed[~is_rare], expected[~is_rare])]
    if expected[is_rare].sum() >= MIN_EXPECTED:
        cells.append((observed[is_rare].sum(keepdims=True), expected[is_rare].sum(keepdims=True)))
    statistic = float(sum((((o - e) ** 2) / e).sum() for o, e in cells))
    degrees = sum(len(e) for _, e in cells) - 1
    return Fit(
        num_samples,
        policy.num_drafted,
        policy.num_accepted,
        statistic,
        degrees,
        _tail_probability(statistic, degrees),
    )


def _tail_probability(statistic: float, degrees: int) -> float:
    """Of a chi-square this large or larger (Wilson and Hilferty, 1931)."""
    spread = 2.0 / (9.0 * degrees)
    z = ((statistic / degrees) ** (1 / 3) - (1.0 - spread)) / math.sqrt(spread)
    return 0.5 * math.erfc(z / math.sqrt(2.0))


def main(arguments: list[str] | None = None) -> int:
    """Test every option; 1 where one does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench.distribution", description=__doc__)
    parser.add_argument("--samples", type=positive, default=200_000, help="(%(default)s)")
    parser.add_argument("--least-p", type=float, default=1e-4, help="(%(default)s)")
    options = parser.parse_args(arguments)
    model = TinyModel()
    print(f"{'option':>18} {'samples':>8} {'accepted':>9} {'chi²':>8} {'degrees':>8} {'p':>7}")
    is_good = True
    for name, params in OPTIONS.items():
        counts, policy = sample(model, params, options.samples)
        result = fit(counts, model.probs(params), policy)
        accepted = result.num_accepted / result.num_drafted
        print(
            f"{name:>18} {result.num_samples:8} {accepted:9.1%} {result.chi_square:8.1f} "
            f"{result.degrees:8} {result.p_value:7.4f}",
            flush=True,
        )
        is_good = is_good and result.p_value >= options.least_p
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
