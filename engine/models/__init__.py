"""The registry of model families: which one reads a given config.json or GGUF file.

The loader calls the two functions; a new family is a module with a FAMILY and one line here.
"""

from collections.abc import Mapping
from typing import Any

from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.tensor import CheckpointError, StoredTensor
from engine.models import gemma3, llama, qwen2, qwen3
from engine.models.settings import Settings
from engine.models.spec import ModelSpec

FAMILIES = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY)


def spec_from_config(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor], source: str
) -> ModelSpec:
    """The spec of a config.json beside its tensors. `source` names the file in errors."""
    settings = Settings(config, source)
    architectures = settings.items("architectures") or []
    model_type = settings.text("model_type", "")
    for family in FAMILIES:
        if family.architectures and architectures[:1] and architectures[0] in family.architectures:
            return family.spec_from_config(settings, tensors)
    for family in FAMILIES:
        if not architectures and model_type in family.model_types:
            return family.spec_from_config(settings, tensors)
    known = ", ".join(name for family in FAMILIES for name in family.architectures)
    raise CheckpointError(
        f"{source}: architecture {architectures[0] if architectures else model_type or 'unnamed'} "
        f"is not supported; known are {known}"
    )


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """The spec of a GGUF file."""
    for family in FAMILIES:
        if file.architecture in family.gguf_architectures:
            settings = Settings(file.metadata, str(file.path))
            return family.spec_from_gguf(settings, file.tensors)
    known = ", ".join(name for family in FAMILIES for name in family.gguf_architectures)
    raise CheckpointError(
        f"{file.path}: architecture {file.architecture} is not supported; known are {known}"
    )
