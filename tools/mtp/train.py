"""Trains a head against the target's own distribution, as many tokens ahead as it will draft.

Follows the unrolled training of EAGLE-3 (Li et al., 2025, section 3): each step reads what the
step before put out, so that the head meets its own errors while it learns.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import fulcrum_core
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tools.mtp.dataset import AnswerSet, Windows
from tools.mtp.module import MtpModule
from tools.mtp.muon import Muon

_DEPTH_WEIGHTS = (1.0, 0.8, 0.64)  # of the unrolled steps' losses
_WARMUP_SHARE = 0.02
_DECAY_SHARE = 0.4  # of the run, at its end, over which the step sizes fall to nothing
_CANDIDATES = 4  # most probable tokens of a row that every row's loss is taken over
_SAMPLED_CANDIDATES = 768
_EVALUATED_DRAFTS = 4
# How far a run has come, beside the weights.
_COUNTERS = ("elapsed_s", "num_rows", "_num_steps", "_epoch", "_epoch_steps")


@dataclass(frozen=True)
class TrainSettings:
    """What a run is made of; a checkpoint keeps it."""

    num_rows: int  # answer positions to learn from, the same ones again in every epoch
    batch_rows: int = 2048  # positions of a batch, padding included, contexts at a quarter
    matrix_lr: float = 0.02
    vector_lr: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 1


@dataclass(frozen=True)
class Acceptance:
    """How a head's drafts fare on held-out answers."""

    by_position: tuple[float, ...]  # share of drafts accepted, of those that were reached
    tokens_per_step: float


