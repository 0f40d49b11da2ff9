"""What a model family tells the loader: the model's shape and flags, and which tensor of the file
fills which slot of the core."""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import msgspec

from engine.checkpoint.tensor import CheckpointError, StoredTensor
from engine.models.settings import Settings

# Per-layer slots of the core, and those outside the layers; see cpp/fulcrum_core.pyi.
_GLOBAL_SLOTS = ("embedding", "output", "final_norm")
_MATRIX_SLOTS = frozenset(
    ("embedding", "output", "q", "k", "v", "attention_output", "gate", "up", "down")
)


class TensorSlot(msgspec.Struct, frozen=True):
    """A place in the core and the tensor of the file that belongs there."""

    slot: str
    layer: int  # -1 outside the layers
    tensor_name: str
    shape: tuple[int, ...]
    is_matrix: bool
    is_optional: bool = False


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One model as the core needs it, whatever file it came from."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    activation: Literal["silu", "gelu_tanh"]
    attention_scale: float  # multiplies q·k
    embedding_scale: float = 1.0
    layer_windows: tuple[int, ...]  # per layer, tokens seen, the own one included; 0: all
    layer_rope_index: tuple[int, ...]  # per layer, row of rope_inv_freq
    rope_inv_freq: tuple[tuple[float, ...], ...]
    rope_attention_factor: float = 1.0
    max_position: int  # tokens that the model was made for
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tied_embeddings: bool  # True: the embedding is the head, whatever else the file holds
    tensor_names: Mapping[str, str]  # slot → name, "{layer}" for the layer's number
    ignored_tensors: tuple[str, ...] = ()  # patterns of names that hold nothing of the model
    norm_offset: float = 0.0  # added to every norm weight of the file
    num_announced_modules: int = 0  # for multi-token prediction, as config.json says
    has_interleaved_rope: bool = False  # q and k have the row order of llama.cpp's converter

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head size {self.head_dim} is odd; rotary embeddings need pairs")

    def tensor_slots(self) -> Iterator[TensorSlot]:
        """Every slot that this model has, in the order of the forward pass."""
        shapes = self._slot_shapes()
        for slot, name in self.tensor_names.items():
            if slot == "output" and self.tied_embeddings:
                continue
            is_matrix = slot in _MATRIX_SLOTS
            if slot in _GLOBAL_SLOTS:
                yield TensorSlot(slot, -1, name, shapes[slot], is_matrix, slot == "output")
            else:
                for layer in range(self.num_layers):
                    layer_name = name.format(layer=layer)
                    yield TensorSlot(slot, layer, layer_name, shapes[slot], is_matrix)

    def ignores(self, tensor_name: str) -> bool:
        """Whether a tensor of this name may lie in the file unused."""
        if self.tied_embeddings and tensor_name == self.tensor_names.get("output"):
            return True
        return any(fnmatchcase(tensor_name, pattern) for pattern in self.ignored_tensors)

    def _slot_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, intermediate = self.hidden_size, self.intermediate_size
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "embedding": (self.vocab_size, hidden),
            "output": (self.vocab_size, hidden),
            "final_norm": (hidden,),
            "attention_norm": (hidden,),
            "q": (query, hidden),
            "k": (key_value, hidden),
            "v": (key_value, hidden),
            "q_bias": (query,),
            "k_bias": (key_value,),
            "v_bias": (key_value,),
            "q_norm": (self.head_dim,),
            "k_norm": (self.head_dim,),
            "attention_output": (hidden, query),
            "attention_post_norm": (hidden,),
            "mlp_norm": (hidden,),
            "gate": (intermediate, hidden),
            "up": (intermediate, hidden),
            "down": (hidden, intermediate),
            "mlp_post_norm": (hidden,),
        }


class Family(msgspec.Struct, frozen=True):
    """How the models of one family are recognised and read, in both dialects."""

    name: str
    architectures: tuple[str, ...]  # of config.json
    model_types: tuple[str, ...]  # of config.json
    gguf_architectures: tuple[str, ...]
    spec_from_config: Callable[[Settings, Mapping[str, StoredTensor]], ModelSpec]
    spec_from_gguf: Callable[[Settings, Mapping[str, StoredTensor]], ModelSpec]
