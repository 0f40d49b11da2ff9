"""Structs of the wire: requests as clients send them, responses as they read them.

A field that is not listed here is refused by `decode` with a 400 that names it. Fields that are
listed under "without effect" are part of OpenAI's API but not of this server: `unsupported.py`
refuses every value of them that would change the answer.
"""

import re
from typing import Any, TypeVar

import msgspec

from engine.types import DrafterChoice
from server.errors import ApiError, invalid

T = TypeVar("T")


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: str
    text: str | None = None


class Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[TextPart] | None = None
    name: str | None = None
    # Without effect; a client that sends back a former answer includes them.
    refusal: Any = None
    annotations: Any = None
    audio: Any = None
    function_call: Any = None
    tool_calls: Any = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # without effect


class FulcrumOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What is asked of this server alone."""

    usage: bool = False  # add `fulcrum` to the answer's usage
    speculation: DrafterChoice = "auto"  # who may draft; the text is the same


class GenerationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What both endpoints share: sampling, length, streaming."""

    model: str
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    # Beyond OpenAI's, with the names and meanings that vLLM gave them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    priority: int | None = None  # lower goes first
    timeout: float | None = None  # seconds for the whole answer, from the request's arrival
    fulcrum: FulcrumOptions | None = None
    # Labels of the client's own; nothing in an answer depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Without effect.
    store: Any = None
    service_tier: Any = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    # Without effect.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    tool_choice: Any = None
    tools: Any = None
    verbosity: Any = None
    web_search_options: Any = None


class CompletionRequest(GenerationRequest, kw_only=True):
    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    # Without effect.
    best_of: Any = None
    suffix: Any = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class FulcrumUsage(msgspec.Struct):
    """What a request cost. Of several choices, which run together, the longest time counts."""

    queue_ms: float  # until its first step
    prefill_ms: float  # from there to the first token
    decode_ms: float  # from the first token to the last
    cached_tokens: int
    num_steps: int  # that sampled tokens, of all choices together, as the rest
    drafted_tokens: int
    accepted_tokens: int
    accepted_by_position: list[int]
    drafters: dict[str, int]  # accepted tokens by drafter


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    fulcrum: FulcrumUsage | msgspec.UnsetType = msgspec.UNSET  # where it was asked for


class TopLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class AssistantMessage(msgspec.Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "chat.completion"


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class Completion(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str
    object: str = "text_completion"


class ModelCard(msgspec.Struct):
    id: str
    created: int
    max_model_len: int
    owned_by: str = "fulcrum"
    object: str = "model"


_MAX_SHOWN_CHARS = 100  # of a name that a client made up
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<at>[^`]*)`)?")
_MISSING_FIELD = re.compile(r"missing required field `(?P<name>[^`]*)`(?: - at `\$\.?(?P<at>.*)`)?")
_AT = re.compile(r" - at `\$\.?(?P<at>[^`]*)`")


def decode(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Parse a request; raises a 400 that names the field where one is at fault."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _validation_error(str(error)) from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except UnicodeDecodeError as error:
        raise ApiError(
            400, f"The body is not valid UTF-8 (byte {error.start}).", code="invalid_json"
        ) from None
    except msgspec.DecodeError as error:
        raise ApiError(
            400, f"The body could not be read as JSON: {error}", code="invalid_json"
        ) from None


def _validation_error(text: str) -> ApiError:
    if match := _UNKNOWN_FIELD.search(text):
        param = ".".join(filter(None, (match["at"], match["name"])))[:_MAX_SHOWN_CHARS]
        return invalid(param, f"Unknown field: '{param}'.", code="unknown_field")
    if match := _MISSING_FIELD.search(text):
        param = ".".join(filter(None, (match["at"], match["name"])))
        return invalid(param, f"Missing required field: '{param}'.", code="missing_field")
    match = _AT.search(text)
    param = match["at"] if match else ""
    reason = _AT.sub("", text)
    message = f"Invalid value for '{param}': {reason}." if param else f"Invalid body: {reason}."
    return invalid(param or None, message, code="invalid_type")
