"""A plain decoder in PyTorch, of the layers that the core computes: what distillation trains."""

from collections.abc import Mapping

import fulcrum_core
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.checkpoint.tensor import StoredTensor
from engine.models.spec import ModelSpec

# Slots of a layer that are computed here.
_SLOTS = frozenset(
    (
        *("attention_norm", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm"),
        *("attention_output", "mlp_norm", "gate", "up", "down"),
    )
)


class Decoder(nn.Module):
    """Weights by slot and layer. Embedding and head do not learn: the draft model keeps its
    target's."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, StoredTensor]) -> None:
        super().__init__()
        self.spec = spec
        per_layer = {slot for slot, name in spec.tensor_names.items() if "{layer}" in name}
        if per_layer - _SLOTS or spec.activation != "silu":
            raise ValueError(f"a {spec.family} model cannot be distilled; give --distil-tokens 0")
        self.layers = nn.ModuleList()
        for layer in range(spec.num_layers):
            weights = nn.ParameterDict()
            for slot in sorted(per_layer):
                name = spec.tensor_names[slot].format(layer=layer)
                weights[slot] = nn.Parameter(_floats(tensors[name]))
            self.layers.append(weights)
        self.final_norm = nn.Parameter(_floats(tensors[spec.tensor_names["final_norm"]]))
        embedding = _floats(tensors[spec.tensor_names["embedding"]])
        head = tensors.get(spec.tensor_names.get("output", ""))
        self.embedding: Tensor
        self.head: Tensor
        self.inv_freq: Tensor
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer(
            "head",
            embedding if spec.tied_embeddings or head is None else _floats(head),
            persistent=False,
        )
        inv_freq = torch.tensor(spec.rope_inv_freq[spec.layer_rope_index[0]])
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits (B, T, V) of texts (B, T)."""
        x = self.embedding[token_ids] * self.spec.embedding_scale
        angles = torch.arange(token_ids.shape[1])[:, None] * self.inv_freq[None, :]
        rotation = angles.cos(), angles.sin()
        for weights in self.layers:
            assert isinstance(weights, nn.ParameterDict)
            x = x + self._attend(weights, self._norm(x, weights["attention_norm"]), *rotation)
            normed = self._norm(x, weights["mlp_norm"])
            gated = functional.silu(normed @ weights["gate"].T) * (normed @ weights["up"].T)
            x = x + gated @ weights["down"].T
        return self._norm(x, self.final_norm) @ self.head.T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.spec.norm_eps)

    def _attend(self, weights: nn.ParameterDict, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        spec = self.spec
        query = self._heads(weights, "q", x, spec.num_heads, cos, sin)
        key = self._heads(weights, "k", x, spec.num_kv_heads, cos, sin)
        value = self._heads(weights, "v", x, spec.num_kv_heads, None, None)
        group = spec.num_heads // spec.num_kv_heads
        mixed = functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=self._mask(x.shape[1]),
            scale=spec.attention_scale,
        )
        batch, length = x.shape[:2]
        joined = mixed.transpose(1, 2).reshape(batch, length, -1)
        return functional.linear(joined, weights["attention_output"])

    def _mask(self, length: int) -> Tensor:
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        window = self.spec.layer_windows[0]
        return seen.triu(1 - window) if window else seen

    def _heads(
        self,
        weights: nn.ParameterDict,
        slot: str,
        x: Tensor,
        num_heads: int,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor:
        rows = functional.linear(x, weights[slot], weights.get(f"{slot}_bias"))
        heads = rows.view(*x.shape[:2], num_heads, self.spec.head_dim).transpose(1, 2)
        if f"{slot}_norm" in weights:
            heads = self._norm(heads, weights[f"{slot}_norm"])
        return heads if cos is None or sin is None else self._rotate(heads, cos, sin)

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        factor = self.spec.rope_attention_factor
        cos, sin = cos * factor, sin * factor
        if self.spec.has_interleaved_rope:  # what rotates together lies side by side in the file
            first, second = x[..., ::2], x[..., 1::2]
            pairs = first * cos - second * sin, second * cos + first * sin
            return torch.stack(pairs, dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _floats(tensor: StoredTensor) -> Tensor:
    values = fulcrum_core.dequantize(tensor.block_type, tensor.data, tensor.num_values)
    return torch.from_numpy(values.astype(np.float32, copy=False)).reshape(tensor.shape)
