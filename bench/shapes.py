"""Shapes of the linear layers of real models, as the core multiplies them: q, k and v at once, and
gate and up. bench.kernels measures them with made-up weights.
"""

import msgspec

_MAX_LOGITS_ROWS = 32  # the core computes no more rows of logits at a time


class Layer(msgspec.Struct, frozen=True):
    """A linear layer (N, K) and how often a model has it."""

    name: str
    num_rows: int
    num_cols: int
    count: int = 1
    max_tokens: int | None = None

    def measures(self, num_tokens: int) -> bool:
        """Whether a step computes that many rows of the layer at once."""
        return self.max_tokens is None or num_tokens <= self.max_tokens


def _layers(
    num_layers: int, hidden: int, intermediate: int, qkv: int, attention: int, vocab: int
) -> tuple[Layer, ...]:
    return (
        Layer("qkv", qkv, hidden, num_layers),
        Layer("attention_output", hidden, attention, num_layers),
        Layer("gate_up", 2 * intermediate, hidden, num_layers),
        Layer("down", hidden, intermediate, num_layers),
        Layer("output", vocab, hidden, 1, _MAX_LOGITS_ROWS),
    )


MODELS = {
    "smollm2-135m": _layers(30, 576, 1536, (9 + 2 * 3) * 64, 9 * 64, 49152),
    "llama-3.2-1b": _layers(16, 2048, 8192, (32 + 2 * 8) * 64, 32 * 64, 128256),
    "llama-2-7b": _layers(32, 4096, 11008, (32 + 2 * 32) * 128, 32 * 128, 32000),
}
