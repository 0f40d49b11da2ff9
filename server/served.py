"""What the endpoints know of the loaded model; an apply changes its length and fingerprint."""

from typing import Any, Protocol

import msgspec

from engine.tokenizer.protocol import Tokenizer


class ChatEncoder(Protocol):
    """The part of a chat template that the server uses."""

    def encode(
        self,
        messages: list[dict[str, Any]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]: ...


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Sampling that the model's authors recommend; None where they say nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class ServedModel(msgspec.Struct, kw_only=True):
    """Read and, by `control.py` alone, changed on the event loop."""

    name: str
    created: int  # Unix time
    tokenizer: Tokenizer
    chat_template: ChatEncoder | None
    max_model_len: int
    fingerprint: str  # identifies weights and settings; `system_fingerprint` in answers
    drafters: tuple[str, ...] = ()  # that requests may name
    vocab_size: int  # ids below it can be computed; a tokenizer may know more
    defaults: GenerationDefaults = GenerationDefaults()
    num_kv_blocks: int = 0  # 0: not known
    kv_block_size: int = 16
