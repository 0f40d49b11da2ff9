"""Writes a trained head as the engine reads it: model.safetensors and config.json."""

from pathlib import Path

import msgspec
import numpy as np
from torch import Tensor

from engine.models.mtp import DRAFT_IDS_NAME, HeadConfig
from tools.mtp.module import MtpModule
from tools.safetensors_writer import to_bf16, write_safetensors

_FILE_NAMES = {
    "norm": "shared_head.norm",
    **{name: f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{name: f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")},
}


def write_head(folder: Path, module: MtpModule, draft_ids: Tensor, config: HeadConfig) -> None:
    """Write the head in bf16. The config comes last: without it a folder is no head."""
    tensors = {}
    for name, values in module.state_dict().items():
        stem, _, kind = name.partition(".")
        file_name = f"{_FILE_NAMES.get(stem, stem)}.{kind}"
        tensors[file_name] = to_bf16(np.ascontiguousarray(values.numpy()))
    tensors[DRAFT_IDS_NAME] = draft_ids.numpy().astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    text = msgspec.json.format(msgspec.json.encode(config), indent=1)
    (folder / "config.json").write_bytes(text + b"\n")
