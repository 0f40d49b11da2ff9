"""The Qwen3 family: Llama's block with a norm over each head of q and k, and no biases."""

from collections.abc import Mapping

from msgspec.structs import replace

from engine.checkpoint.tensor import StoredTensor
from engine.models import gguf_dialect, hf_dialect
from engine.models.settings import Settings
from engine.models.spec import Family, ModelSpec


def _spec_from_config(config: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    names = {**hf_dialect.TENSOR_NAMES, **hf_dialect.HEAD_NORM_NAMES}
    spec = hf_dialect.decoder_spec(config.with_defaults({"head_dim": 128}), FAMILY.name, names)
    return replace(spec, layer_windows=hf_dialect.qwen_windows(config, spec.num_layers))


def _spec_from_gguf(metadata: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    names = {**gguf_dialect.TENSOR_NAMES, **gguf_dialect.HEAD_NORM_NAMES}
    return gguf_dialect.decoder_spec(metadata, tensors, FAMILY.name, names)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    gguf_architectures=("qwen3",),
    spec_from_config=_spec_from_config,
    spec_from_gguf=_spec_from_gguf,
)
