"""Settings of the engine: frozen, validated once, where they are made."""

from typing import Literal, get_args

import msgspec

Quantization = Literal[
    "auto",
    "none",
    "fp8",
    "int8",
    "int8-channel",
    "int4",
    "int4-g64",
    "int4-g128",
    "int4-sym",
    "int4-sym-g64",
    "int4-sym-g128",
]
QUANTIZATIONS: tuple[str, ...] = get_args(Quantization)
KvDtype = Literal["bf16", "int8"]
Device = Literal["auto", "cpu", "cuda"]
SpeculationMode = Literal["auto", "off", "ngram", "mtp", "draft"]
SPECULATION_MODES: tuple[str, ...] = get_args(SpeculationMode)


class ConfigError(ValueError):
    """A setting that cannot work. The message is one line and says what would."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the user asked for. None means: decided at load from the model and the machine."""

    model: str = "smollm2-135m"  # short name, folder, .gguf file or hub id
    device: Device = "auto"
    quantization: Quantization = "auto"
    kv_dtype: Literal["auto"] | KvDtype = "auto"
    kv_memory_bytes: int | None = None
    prefix_cache_bytes: int | None = None  # of the KV memory, that text nobody holds may keep
    max_model_len: int | None = None  # tokens of prompt and output together
    max_sequences: int = 64  # B at most
    max_step_tokens: int = 512  # T at most
    num_threads: int | None = None
    speculation: SpeculationMode = "auto"
    # Used where `speculation` is auto or theirs, which an apply may change.
    mtp_head: str | None = None  # folder that a head was trained into
    draft_model: str | None = None  # a smaller model that drafts, named as `model` is
    isa: str | None = None  # force one of fulcrum_core.isas(); for tests

    def __post_init__(self) -> None:
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"--quantization {self.quantization}: choose {', '.join(QUANTIZATIONS)}"
            )
        if self.kv_dtype not in ("auto", "bf16", "int8"):
            raise ConfigError(f"--kv-dtype {self.kv_dtype}: choose auto, bf16 or int8")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device {self.device}: choose auto, cpu or cuda")
        self._check_speculation()
        for name, value in (
            ("--max-sequences", self.max_sequences),
            ("--max-step-tokens", self.max_step_tokens),
            ("--max-model-len", self.max_model_len),
            ("--kv-memory", self.kv_memory_bytes),
            ("--prefix-cache", self.prefix_cache_bytes),
            ("--threads", self.num_threads),
        ):
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: must be at least 1")
        if self.max_step_tokens < self.max_sequences:
            raise ConfigError(
                f"--max-step-tokens {self.max_step_tokens}: must be at least --max-sequences "
                f"({self.max_sequences}), so that every running sequence can advance in a step"
            )

    def _check_speculation(self) -> None:
        mode = self.speculation
        if mode not in SPECULATION_MODES:
            raise ConfigError(f"--speculation {mode}: choose {', '.join(SPECULATION_MODES)}")
        if mode == "draft" and self.draft_model is None:
            raise ConfigError("--speculation draft: needs --draft-model, a smaller model")

    @property
    def drafts_with_model(self) -> bool:
        """Whether the smaller model is to draft, where one is named."""
        return self.speculation in ("auto", "draft")
