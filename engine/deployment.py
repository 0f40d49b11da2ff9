"""What serves at the moment: the settings as decided, the loaded model, and the engine's settings.

The server makes the first one at its start, the applier the next ones.
"""

import msgspec
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.contents import TextSide
from engine.ledger import Ledger, anonymous_memory_bytes, measured_ledger
from engine.loader import LoadedModel, ModelHeaders, load_model
from engine.runner import EngineSettings
from engine.speculation.draft_model import load_draft_model
from engine.speculation.load import load_speculation


class Deployment(msgspec.Struct, frozen=True):
    """A loaded model, and the config that makes it again."""

    config: EngineConfig  # with what was decided at load written out
    loaded: LoadedModel

    @property
    def engine_settings(self) -> EngineSettings:
        return EngineSettings(
            max_model_len=self.loaded.max_model_len,
            num_kv_blocks=self.loaded.num_kv_blocks,
            num_kept_blocks=self.loaded.num_kept_blocks,
            eos_token_ids=self.loaded.eos_token_ids,
            max_sequences=self.config.max_sequences,
            max_step_tokens=self.config.max_step_tokens,
        )

    def measured(self) -> Ledger:
        """What the core has allocated, and the runtime as the rest of the process's memory.

        Pages of the KV cache that no sequence has reached yet are allocated but not touched, so
        the rest is known only roughly and taken as planned where it cannot be. So is everything
        between two cores that memory did not hold at once.
        """
        if self.loaded.core is None:
            return self.loaded.ledger
        ledger = measured_ledger(self.loaded.core, self.loaded.num_kv_blocks)
        return replace(
            ledger,
            draft_bytes=self.loaded.speculation.memory_bytes(self.config.max_sequences),
            runtime_bytes=self.loaded.ledger.runtime_bytes,
        )


def deploy(
    config: EngineConfig,
    *,
    niceness: int = 0,
    available_bytes: int | None = None,
    text: TextSide | None = None,
) -> Deployment:
    """Load the model; raises ConfigError of one line. For the options see `load_model`."""
    loaded = load_model(config, niceness=niceness, available_bytes=available_bytes, text=text)
    decided = replace(
        config,
        kv_dtype=loaded.kv_dtype,
        kv_memory_bytes=loaded.ledger.kv_bytes,
        prefix_cache_bytes=_prefix_cache_bytes(config, loaded),
        max_model_len=loaded.max_model_len,
    )
    return Deployment(decided, loaded)


def _prefix_cache_bytes(config: EngineConfig, loaded: LoadedModel) -> int | None:
    """What holds for the next state too, whose KV memory is then a given one; None: all of it."""
    if config.kv_memory_bytes is not None:
        return config.prefix_cache_bytes
    return loaded.num_kept_blocks * loaded.core.kv_bytes_per_block


def redeploy(
    deployment: Deployment, config: EngineConfig, headers: ModelHeaders, draft_bytes: int
) -> Deployment:
    """The same core with the drafters that `config` asks for, loaded beside those it has.

    `config` differs in nothing else, and `draft_bytes` is what its ledger says. Raises ConfigError.
    """
    loaded = deployment.loaded
    draft = loaded.speculation.draft if config.drafts_with_model else None
    if draft is None and headers.draft is not None and config.drafts_with_model:
        draft = load_draft_model(
            headers.draft,
            loaded.core,
            loaded.spec.vocab_size,
            loaded.tokenizer,
            loaded.num_kv_blocks,
            niceness=1,
        )
    speculation = load_speculation(
        config,
        loaded.core,
        loaded.spec,
        headers.checkpoint.tensors,
        loaded.num_kv_blocks,
        draft,
    )
    ledger = replace(loaded.ledger, draft_bytes=draft_bytes)
    return Deployment(config, replace(loaded, speculation=speculation, ledger=ledger))


def reclaimable_bytes(ledger: Ledger) -> int:
    """Memory that a deployment would give back: what the process has touched beyond its runtime."""
    touched = anonymous_memory_bytes()
    return 0 if touched is None else max(0, touched - ledger.runtime_bytes)
