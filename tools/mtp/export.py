"""A trained head in files as the engine reads them: model.safetensors and config.json."""

from pathlib import Path

import msgspec
import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.safetensors import read_file
from engine.models.mtp import DRAFT_IDS_NAME, HeadConfig, read_head
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
        tensors[_file_name(name)] = to_bf16(np.ascontiguousarray(values.numpy()))
    tensors[DRAFT_IDS_NAME] = draft_ids.numpy().astype(np.int32)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", tensors)
    text = msgspec.json.format(msgspec.json.encode(config), indent=1)
    (folder / "config.json").write_bytes(text + b"\n")


def load_weights(folder: Path, module: MtpModule, target_digest: str) -> None:
    """Set the module's weights to those of a head's files.

    Raises CheckpointError where they are no head, ValueError where it is another model's.
    """
    config, _ = read_head(folder)
    if config.target_digest != target_digest:
        raise ValueError(f"{folder}: was trained for another model ({config.target})")
    tensors = read_file(folder / "model.safetensors")
    module.load_state_dict(
        {
            name: torch.from_numpy(tensors[_file_name(name)].floats()).reshape(values.shape)
            for name, values in module.state_dict().items()
        }
    )


def _file_name(name: str) -> str:
    stem, _, kind = name.partition(".")
    return f"{_FILE_NAMES.get(stem, stem)}.{kind}"
