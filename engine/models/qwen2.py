"""The Qwen2 family (Qwen2, Qwen2.5, MiMo): Llama's block with biases on q, k and v."""

from collections.abc import Mapping

from msgspec.structs import replace

from engine.checkpoint.tensor import StoredTensor
from engine.models import gguf_dialect, hf_dialect
from engine.models.settings import Settings
from engine.models.spec import Family, ModelSpec


def _spec_from_config(config: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    names = {**hf_dialect.TENSOR_NAMES, **hf_dialect.BIAS_NAMES}
    # MiMo's says what is so in the whole family.
    config = config.replaced(attention_bias=None)
    spec = hf_dialect.decoder_spec(config, FAMILY.name, names)
    return replace(spec, layer_windows=hf_dialect.qwen_windows(config, spec.num_layers))


def _spec_from_gguf(metadata: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    names = {**gguf_dialect.TENSOR_NAMES, **gguf_dialect.BIAS_NAMES}
    return gguf_dialect.decoder_spec(metadata, tensors, FAMILY.name, names)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "MiMoForCausalLM"),
    model_types=("qwen2", "mimo"),
    gguf_architectures=("qwen2",),
    spec_from_config=_spec_from_config,
    spec_from_gguf=_spec_from_gguf,
)
