"""Chat templates: from a list of messages to the prompt's text or ids, as transformers renders
them. Built when a model is loaded, called by the chat endpoint for each request.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from engine.tokenizer.errors import ChatTemplateError
from engine.tokenizer.load import read_json, spelling_of
from engine.tokenizer.protocol import Tokenizer
from engine.tokenizer.shield import shield

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]

_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """A compiled template with the spellings of its model's special tokens.

    Immutable after construction: any thread may call it.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template cannot be compiled: {error}") from None

    def render(
        self, messages: Messages, *, add_generation_prompt: bool = True, tools: Tools | None = None
    ) -> str:
        """The prompt's text. Raises ChatTemplateError with the template's own message."""
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except ChatTemplateError:
            raise
        except Exception as error:
            # A template is a program: whatever it raises is about these messages.
            raise ChatTemplateError(f"the chat template failed: {error}") from None

    def encode(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = True,
        tools: Tools | None = None,
    ) -> list[int]:
        """The prompt's ids: control tokens where the template wrote them, and only there.

        A control token's spelling inside `messages` or `tools` is encoded as text. Where there is
        none, the ids are those of the rendered text.
        """
        (messages, tools), hidden = shield((messages, tools), tokenizer, template=self._source)
        text = self.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
        return tokenizer.encode(text, add_bos=False, parse_special=True, shields=hidden)


def chat_template_from_gguf(
    metadata: Mapping[str, Any], tokenizer: Tokenizer
) -> ChatTemplate | None:
    """The template that a GGUF file carries; None where it has none."""
    source = metadata.get("tokenizer.chat_template")
    if not source:
        return None
    special = {}
    for name, key in (
        ("bos_token", "bos"),
        ("eos_token", "eos"),
        ("unk_token", "unknown"),
        ("sep_token", "seperator"),  # the format's own spelling
        ("pad_token", "padding"),
        ("mask_token", "mask"),
    ):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            special[name] = tokenizer.token_text(token_id)
    return ChatTemplate(source, special)


def chat_template_from_folder(folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of a Hugging Face folder: chat_template.jinja, else tokenizer_config.json's
    own or its one named "default"; None where there is none."""
    config = read_json(folder / "tokenizer_config.json")
    path = folder / "chat_template.jinja"
    try:
        source = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"{path}: cannot be read: {error}") from None
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if not source:
        return None
    special = {}
    for name in _SPECIAL_NAMES:
        spelling = spelling_of(config.get(name))
        if spelling is not None:
            special[name] = spelling
    if "bos_token" not in special and tokenizer.bos_token_id is not None:
        special["bos_token"] = tokenizer.token_text(tokenizer.bos_token_id)
    return ChatTemplate(source, special)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here its
    body is rendered as if the tags were not there."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
