"""From an EngineConfig to a model that is ready to run: files, weights, tokenizer, KV cache.

The server and the tools call `load_model` once, before the engine starts.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fulcrum_core
import msgspec

from engine.checkpoint import safetensors
from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.progress import Progress
from engine.checkpoint.sources import ResolvedModel, resolve
from engine.checkpoint.tensor import CheckpointError, StoredTensor
from engine.config import ConfigError, EngineConfig, KvDtype
from engine.context_plan import plan_context
from engine.machine import physical_cores
from engine.models import spec_from_config, spec_from_gguf
from engine.models.settings import Settings
from engine.models.spec import ModelSpec
from engine.models.weights import WeightPlan, load_vectors, plan_weights, submit_matrices
from engine.tokenizer.chat_template import (
    ChatTemplate,
    chat_template_from_folder,
    chat_template_from_gguf,
)
from engine.tokenizer.errors import ChatTemplateError, TokenizerError
from engine.tokenizer.load import tokenizer_from_folder, tokenizer_from_gguf
from engine.tokenizer.protocol import Tokenizer

_ISAS = ("portable", "avx2", "avx512")  # each includes the ones before it
_SAMPLED_BYTES = 1 << 16  # at either end of a file, for the fingerprint
_SAMPLED_TENSOR_BYTES = 1 << 12  # at the beginning of each tensor, likewise


class GenerationDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """Sampling settings that the model's makers recommend; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in memory with its KV cache allocated, and what the start-up table says of it."""

    name: str
    core: fulcrum_core.Model
    spec: ModelSpec
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    max_model_len: int  # tokens of prompt and output together
    max_model_len_reason: str
    eos_token_ids: tuple[int, ...]
    generation_defaults: GenerationDefaults
    weights_bytes: int
    num_kv_blocks: int
    num_blocks_reason: str
    kv_dtype: KvDtype
    kv_dtype_reason: str
    formats: str
    quantization_reason: str
    fingerprint: str  # of weights and settings
    isa: str
    num_threads: int


class _Checkpoint(msgspec.Struct, frozen=True):
    """What a checkpoint of either kind offers."""

    spec: ModelSpec
    tensors: Mapping[str, StoredTensor]
    read_text: Callable[[], tuple[Tokenizer, ChatTemplate | None]]
    eos_token_ids: tuple[int, ...] = ()  # beyond the spec's
    generation_defaults: GenerationDefaults = GenerationDefaults()


