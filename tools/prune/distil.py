"""A short distillation: the pruned model learns to give its target's distribution again."""

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from engine.checkpoint.tensor import StoredTensor
from engine.models.spec import ModelSpec
from tools.prune.decoder import Decoder
from tools.safetensors_writer import to_bf16

_BATCH_TOKENS = 1024
_LR = 3e-4
_WARMUP_SHARE = 0.05
_REPORT_S = 60.0


def distil(
    teacher: Decoder,
    student: Decoder,
    windows: NDArray[np.int32],  # (windows, context)
    num_tokens: int,
    seed: int,
    report: Callable[[str], None],
) -> None:
    """Train `student` on the teacher's distribution for `num_tokens` tokens of the windows."""
    texts = torch.from_numpy(windows.astype(np.int64))
    batch_size = max(1, _BATCH_TOKENS // texts.shape[1])
    num_steps = math.ceil(num_tokens / (batch_size * texts.shape[1]))
    optimizer = torch.optim.AdamW(student.parameters(), _LR, betas=(0.9, 0.98), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    began_s = reported_s = time.monotonic()
    losses: list[float] = []
    for step in range(num_steps):
        done = step / num_steps
        rate = min(1.0, (done + 1 / num_steps) / _WARMUP_SHARE, 1.0 - done)
        optimizer.param_groups[0]["lr"] = _LR * rate
        chosen = texts[torch.randint(len(texts), (batch_size,), generator=generator)]
        with torch.no_grad():
            targets = teacher(chosen).log_softmax(-1)
        loss = functional.kl_div(
            student(chosen).log_softmax(-1), targets, reduction="none", log_target=True
        )
        mean = loss.sum(-1).mean()
        optimizer.zero_grad()
        mean.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(mean.detach()))
        now_s = time.monotonic()
        if now_s - reported_s >= _REPORT_S or step + 1 == num_steps:
            reported_s = now_s
            left_s = (now_s - began_s) * (num_steps / (step + 1) - 1)
            report(
                f"distilled {(step + 1) / num_steps:.0%}, {left_s / 60:.0f} min left: "
                f"divergence {np.mean(losses):.3f} nats a token"
            )
            losses.clear()


def distilled_tensors(
    student: Decoder, spec: ModelSpec, tensors: Mapping[str, StoredTensor]
) -> dict[str, StoredTensor]:
    """The student's tensors: bf16 where it learned a matrix, the others as the file had them."""
    written = dict(tensors)
    for layer, weights in enumerate(student.layers):
        assert isinstance(weights, torch.nn.ParameterDict)
        for slot, values in weights.items():
            _put(written, spec.tensor_names[slot].format(layer=layer), values.detach().numpy())
    _put(written, spec.tensor_names["final_norm"], student.final_norm.detach().numpy())
    return written


def _put(tensors: dict[str, StoredTensor], name: str, values: NDArray[np.float32]) -> None:
    # Vectors keep their type: GGUF's are float32.
    keeps_floats = tensors[name].block_type == "F32"
    values = np.ascontiguousarray(values)
    data = values.reshape(-1) if keeps_floats else to_bf16(values).reshape(-1)
    tensors[name] = StoredTensor(
        name, values.shape, "F32" if keeps_floats else "BF16", data.view(np.uint8), Path(name)
    )
