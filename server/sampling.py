"""From a request's sampling fields to the engine's `SamplingParams`, with every range checked.

Called by the two generation endpoints. What the request leaves open comes from the model's own
generation config, then from OpenAI's defaults.
"""

import secrets

import msgspec

from engine.types import SamplingParams
from server.errors import ApiError, invalid
from server.protocol import GenerationRequest
from server.served import ServedModel
from server.stop_strings import MAX_STOP_CHARS

MAX_STOPS = 4
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_LISTED_TOKENS = 1024  # in a bias or among stop ids


def sampling_params(
    request: GenerationRequest,
    model: ServedModel,
    *,
    max_tokens: int,
    num_logprobs: int | None = None,
    num_prompt_logprobs: int | None = None,
) -> SamplingParams:
    """Parameters of choice 0; raises a 400 naming a field out of its range."""
    defaults = model.defaults
    top_k = _ranged("top_k", request.top_k, _default(defaults.top_k, 0), -1, 2**31 - 1)
    top_p = _ranged("top_p", request.top_p, _default(defaults.top_p, 1.0), 0.0, 1.0)
    repetition_penalty = _ranged(
        "repetition_penalty",
        request.repetition_penalty,
        _default(defaults.repetition_penalty, 1.0),
        0.01,
        100.0,
    )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=int(_ranged("min_tokens", request.min_tokens, 0, 0, max_tokens)),
        temperature=_ranged(
            "temperature", request.temperature, _default(defaults.temperature, 1.0), 0.0, 2.0
        ),
        top_k=max(0, int(top_k)),  # -1 is vLLM's spelling of "off"
        top_p=max(top_p, 1e-6),  # 0 means the most likely token alone
        min_p=_ranged("min_p", request.min_p, _default(defaults.min_p, 0.0), 0.0, 1.0),
        repetition_penalty=repetition_penalty,
        presence_penalty=_ranged("presence_penalty", request.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_ranged("frequency_penalty", request.frequency_penalty, 0.0, -2.0, 2.0),
        logit_bias=_logit_bias(request.logit_bias, model.vocab_size),
        seed=_seed(request.seed),
        stop_token_ids=_stop_token_ids(request.stop_token_ids, model.vocab_size),
        ignore_eos=bool(request.ignore_eos),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
    )


def for_choice(params: SamplingParams, choice: int, *, seeded: bool) -> SamplingParams:
    """The same parameters with a seed of its own for each choice of one prompt.

    With a seed from the client, choice i of a prompt is the same text whether the prompt came
    alone or in a list.
    """
    if not seeded:
        return msgspec.structs.replace(params, seed=secrets.randbits(64))
    return msgspec.structs.replace(params, seed=(params.seed + choice) % 2**64)


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS:
        raise invalid("stop", f"'stop' takes at most {MAX_STOPS} strings, got {len(stops)}.")
    if "" in stops:
        raise invalid("stop", "'stop' must not hold an empty string.")
    if any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise invalid("stop", f"'stop' takes strings of at most {MAX_STOP_CHARS} characters.")
    return stops


def num_choices(n: int | None) -> int:
    return int(_ranged("n", n, 1, 1, MAX_CHOICES))


def logprobs_count(name: str, value: int | None) -> int | None:
    return None if value is None else int(_ranged(name, value, 0, 0, MAX_TOP_LOGPROBS))


def fit_max_tokens(
    name: str, wanted: int | None, default: int | None, num_prompt_tokens: int, max_model_len: int
) -> int:
    """Tokens that the sequence may generate; raises a 400 where the context is too short.

    `name` is the field that holds `wanted`; a default of None is all that fits.
    """
    room = max_model_len - num_prompt_tokens
    if wanted is not None and wanted < 0:
        raise invalid(name, f"'{name}' must be at least 1, got {wanted}.")
    if room < 1:
        raise _too_long(max_model_len, num_prompt_tokens, None)
    if wanted is not None and wanted > room:
        raise _too_long(max_model_len, num_prompt_tokens, wanted)
    if wanted is not None:
        return wanted
    return room if default is None else min(default, room)


def _too_long(max_model_len: int, num_prompt_tokens: int, wanted: int | None) -> ApiError:
    asked = (
        f"your prompt has {num_prompt_tokens} tokens and leaves no room for an answer"
        if wanted is None
        else f"you requested {num_prompt_tokens + wanted} tokens "
        f"({num_prompt_tokens} in the prompt, {wanted} for the completion)"
    )
    message = f"This model's maximum context length is {max_model_len} tokens. However, {asked}."
    return invalid(None, message, code="context_length_exceeded")


def _default(model_value: float | None, otherwise: float) -> float:
    return otherwise if model_value is None else model_value


def _ranged(name: str, value: float | None, default: float, low: float, high: float) -> float:
    if value is None:
        return min(default, high)
    if not low <= value <= high:
        raise invalid(name, f"'{name}' must be between {low} and {high}, got {value}.")
    return value


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(64)
    if not -(2**63) <= seed < 2**64:
        raise invalid("seed", "'seed' must be a 64-bit integer.")
    return seed % 2**64


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> tuple[tuple[int, float], ...]:
    if not bias:
        return ()
    if len(bias) > MAX_LISTED_TOKENS:
        raise invalid("logit_bias", f"'logit_bias' takes at most {MAX_LISTED_TOKENS} tokens.")
    pairs: list[tuple[int, float]] = []
    for key, value in bias.items():
        token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
        if not 0 <= token_id < vocab_size:
            raise invalid(
                "logit_bias", f"'logit_bias' key '{key[:20]}' is not a token id of this model."
            )
        _ranged("logit_bias", value, 0.0, -100.0, 100.0)
        pairs.append((token_id, value))
    return tuple(pairs)


def _stop_token_ids(ids: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    if ids is not None and len(ids) > MAX_LISTED_TOKENS:
        raise invalid("stop_token_ids", f"'stop_token_ids' takes at most {MAX_LISTED_TOKENS} ids.")
    for token_id in ids or ():
        if not 0 <= token_id < vocab_size:
            raise invalid(
                "stop_token_ids", f"'stop_token_ids' holds {token_id}, no token id of this model."
            )
    return tuple(ids or ())