def load_model(config: EngineConfig, *, progress: Progress | None = None) -> LoadedModel:
    """Load the model that `config` names. Raises ConfigError, of one line, for whatever is wrong.

    Progress of a fetch goes to standard error unless given.
    """
    if config.device == "cuda":
        raise ConfigError("--device cuda: this build computes on the CPU; choose auto or cpu")
    isa = _isa(config)
    num_threads = config.num_threads or physical_cores()
    resolved = resolve(config.model, progress)
    checkpoint = _open(resolved)
    spec = checkpoint.spec
    plan = plan_weights(spec, checkpoint.tensors, config.quantization, str(resolved.path))
    try:
        core = fulcrum_core.Model(core_config(spec), num_threads, isa)
        tokenizer, chat_template = _fill(core, checkpoint, plan, num_threads)
        core.finalize()
        context = plan_context(config, spec.max_position, core.block_size, core.kv_block_bytes)
        core.allocate_kv(context.num_kv_blocks, context.kv_dtype)
    except ConfigError:
        raise
    except (TokenizerError, ChatTemplateError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{resolved.path}: {error}") from error
    except MemoryError as error:
        raise ConfigError(
            f"--model {config.model}: too little memory; take a smaller model, --quantization "
            "int4 or a lower --kv-memory"
        ) from error
    eos_token_ids = (*spec.eos_token_ids, *checkpoint.eos_token_ids, *tokenizer.eos_token_ids)
    return LoadedModel(
        name=resolved.name,
        core=core,
        spec=spec,
        tokenizer=tokenizer,
        chat_template=chat_template,
        max_model_len=context.max_model_len,
        max_model_len_reason=context.max_model_len_reason,
        eos_token_ids=tuple(dict.fromkeys(eos_token_ids)),
        generation_defaults=checkpoint.generation_defaults,
        weights_bytes=core.weights_bytes,
        num_kv_blocks=context.num_kv_blocks,
        num_blocks_reason=context.num_blocks_reason,
        kv_dtype=context.kv_dtype,
        kv_dtype_reason=context.kv_dtype_reason,
        formats=plan.formats,
        quantization_reason=plan.reason,
        fingerprint=_fingerprint(spec, plan, core.isa, context.kv_dtype),
        isa=core.isa,
        num_threads=core.num_threads,
    )


def _fill(
    core: fulcrum_core.Model, checkpoint: _Checkpoint, plan: WeightPlan, num_threads: int
) -> tuple[Tokenizer, ChatTemplate | None]:
    """Load the weights; the tokenizer is built while the core packs the matrices."""
    with ThreadPoolExecutor(num_threads) as executor:
        loading = submit_matrices(core, checkpoint.spec, plan, executor)
        try:
            load_vectors(core, checkpoint.spec, plan)
            text = checkpoint.read_text()
            for future in loading:
                future.result()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return text


def core_config(spec: ModelSpec) -> fulcrum_core.Config:
    """The core's form of a spec."""
    config = fulcrum_core.Config()
    config.num_layers = spec.num_layers
    config.hidden_size = spec.hidden_size
    config.intermediate_size = spec.intermediate_size
    config.num_heads = spec.num_heads
    config.num_kv_heads = spec.num_kv_heads
    config.head_dim = spec.head_dim
    config.vocab_size = spec.vocab_size
    config.norm_eps = spec.norm_eps
    config.activation = spec.activation
    config.attention_scale = spec.attention_scale
    config.embedding_scale = spec.embedding_scale
    config.layer_windows = list(spec.layer_windows)
    config.layer_rope_index = list(spec.layer_rope_index)
    config.rope_inv_freq = [list(table) for table in spec.rope_inv_freq]
    config.rope_attention_factor = spec.rope_attention_factor
    return config


def _isa(config: EngineConfig) -> str:
    best = fulcrum_core.detect_isa()
    if config.isa is None:
        return best
    usable = _ISAS[: _ISAS.index(best) + 1]
    if config.isa not in usable:
        raise ConfigError(f"isa {config.isa}: this machine has {', '.join(usable)}")
    return config.isa


def _open(resolved: ResolvedModel) -> _Checkpoint:
    return _open_gguf(resolved.path) if resolved.kind == "gguf" else _open_folder(resolved.path)


def _open_gguf(path: Path) -> _Checkpoint:
    file = GgufFile(path)

    def read_text() -> tuple[Tokenizer, ChatTemplate | None]:
        tokenizer = tokenizer_from_gguf(file.metadata)
        return tokenizer, chat_template_from_gguf(file.metadata, tokenizer)

    return _Checkpoint(spec_from_gguf(file), file.tensors, read_text)


def _open_folder(folder: Path) -> _Checkpoint:
    def read_text() -> tuple[Tokenizer, ChatTemplate | None]:
        tokenizer = tokenizer_from_folder(folder)
        return tokenizer, chat_template_from_folder(folder, tokenizer)

    config_path, generation_path = folder / "config.json", folder / "generation_config.json"
    tensors = safetensors.read_folder(folder)
    spec = spec_from_config(_read_json(config_path), tensors, str(config_path))
    if not generation_path.exists():
        return _Checkpoint(spec, tensors, read_text)
    generation = Settings(_read_json(generation_path), str(generation_path))
    return _Checkpoint(
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


def _fingerprint(spec: ModelSpec, plan: WeightPlan, isa: str, kv_dtype: KvDtype) -> str:
    """Identify weights and settings: sizes, tensor tables, and parts of each tensor and file."""
    digest = hashlib.sha256(msgspec.json.encode((spec, isa, kv_dtype)))
    for item in plan.tensors:
        tensor = item.tensor
        entry = (tensor.name, tensor.shape, tensor.block_type, item.format)
        digest.update(msgspec.json.encode(entry))
        digest.update(tensor.data[:_SAMPLED_TENSOR_BYTES].tobytes())
    for path in sorted({item.tensor.path for item in plan.tensors}):
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED_BYTES))
            num_bytes = file.seek(0, 2)
            digest.update(num_bytes.to_bytes(8, "little"))
            file.seek(max(0, num_bytes - _SAMPLED_BYTES))
            digest.update(file.read())
    return f"fp_{digest.hexdigest()[:16]}"