class Trainer:
    """A head on its way, and what it needs to go on."""

    def __init__(
        self,
        module: MtpModule,
        embedding: Tensor,  # (V, D), scaled as the target scales it
        head: Tensor,  # (V_draft, D), rows of the target's head
        draft_ids: Tensor,  # (V_draft,) the tokens of those rows
        settings: TrainSettings,
    ) -> None:
        self.module = module
        self.settings = settings
        self.elapsed_s = 0.0
        self.num_rows = 0  # that were learned from
        self._num_steps = 0
        self._epoch = 0
        self._epoch_steps = 0  # of the epoch that is under way
        self._embedding = embedding
        self._head = head
        self._draft_index = torch.full((len(embedding),), -1, dtype=torch.int64)
        self._draft_index[draft_ids] = torch.arange(len(draft_ids))
        matrices: list[Tensor] = [p for p in module.parameters() if p.ndim == 2]
        vectors = [p for p in module.parameters() if p.ndim != 2]
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, settings.matrix_lr, 0.95, settings.weight_decay),
            torch.optim.AdamW(vectors, settings.vector_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def run(
        self,
        answers: AnswerSet,
        held_out: AnswerSet,
        report: Callable[[str], None],
        checkpoint: Path,
        interval_s: float = 300.0,
    ) -> None:
        """Train until settings.num_rows rows are learned from; report and save every `interval_s`
        seconds and at the end.

        After `load` it goes on with the batch that would have come next: a run that was
        interrupted ends with the same head.
        """
        settings = self.settings
        next_report_s = self.elapsed_s + interval_s
        losses: list[float] = []
        while self.num_rows < settings.num_rows:
            rng = np.random.default_rng((settings.seed, self._epoch))
            batches = answers.batches(rng, settings.batch_rows)
            for windows in islice(batches, self._epoch_steps, None):
                begun_s = time.monotonic()
                losses.append(self._train_batch(windows))
                self.elapsed_s += time.monotonic() - begun_s
                self._epoch_steps += 1
                is_done = self.num_rows >= settings.num_rows
                if is_done or self.elapsed_s >= next_report_s:
                    next_report_s = self.elapsed_s + interval_s
                    self.save(checkpoint)
                    report(self._describe(losses, held_out))
                    losses.clear()
                if is_done:
                    return
            self._epoch += 1
            self._epoch_steps = 0

    def _train_batch(self, windows: Windows) -> float:
        rate = self._rate()
        for optimizer, lr in zip(
            self._optimizers, (self.settings.matrix_lr, self.settings.vector_lr), strict=True
        ):
            optimizer.param_groups[0]["lr"] = rate * lr
            optimizer.zero_grad()
        loss = self._loss(windows)
        loss.backward()  # type: ignore[no-untyped-call]
        with self._in_bf16():
            for optimizer in self._optimizers:
                optimizer.step()
        self.num_rows += int(windows.is_answer.sum())
        self._num_steps += 1
        return float(loss.detach())

    def _in_bf16(self) -> torch.autocast:
        """Matrix products in bf16 where the processor has them; PyTorch emulates them elsewhere,
        slower than it multiplies floats."""
        enabled = fulcrum_core.detect_isa() in ("avx512-bf16", "amx")
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled)

    def _rate(self) -> float:
        done = self.num_rows / self.settings.num_rows
        return max(0.01, min(1.0, done / _WARMUP_SHARE, (1 - done) / _DECAY_SHARE))

    def _loss(self, windows: Windows) -> Tensor:
        """Cross entropy of the target's distribution over a part of the draft vocabulary.

        The part holds every row's most probable tokens and a random sample of the others, which
        keeps the head's share of the arithmetic small.
        """
        rows = windows.is_answer
        index = rows.nonzero()
        generator = torch.Generator().manual_seed((self.settings.seed << 32) + self._num_steps)
        with torch.no_grad():
            next_states = windows.hidden[index[:, 0], index[:, 1] + 1]
            probs = (next_states @ self._head.T).softmax(-1)
            part = torch.cat(
                (
                    probs.topk(_CANDIDATES, sorted=False).indices.flatten(),
                    torch.randint(len(self._head), (_SAMPLED_CANDIDATES,), generator=generator),
                )
            ).unique()  # type: ignore[no-untyped-call]
            head = self._head[part]
            targets = probs[:, part]
            targets /= targets.sum(-1, keepdim=True)
        embedded = self._embedding[windows.token_ids[:, 1:]]
        with self._in_bf16():
            outputs = self._unroll(windows, embedded, len(_DEPTH_WEIGHTS))
        drafting = rows[:, windows.num_context :]
        lead = index[:, 1] - windows.begins[index[:, 0]]
        loss = torch.zeros(())
        for depth, (weight, output) in enumerate(zip(_DEPTH_WEIGHTS, outputs, strict=True)):
            means_something = lead >= depth
            logits = output[drafting].float() @ head.T
            errors = functional.cross_entropy(logits, targets, reduction="none")
            loss = loss + weight * (errors * means_something).sum() / means_something.sum()
        return loss / sum(_DEPTH_WEIGHTS)

    def _unroll(self, windows: Windows, embedded: Tensor, depth: int) -> list[Tensor]:
        return self.module.unroll(
            windows.hidden, embedded, windows.begins, windows.num_context, depth
        )

    def _describe(self, losses: list[float], held_out: AnswerSet) -> str:
        acceptance = self.evaluate(held_out)
        done = min(1.0, self.num_rows / self.settings.num_rows)
        left_s = self.elapsed_s * (1 - done) / done
        by_position = " ".join(f"{share:.3f}" for share in acceptance.by_position)
        return (
            f"{done:.0%} trained, {left_s / 60:.0f} min left, {self.num_rows} rows "
            f"({self.num_rows / self.elapsed_s:.0f}/s), loss {np.mean(losses):.3f}; held out: "
            f"accepted {by_position}, {acceptance.tokens_per_step:.3f} tokens per step"
        )

    @torch.no_grad()
    def evaluate(self, held_out: AnswerSet) -> Acceptance:
        """Draft along held-out answers as a greedy target would verify."""
        reached = np.zeros(_EVALUATED_DRAFTS)
        accepted = np.zeros(_EVALUATED_DRAFTS)
        num_tokens = num_steps = 0
        for windows in held_out.batches(np.random.default_rng(0), self.settings.batch_rows):
            embedded = self._embedding[windows.token_ids[:, 1:]]
            outputs = self._unroll(windows, embedded, _EVALUATED_DRAFTS)
            begin = windows.num_context
            wanted = self._draft_index[windows.token_ids[:, begin + 2 :]]  # (B, L - C - 1)
            hits = [(output[:, :-1] @ self._head.T).argmax(-1) == wanted for output in outputs]
            for row in range(len(wanted)):
                positions = windows.is_answer[row, begin:].nonzero()[:, 0].tolist()
                p, end = positions[0], positions[-1] + 1
                while p < end:
                    num_steps += 1
                    count = 0
                    while count < min(_EVALUATED_DRAFTS, end - p):
                        reached[count] += 1
                        if not hits[count][row, p + count]:
                            break
                        accepted[count] += 1
                        count += 1
                    num_tokens += count + 1
                    p += count + 1
        by_position = tuple((accepted / np.maximum(reached, 1)).tolist())
        return Acceptance(by_position, num_tokens / max(1, num_steps))

    def save(self, path: Path) -> None:
        """Write all that `load` needs to go on."""
        state: dict[str, Any] = {
            "module": self.module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "settings": asdict(self.settings),
            **{name: getattr(self, name) for name in _COUNTERS},
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ValueError where it is of other settings."""
        state = torch.load(path)
        if state["settings"] != asdict(self.settings):
            raise ValueError(f"{path}: was begun with other settings: {state['settings']}")
        self.module.load_state_dict(state["module"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in _COUNTERS:
            setattr(self, name, state[name])
