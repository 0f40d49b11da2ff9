"""Chat templates render as transformers does, and user text never becomes a control token."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.tokenizer.chat_template import (
    ChatTemplate,
    chat_template_from_folder,
    chat_template_from_gguf,
)
from engine.tokenizer.errors import ChatTemplateError
from engine.tokenizer.load import tokenizer_from_folder, tokenizer_from_gguf
from tests.engine.tokenizer.trained import SPECIAL_TOKENS, gguf_metadata_of_byte_level

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' "
    "+ message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRIMMING = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception("roles must alternate: user, assistant, …") }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>model\\n' }}
{%- endif %}
"""
FEATURES = """\
{% for message in messages %}
  {% if loop.index > 3 %}{% break %}{% endif %}
  {% if message.role == 'assistant' %}
{% generation %}{{ message.content }}{% endgeneration %}
  {% else %}
{{ message.content | tojson }}
  {% endif %}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{ eos_token }}
"""
MESSAGES = [
    {"role": "user", "content": "  What's <b>1 & 2</b>? \n"},
    {"role": "assistant", "content": "It's 'three'. é 👍"},
    {"role": "user", "content": "\tThanks!"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Sum <of> two"}}]


@pytest.fixture(scope="module")
def tokenizer(digits_reference: tokenizers.Tokenizer) -> Any:
    return tokenizer_from_gguf(gguf_metadata_of_byte_level(digits_reference, "smollm"))


@pytest.mark.parametrize("source", [CHATML, TRIMMING, FEATURES])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_equals_that_of_transformers(source: str, add_generation_prompt: bool) -> None:
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    for tools in (None, TOOLS):
        (expected,), _ = chat_template_utils.render_jinja_template(
            [MESSAGES],
            tools=tools,
            chat_template=source,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
        actual = ChatTemplate(source, special).render(
            MESSAGES, add_generation_prompt=add_generation_prompt, tools=tools
        )
        assert actual == expected


@pytest.mark.parametrize("source", [CHATML, TRIMMING, FEATURES])
def test_ids_are_those_of_the_rendered_text(source: str, tokenizer: Any) -> None:
    template = ChatTemplate(source, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    text = template.render(MESSAGES)
    expected = tokenizer.encode(text, add_bos=False, parse_special=True)
    assert template.encode(MESSAGES, tokenizer) == expected


CONTENT = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|im_", "end|>", "<", "|>", " ", "\n", "hi", "\U000f0000"]),
    max_size=6,
).map("".join)


@settings(max_examples=200, deadline=None)
@given(contents=st.lists(CONTENT, min_size=1, max_size=3))
@pytest.mark.parametrize("source", [CHATML, TRIMMING])
def test_no_content_adds_or_removes_a_control_token(
    source: str, contents: list[str], tokenizer: Any
) -> None:
    template = ChatTemplate(source, {"bos_token": "<|endoftext|>"})
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=False)]
    harmless = [{"role": message["role"], "content": "x"} for message in messages]
    ids = template.encode(messages, tokenizer)
    expected = template.encode(harmless, tokenizer)
    assert [i for i in ids if i in tokenizer.special_ids] == [
        i for i in expected if i in tokenizer.special_ids
    ]
    assert tokenizer.decode(ids, skip_special=False) == template.render(messages)


@pytest.mark.parametrize("between", ["", " ", "\n\t"])
def test_parts_of_a_content_do_not_join_to_a_control_token(between: str, tokenizer: Any) -> None:
    template = ChatTemplate(
        "{% for part in messages[0].content %}{{ part.text | trim }}{% endfor %}<|im_end|>", {}
    )
    parts = [{"type": "text", "text": text} for text in ("a<|im_" + between, "end|>b")]
    ids = template.encode([{"role": "user", "content": parts}], tokenizer)
    assert [i for i in ids if i in tokenizer.special_ids] == ids[-1:]
    assert tokenizer.decode(ids) == "a<|im_end|>b"


def test_overlapping_spellings_in_a_content_are_all_text(
    digits_reference: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    spec = json.loads(digits_reference.to_str())
    spec["added_tokens"].append({"id": 999, "content": "<><", "special": True})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    overlapping = tokenizer_from_folder(tmp_path)
    template = ChatTemplate("{{ messages[0].content }}<><", {})
    ids = template.encode([{"role": "user", "content": "<><><."}], overlapping)
    assert [i for i in ids if i in overlapping.special_ids] == [999]
    assert ids[-1] == 999


def test_tools_cannot_bring_control_tokens_either(tokenizer: Any) -> None:
    template = ChatTemplate("{{ tools | tojson }}{{ messages[0].content }}<|im_end|>", {})
    tools = [{"name": "x", "description": "<|im_end|>", "<|im_start|>": 1}]
    ids = template.encode([{"role": "user", "content": "y"}], tokenizer, tools=tools)
    assert [i for i in ids if i in tokenizer.special_ids] == ids[-1:]


def test_a_template_refusal_carries_the_template_message() -> None:
    template = ChatTemplate(TRIMMING, {"bos_token": ""})
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate: user, assistant, …$"):
        template.render([{"role": "assistant", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].missing.field }}",
        "{{ 1 / 0 }}",
    ],
)
def test_what_a_template_may_not_do_is_a_template_error(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_jinja_is_a_template_error() -> None:
    with pytest.raises(ChatTemplateError, match="compiled"):
        ChatTemplate("{% if %}", {})


def test_a_template_may_ask_for_the_date() -> None:
    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render([])
    assert text.isdigit()
    assert int(text) > 2000


def test_a_gguf_template_knows_the_special_tokens(tokenizer: Any) -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    template = chat_template_from_gguf(metadata, tokenizer)
    assert template is not None
    assert template.render([]) == "<|im_start|>|<|im_end|>|"
    assert chat_template_from_gguf({}, tokenizer) is None


def test_a_folder_template_comes_from_the_file_that_has_one(tmp_path: Path, tokenizer: Any) -> None:
    def configure(**config: Any) -> None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    def rendered() -> str | None:
        template = chat_template_from_folder(tmp_path, tokenizer)
        return None if template is None else template.render([])

    assert rendered() is None
    configure(bos_token={"content": "<s>"}, chat_template="one {{ bos_token }}")
    assert rendered() == "one <s>"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    configure(chat_template=named)
    assert rendered() == "two"
    configure(chat_template=named[:1])
    assert rendered() is None
    (tmp_path / "chat_template.jinja").write_text("three", "utf-8")
    assert rendered() == "three"
