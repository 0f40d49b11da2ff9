"""Which values of the fields that this server does not implement mean "nothing special".

Clients send many of OpenAI's fields at their defaults; those are accepted. Any other value would
change the answer, so `chat.py` and `completions.py` refuse it by name through `refuse`.
"""

from typing import Any

from server.errors import invalid

_GENERATION: dict[str, tuple[Any, ...]] = {
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}

CHAT: dict[str, tuple[Any, ...]] = _GENERATION | {
    "audio": (None,),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),  # there are no calls that could be parallel
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}

COMPLETION: dict[str, tuple[Any, ...]] = _GENERATION | {
    "best_of": (None, 1),
    "suffix": (None, ""),
}

MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": (None,),
    "annotations": (None, []),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
}

STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (None, False)}


def refuse(values: object, without_effect: dict[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Raise a 400 naming the first field whose value this server cannot honour."""
    for name, accepted in without_effect.items():
        value = getattr(values, name)
        # `is` for booleans and None: 0 == False and 1 == True in Python, not in JSON.
        if not any(
            value is item or (type(value) is type(item) and value == item) for item in accepted
        ):
            raise invalid(
                prefix + name,
                f"'{prefix}{name}' is not supported by this server with this value.",
                code="unsupported_parameter",
            )
