"""What a head needs of the model that it drafts for, as PyTorch has it."""

from collections.abc import Mapping

import fulcrum_core
import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.tensor import StoredTensor
from engine.models.spec import ModelSpec
from tools.mtp.module import LayerShape, MtpModule


def new_module(spec: ModelSpec, seed: int) -> MtpModule:
    """A head at its beginning, in the shape of the target's last layer."""
    torch.manual_seed(seed)
    inv_freq = torch.tensor(spec.rope_inv_freq[spec.layer_rope_index[-1]])
    return MtpModule(LayerShape.of(spec), inv_freq)


def read_embedding(spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> Tensor:
    """(V, D), scaled as the target scales it."""
    return _matrix(tensors[spec.tensor_names["embedding"]]) * spec.embedding_scale


def read_head_rows(
    spec: ModelSpec, tensors: Mapping[str, StoredTensor], token_ids: Tensor
) -> Tensor:
    """The rows of the target's head for these tokens; (len(token_ids), D)."""
    slot = "embedding" if spec.tied_embeddings else "output"
    return _matrix(tensors[spec.tensor_names[slot]])[token_ids]


def _matrix(tensor: StoredTensor) -> Tensor:
    values = fulcrum_core.dequantize(tensor.block_type, tensor.data, tensor.num_values)
    return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(tensor.shape)
