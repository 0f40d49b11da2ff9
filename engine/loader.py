"""From an EngineConfig to a model that is ready to run: files, weights, tokenizer, KV cache.

The server and the tools call `load_model` before the engine starts, and to apply other settings.
"""

import hashlib
from functools import partial

import fulcrum_core
import msgspec

from engine.checkpoint.progress import Progress
from engine.checkpoint.sources import ResolvedModel, resolve
from engine.checkpoint.tensor import CheckpointError
from engine.config import ConfigError, EngineConfig, KvDtype
from engine.contents import Checkpoint, GenerationDefaults, TextSide, open_checkpoint
from engine.ledger import DeploymentPlan, Ledger, plan_deployment
from engine.machine import physical_cores
from engine.models.core_config import core_config
from engine.models.spec import ModelSpec
from engine.models.weights import WeightPlan, load_weights
from engine.speculation.draft_model import (
    DraftHeaders,
    check_length,
    draft_model_memory,
    load_draft_model,
    read_draft_headers,
)
from engine.speculation.load import load_speculation, module_memory
from engine.speculation.setup import Speculation
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.errors import ChatTemplateError, TokenizerError
from engine.tokenizer.protocol import Tokenizer

_SAMPLED_BYTES = 1 << 16  # at either end of a file, for the fingerprint
_SAMPLED_TENSOR_BYTES = 1 << 12  # at the beginning of each tensor, likewise


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
    num_kept_blocks: int
    kv_dtype: KvDtype
    kv_dtype_reason: str
    formats: str
    quantization_reason: str
    fingerprint: str  # of weights and settings
    isa: str
    num_threads: int
    ledger: Ledger  # as planned before loading
    speculation: Speculation


class ModelHeaders(msgspec.Struct, frozen=True):
    """What is known of a model and its device before a weight is read."""

    resolved: ResolvedModel
    checkpoint: Checkpoint
    isa: str
    num_threads: int
    draft: DraftHeaders | None = None


def load_model(
    config: EngineConfig,
    *,
    progress: Progress | None = None,
    niceness: int = 0,
    available_bytes: int | None = None,
    text: TextSide | None = None,
) -> LoadedModel:
    """Load the model that `config` names. Raises ConfigError, of one line, for whatever is wrong.

    Progress of a fetch goes to standard error unless given. With a `niceness` one thread of that
    priority loads, beside a model that serves; `text` is that model's tokenizer and template.
    """
    headers = read_headers(config, progress)
    plan = plan_headers(config, headers, available_bytes)
    resolved, checkpoint, context = headers.resolved, headers.checkpoint, plan.context
    spec = checkpoint.spec
    try:
        core = fulcrum_core.Model(core_config(spec), headers.num_threads, headers.isa)
        num_loaders = 1 if niceness else headers.num_threads
        read_text = checkpoint.read_text if text is None else partial(_same, text)
        tokenizer, chat_template = load_weights(
            core, spec, plan.weights, read_text, num_threads=num_loaders, niceness=niceness
        )
        core.finalize()
        core.allocate_kv(context.num_kv_blocks, context.kv_dtype)
        num_blocks = context.num_kv_blocks
        draft = None
        if headers.draft is not None and config.drafts_with_model:
            draft = load_draft_model(
                headers.draft, core, spec.vocab_size, tokenizer, num_blocks, niceness
            )
        speculation = load_speculation(config, core, spec, checkpoint.tensors, num_blocks, draft)
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
        num_kept_blocks=context.num_kept_blocks,
        kv_dtype=context.kv_dtype,
        kv_dtype_reason=context.kv_dtype_reason,
        formats=plan.weights.formats,
        quantization_reason=plan.weights.reason,
        fingerprint=_fingerprint(spec, plan.weights, core.isa, context.kv_dtype),
        isa=core.isa,
        num_threads=core.num_threads,
        ledger=plan.ledger,
        speculation=speculation,
    )


def read_headers(config: EngineConfig, progress: Progress | None = None) -> ModelHeaders:
    """Find the model and read its headers; no weight is read. Raises ConfigError."""
    if config.device == "cuda":
        raise ConfigError("--device cuda: this build computes on the CPU; choose auto or cpu")
    isa = _isa(config)
    resolved = resolve(config.model, progress)
    return ModelHeaders(
        resolved=resolved,
        checkpoint=open_checkpoint(resolved),
        isa=isa,
        num_threads=config.num_threads or physical_cores(),
        draft=read_draft_headers(config, progress),
    )


def plan_headers(
    config: EngineConfig, headers: ModelHeaders, available_bytes: int | None = None
) -> DeploymentPlan:
    """What `config` would make of these headers; see `plan_deployment`."""
    spec, tensors = headers.checkpoint.spec, headers.checkpoint.tensors
    machine = (headers.isa, headers.num_threads)
    draft = headers.draft if config.drafts_with_model else None
    drafters = [module_memory(config, spec, tensors, *machine)]
    if draft is not None:
        drafters.append(draft_model_memory(config, draft, *machine))
    plan = plan_deployment(
        config,
        spec,
        tensors,
        source=str(headers.resolved.path),
        isa=headers.isa,
        num_threads=headers.num_threads,
        available_bytes=available_bytes,
        drafters=[drafter for drafter in drafters if drafter is not None],
    )
    if draft is not None:
        check_length(config, draft, plan.context.max_model_len)
    return plan


def _same(text: TextSide) -> TextSide:
    return text


def _isa(config: EngineConfig) -> str:
    best = fulcrum_core.detect_isa()
    if config.isa is None:
        return best
    isas = fulcrum_core.isas()
    usable = isas[: isas.index(best) + 1]
    if config.isa not in usable:
        raise ConfigError(f"isa {config.isa}: this machine has {', '.join(usable)}")
    return config.isa


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
