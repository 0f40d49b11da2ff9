"""A model of random weights and ten tokens, with the exact distribution of its answers.

bench.distribution holds what an engine samples against it.
"""

from collections.abc import Sequence as Row
from itertools import product
from typing import Any

import fulcrum_core
import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from engine.batch import Batch
from engine.block_manager import BlockManager
from engine.scheduler import Scheduler
from engine.sequence import Sequence
from engine.types import SamplingParams, Submit

Floats = NDArray[np.float64]

VOCAB_SIZE = 10
NUM_TOKENS = 3  # of an answer; drafts are verified from the second on
PROMPT = (1, 7, 3, 3, 0)
MAX_LEN = 32
NUM_LANES = 64
PLAIN = SamplingParams(max_tokens=NUM_TOKENS, temperature=1.0, ignore_eos=True)


class TinyModel:
    """Random weights, and the logits of every text that an answer may come to."""

    def __init__(self, seed: int = 1) -> None:
        self.core = _make_core(np.random.default_rng(seed))
        self.logits = self._read_logits()

    def _read_logits(self) -> dict[tuple[int, ...], Floats]:
        """Logits by what follows the prompt, up to one token less than an answer."""
        answers = [
            answer
            for length in range(NUM_TOKENS)
            for answer in product(range(VOCAB_SIZE), repeat=length)
        ]
        sizes: dict[str, Any] = {
            "max_sequences": NUM_LANES,
            "max_step_tokens": 512,
            "max_model_len": MAX_LEN,
        }
        blocks = BlockManager(NUM_LANES * MAX_LEN // self.core.block_size, self.core.block_size)
        scheduler = Scheduler(blocks, **sizes)
        batch = Batch(self.core, eos_token_ids=frozenset(), **sizes)
        rows = np.zeros((512, VOCAB_SIZE), np.float32)
        self.core.bind(logits=rows)
        params = replace(PLAIN, max_tokens=1)
        for index, answer in enumerate(answers):
            submit = Submit(index, PROMPT + answer, params, 0.0)
            scheduler.add(Sequence(submit, frozenset(), index))
        logits: dict[tuple[int, ...], Floats] = {}
        while scheduler.has_work:
            plan = scheduler.schedule()
            for seq in plan.admitted:
                batch.open_lane(seq)
            self.core.step(*batch.fill(plan.entries))
            sampled = batch.sampled()
            for (seq, _), row in zip(plan.entries, sampled.start, strict=False):
                if sampled.start[-1] > row:
                    logits[answers[seq.seq_id]] = rows[row].astype(np.float64)
            scheduler.commit(plan, sampled)
        assert len(logits) == len(answers)
        return logits

    def probs(self, params: SamplingParams) -> Floats:
        """Exact probability of every answer, (V,) * NUM_TOKENS."""
        joint = np.ones((VOCAB_SIZE,) * NUM_TOKENS)
        for answer, logits in self.logits.items():
            joint[answer] *= _sampler_probs(logits, answer, params).reshape(
                (-1, *(1,) * (NUM_TOKENS - 1 - len(answer)))
            )
        return joint


def _make_core(rng: np.random.Generator) -> fulcrum_core.Model:
    config = fulcrum_core.Config()
    config.num_layers, config.hidden_size, config.intermediate_size = 1, 32, 32
    config.num_heads, config.num_kv_heads, config.head_dim = 2, 1, 16
    config.vocab_size, config.norm_eps, config.activation = VOCAB_SIZE, 1e-5, "silu"
    config.attention_scale, config.embedding_scale = 0.25, 1.0
    config.layer_windows, config.layer_rope_index = [0], [0]
    config.rope_inv_freq = [[10_000 ** (-i / 8) for i in range(8)]]
    config.rope_attention_factor = 1.0
    core = fulcrum_core.Model(config, 1, fulcrum_core.detect_isa())
    for slot, layer in (("final_norm", -1), ("attention_norm", 0), ("mlp_norm", 0)):
        core.load_vector(slot, layer, np.ones(32, np.float32))
    for slot, layer, rows, scale in (
        ("embedding", -1, VOCAB_SIZE, 1.0),
        ("output", -1, VOCAB_SIZE, 1.3 / 32**0.5),
        *((slot, 0, rows, 1.5 / 32**0.5) for slot, rows in (("q", 32), ("k", 16), ("v", 16))),
        *((slot, 0, 32, 1.5 / 32**0.5) for slot in ("attention_output", "gate", "up", "down")),
    ):
        values = (scale * rng.standard_normal((rows, 32))).astype(np.float32)
        data = values.reshape(-1).view(np.uint8)
        core.load_matrix(slot, layer, "F32", data, rows, 32, "bf16")
    core.finalize()
    core.allocate_kv(NUM_LANES * MAX_LEN // core.block_size, "bf16")
    return core


def _sampler_probs(logits: Floats, answer: Row[int], params: SamplingParams) -> Floats:
    """The distribution that the sampler's definition gives (cpp/sampler.h), written plainly."""
    logits = logits.copy()
    for token in {*PROMPT, *answer}:
        penalty = params.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(answer):
        count = answer.count(token)
        logits[token] -= params.presence_penalty + count * params.frequency_penalty
    for token, bias in params.logit_bias:
        logits[token] += bias
    weights = np.exp((logits - logits.max()) / params.temperature)
    order = np.argsort(-weights, kind="stable")
    kept = order[: params.top_k or None]
    shares = np.cumsum(weights[kept]) / weights[kept].sum()
    kept = kept[: int(np.searchsorted(shares, params.top_p - 1e-12)) + 1]
    kept = kept[weights[kept] >= params.min_p * weights[kept[0]]]
    probs = np.zeros(VOCAB_SIZE)
    probs[kept] = weights[kept] / weights[kept].sum()
    return probs
