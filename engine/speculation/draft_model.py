"""A smaller model that drafts for the served one: found, checked against it, planned and loaded.

The core runs it in turns with its target (cpp/draft.h), on the same threads and over the same
block tables, with keys and values of its own: whatever text a block of the target holds, the
drafter's block of that number holds the same text or is written again before it is read. So prefix
sharing, preemption and rejected drafts need nothing of it. The loader calls it.
"""

from collections.abc import Callable
from typing import TypeVar

import fulcrum_core
import msgspec

from engine.checkpoint.progress import Progress
from engine.checkpoint.sources import resolve
from engine.config import ConfigError, EngineConfig
from engine.contents import Checkpoint, open_checkpoint
from engine.ledger import DrafterMemory, planned_weights_bytes, step_bytes
from engine.models.core_config import core_config
from engine.models.weights import WeightPlan, load_weights, plan_weights
from engine.tokenizer.protocol import Tokenizer

_OPTION = "--draft-model"
Result = TypeVar("Result")


class DraftHeaders(msgspec.Struct, frozen=True):
    """A drafting model as its files' headers tell of it."""

    name: str
    checkpoint: Checkpoint
    weights: WeightPlan  # each matrix as the file stores it, whatever the target's are


class DraftModel(msgspec.Struct, frozen=True):
    """A drafting model in memory, with a KV cache of as many blocks as its target."""

    name: str
    core: fulcrum_core.Model
    num_shared_ids: int  # ids below this are rows of both models


def read_draft_headers(config: EngineConfig, progress: Progress | None) -> DraftHeaders | None:
    """Read the headers of the model that `config` names, if it names one; raises ConfigError."""
    if config.draft_model is None:
        return None

    def read() -> DraftHeaders:
        resolved = resolve(str(config.draft_model), progress)
        checkpoint = open_checkpoint(resolved)
        weights = plan_weights(
            checkpoint.spec, checkpoint.tensors, "auto", source=str(resolved.path)
        )
        return DraftHeaders(resolved.name, checkpoint, weights)

    return _as_draft_option(read)


def check_length(config: EngineConfig, headers: DraftHeaders, max_model_len: int) -> None:
    """Raise ConfigError where the model was made for shorter texts than its target's."""
    longest = headers.checkpoint.spec.max_position
    if longest < max_model_len:
        raise ConfigError(
            f"{_OPTION} {config.draft_model}: was made for {longest} tokens; set "
            f"--max-model-len {longest} or lower, or take another one"
        )


def draft_model_memory(
    config: EngineConfig, headers: DraftHeaders, isa: str, num_threads: int
) -> DrafterMemory:
    """What the drafting model will allocate; see `Speculation.memory_bytes`."""
    shape = core_config(headers.checkpoint.spec)
    weights_bytes = planned_weights_bytes(headers.weights, isa)
    max_tokens = config.max_step_tokens
    return DrafterMemory(
        lambda length: (
            weights_bytes + step_bytes(shape, isa, num_threads, max_tokens, max_model_len=length)
        ),
        lambda dtype: fulcrum_core.kv_block_bytes(shape, dtype),
    )


def load_draft_model(
    headers: DraftHeaders,
    target: fulcrum_core.Model,
    target_vocab_size: int,
    target_tokenizer: Tokenizer,
    num_kv_blocks: int,
    niceness: int,
) -> DraftModel:
    """Load the model beside its target; raises ConfigError where their vocabularies differ."""
    spec = headers.checkpoint.spec

    def load() -> DraftModel:
        core = fulcrum_core.Model(core_config(spec), target)
        num_threads = 1 if niceness else target.num_threads
        tokenizer, _ = load_weights(
            core,
            spec,
            headers.weights,
            headers.checkpoint.read_text,
            num_threads=num_threads,
            niceness=niceness,
        )
        _compare_vocabularies(headers.name, tokenizer, target_tokenizer)
        core.finalize()
        core.allocate_kv(num_kv_blocks, target.kv_dtype)
        return DraftModel(headers.name, core, min(spec.vocab_size, target_vocab_size))

    return _as_draft_option(load)


def _compare_vocabularies(name: str, own: Tokenizer, target: Tokenizer) -> None:
    """Raise ConfigError unless every id stands for the same token in both."""
    num_ids = max(own.vocab_size, target.vocab_size)
    num_common = min(own.vocab_size, target.vocab_size)
    different = [i for i in range(num_common) if _meaning(own, i) != _meaning(target, i)]
    if num_common == num_ids and not different:
        return
    first = different[0] if different else num_common
    spellings = [
        repr(side.token_text(first)) if first < side.vocab_size else "nothing"
        for side in (own, target)
    ]
    overlap = num_common - len(different)
    raise ConfigError(
        f"{_OPTION} {name}: its vocabulary is another one: {overlap} of {num_ids} ids "
        f"({overlap / num_ids:.1%}) stand for the same token in both models; id {first} is "
        f"{spellings[0]}, in the served model {spellings[1]}"
    )


def _meaning(tokenizer: Tokenizer, token_id: int) -> tuple[bool, bytes | str]:
    if token_id in tokenizer.special_ids:
        return True, tokenizer.token_text(token_id)
    return False, tokenizer.token_bytes(token_id)


def _as_draft_option(work: Callable[[], Result]) -> Result:
    """Do work of the loader's kind; its errors speak of --model, and it was --draft-model."""
    try:
        return work()
    except ConfigError as error:
        raise ConfigError(str(error).replace("--model ", f"{_OPTION} ", 1)) from error
