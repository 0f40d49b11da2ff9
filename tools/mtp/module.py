"""The head as PyTorch trains it, operation for operation what the core computes.

Layout of DeepSeek-V3's module (Technical Report, section 2.2): norms of the embedding and of the
hidden state, a projection of both, one decoder layer, a norm, and the target's own head.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.models.spec import ModelSpec


@dataclass(frozen=True)
class LayerShape:
    """Sizes of the decoder layer: the target's own."""

    hidden_size: int  # D
    intermediate_size: int  # I
    num_heads: int  # H
    num_kv_heads: int  # KH
    head_dim: int  # HD
    norm_eps: float
    activation: str  # "silu" or "gelu_tanh"
    attention_scale: float  # multiplies q·k
    rope_attention_factor: float  # multiplies cos and sin

    @classmethod
    def of(cls, spec: ModelSpec) -> "LayerShape":
        return cls(
            spec.hidden_size,
            spec.intermediate_size,
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.norm_eps,
            spec.activation,
            spec.attention_scale,
            spec.rope_attention_factor,
        )


class MtpModule(nn.Module):
    """Maps the hidden state of position p and the embedding of token p + 1 to the hidden state
    that predicts token p + 2."""

    def __init__(self, shape: LayerShape, inv_freq: Tensor) -> None:
        super().__init__()
        self.shape = shape
        size, eps = shape.hidden_size, shape.norm_eps
        attention, key_value = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

        def linear(num_in: int, num_out: int) -> nn.Linear:
            return nn.Linear(num_in, num_out, bias=False)

        self.enorm = nn.RMSNorm(size, eps)
        self.hnorm = nn.RMSNorm(size, eps)
        self.eh_proj = linear(2 * size, size)
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.q_proj = linear(size, attention)
        self.k_proj = linear(size, key_value)
        self.v_proj = linear(size, key_value)
        self.o_proj = linear(attention, size)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.gate_proj = linear(size, shape.intermediate_size)
        self.up_proj = linear(size, shape.intermediate_size)
        self.down_proj = linear(shape.intermediate_size, size)
        self.norm = nn.RMSNorm(size, eps)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        for matrix in (self.o_proj, self.down_proj):
            nn.init.normal_(matrix.weight, std=0.01)

    def unroll(
        self, hidden: Tensor, embedded: Tensor, begins: Tensor, num_context: int, depth: int
    ) -> list[Tensor]:
        """Normed outputs (B, L - C, D) of `depth` steps, each fed by the one before.

        `hidden` and `embedded` (B, L, D) are the target's states and the tokens after them, from
        `begins` (B,) on. Of the first C = `num_context` positions there are keys and values only.
        Step j at position p has read the target's states up to p - j: at the first j positions, of
        a text or after the context, it means nothing.
        """
        outputs: list[Tensor] = []
        keys: list[Tensor] = []
        values: list[Tensor] = []
        length = hidden.shape[1]
        column = torch.arange(length)
        rotation = self._rotation(length)
        for step in range(depth):
            seen = column <= (column[num_context:, None] - step)
            seen = seen & (column >= begins[:, None, None])
            seen[..., 0] |= ~seen.any(-1)  # rows without a meaning still need a key
            hidden = self._step(hidden, embedded, keys, values, seen, rotation)
            outputs.append(self.norm(hidden))
            # What position p hands to p + 1.
            hidden = functional.pad(hidden, (0, 0, 1, 0))[:, :-1]
            if step == 0:
                embedded = embedded[:, num_context:]
        return outputs

    def _step(
        self,
        hidden: Tensor,
        embedded: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        seen: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        both = torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1)
        x = self.eh_proj(both).float()  # sums are of floats where products are of bf16
        mixed = self._attend(self.input_layernorm(x), keys, values, seen, rotation)
        x = x[:, -mixed.shape[1] :] + mixed
        normed = self.post_attention_layernorm(x)
        gate = self.gate_proj(normed)
        if self.shape.activation == "silu":
            gate = functional.silu(gate)
        else:
            gate = functional.gelu(gate, approximate="tanh")
        gated = gate * self.up_proj(normed)
        output: Tensor = x + self.down_proj(gated)
        return output

    def _attend(
        self,
        x: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        seen: Tensor,
        rotation: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention of step j: the first step's keys that are `seen` (B, L - C, L), up to p - j,
        then one key of each later step.

        `keys` and `values` hold those of the steps before and take this one's.
        """
        shape = self.shape
        batch, num_queries, length = seen.shape
        group = shape.num_heads // shape.num_kv_heads
        key = self._heads(self.k_proj(x), shape.num_kv_heads)
        keys.append(_rotate(key, *rotation))
        values.append(self._heads(self.v_proj(x), shape.num_kv_heads))
        query = _rotate(self._heads(self.q_proj(x[:, -num_queries:]), shape.num_heads), *rotation)
        query = query.view(batch, shape.num_kv_heads, group, num_queries, shape.head_dim)
        query = query * shape.attention_scale
        last = len(keys) - 1
        scores = query @ keys[0].unsqueeze(2).transpose(-1, -2)
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        later = []
        for step in range(1, last + 1):
            key = _shift(keys[step], last - step)
            later.append((query * key.unsqueeze(2)).sum(-1, keepdim=True))
        weights = torch.cat((scores, *later), dim=-1).softmax(-1)
        mixed = weights[..., :length] @ values[0].unsqueeze(2)
        for step in range(1, last + 1):
            value = _shift(values[step], last - step)
            mixed = mixed + weights[..., length + step - 1, None] * value.unsqueeze(2)
        mixed = mixed.reshape(batch, shape.num_heads, num_queries, shape.head_dim)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, num_queries, -1))
        return output

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        batch, length, _ = x.shape
        return x.view(batch, length, num_heads, self.shape.head_dim).transpose(1, 2)

    def _rotation(self, length: int) -> tuple[Tensor, Tensor]:
        assert isinstance(self.inv_freq, Tensor)
        angles = torch.arange(length)[:, None] * self.inv_freq[None, :]
        factor = self.shape.rope_attention_factor
        return angles.cos() * factor, angles.sin() * factor


def _shift(x: Tensor, count: int) -> Tensor:
    """x of position p at position p + count; (B, KH, L, HD)."""
    return functional.pad(x, (0, 0, count, 0))[:, :, : x.shape[2]] if count else x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, n, HD) at the last n of the positions that cos and sin (L, HD / 2) are of."""
    cos, sin = cos[-x.shape[2] :], sin[-x.shape[2] :]
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
