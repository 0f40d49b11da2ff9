"""The Llama family: Llama, SmolLM2 and Mistral."""

from collections.abc import Mapping

from msgspec.structs import replace

from engine.checkpoint.tensor import StoredTensor
from engine.models import gguf_dialect, hf_dialect
from engine.models.settings import Settings
from engine.models.spec import Family, ModelSpec


def _spec_from_config(config: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    spec = hf_dialect.decoder_spec(config, FAMILY.name, hf_dialect.TENSOR_NAMES)
    if config.text("model_type", "llama") != "mistral":
        return spec
    # An absent key stands for Mistral 7B's first version; null switches the window off.
    if "sliding_window" in config and not config.has("sliding_window"):
        return spec
    return replace(spec, layer_windows=(config.count("sliding_window", 4096),) * spec.num_layers)


def _spec_from_gguf(metadata: Settings, tensors: Mapping[str, StoredTensor]) -> ModelSpec:
    spec = gguf_dialect.decoder_spec(metadata, tensors, FAMILY.name, gguf_dialect.TENSOR_NAMES)
    window = metadata.integer("llama.attention.sliding_window", 0)
    return replace(spec, layer_windows=(window,) * spec.num_layers, has_interleaved_rope=True)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    model_types=("llama", "mistral"),
    gguf_architectures=("llama",),
    spec_from_config=_spec_from_config,
    spec_from_gguf=_spec_from_gguf,
)
