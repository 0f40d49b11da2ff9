"""What a checkpoint offers, be it a GGUF file or a folder: shape, tensors, and its text side.

The loader opens the served model by it, and speculation the model that drafts.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from engine.checkpoint import safetensors
from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.sources import ResolvedModel
from engine.checkpoint.tensor import CheckpointError, StoredTensor
from engine.models import spec_from_config, spec_from_gguf
from engine.models.settings import Settings
from engine.models.spec import ModelSpec
from engine.tokenizer.chat_template import (
    ChatTemplate,
    chat_template_from_folder,
    chat_template_from_gguf,
)
from engine.tokenizer.load import tokenizer_from_folder, tokenizer_from_gguf
from engine.tokenizer.protocol import Tokenizer

TextSide = tuple[Tokenizer, ChatTemplate | None]


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings that the model's makers recommend; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class Checkpoint(msgspec.Struct, frozen=True):
    """What a checkpoint of either kind offers."""

    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]
    read_text: Callable[[], TextSide]
    eos_token_ids: tuple[int, ...] = ()  # beyond the spec's
    generation_defaults: GenerationDefaults = GenerationDefaults()


def open_checkpoint(resolved: ResolvedModel) -> Checkpoint:
    """Read the headers of a model's files. Raises CheckpointError."""
    return _open_gguf(resolved.path) if resolved.kind == "gguf" else _open_folder(resolved.path)


def _open_gguf(path: Path) -> Checkpoint:
    file = GgufFile(path)

    def read_text() -> TextSide:
        tokenizer = tokenizer_from_gguf(file.metadata)
        return tokenizer, chat_template_from_gguf(file.metadata, tokenizer)

    return Checkpoint(spec_from_gguf(file), file.tensors, read_text)


def _open_folder(folder: Path) -> Checkpoint:
    def read_text() -> TextSide:
        tokenizer = tokenizer_from_folder(folder)
        return tokenizer, chat_template_from_folder(folder, tokenizer)

    config_path, generation_path = folder / "config.json", folder / "generation_config.json"
    tensors = safetensors.read_folder(folder)
    spec = spec_from_config(_read_json(config_path), tensors, str(config_path))
    if not generation_path.exists():
        return Checkpoint(spec, tensors, read_text)
    generation = Settings(_read_json(generation_path), str(generation_path))
    return Checkpoint(
        spec, tensors, read_text, generation.ids("eos_token_id"), _defaults(generation)
    )


def _defaults(generation: Settings) -> GenerationDefaults:
    def number(key: str) -> float | None:
        return generation.number(key) if generation.has(key) else None

    return GenerationDefaults(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=generation.integer("top_k") if generation.has("top_k") else None,
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return value
