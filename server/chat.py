"""`POST /v1/chat/completions`: messages in, an assistant's message out, whole or streamed."""

import time
import uuid
from typing import Any

import msgspec
from aiohttp import web

from engine.tokenizer.errors import ChatTemplateError
from engine.types import SamplingParams, TokenLogprobs
from server import protocol, unsupported
from server.errors import check_ids, invalid
from server.generation import Generation
from server.http import CLIENT, MODEL, USAGE, arrival, check_model, json_response, read_body
from server.protocol import ChatCompletionRequest, Message
from server.sampling import (
    fit_max_tokens,
    for_choice,
    logprobs_count,
    num_choices,
    sampling_params,
    stop_strings,
)
from server.served import ServedModel
from server.speculation import check_drafter
from server.sse import DONE, stream_events
from server.stream import Delta
from server.tokens import CHARS_PER_LOGPROB, run_sized, spelling

_DECODER = msgspec.json.Decoder(ChatCompletionRequest)
_ROLES = ("system", "developer", "user", "assistant")


async def chat_completions(request: web.Request) -> web.StreamResponse:
    raw, model = await read_body(request), request.app[MODEL]
    body, num_sequences = read(raw, model)
    arrived = arrival(request.headers, request.remote, raw, body)
    generation = request.app[CLIENT].open(arrived, num_sequences)
    try:
        prompt = await encode_messages(model, body.messages, len(raw))
        params = _params(body, model, len(prompt))
        seeded = body.seed is not None
        choices = [for_choice(params, i, seeded=seeded) for i in range(num_sequences)]
        generation.submit([prompt], [choices], stops=stop_strings(body.stop), options=body.fulcrum)
        if body.stream:
            framer = ChatFramer(body, model, generation)
            return await stream_events(request, generation, framer)
        deltas = await generation.take_all()
        size = sum(delta.num_logprobs for delta in deltas) * CHARS_PER_LOGPROB
        return await run_sized(size, lambda: json_response(_whole(body, model, generation, deltas)))
    finally:
        generation.close()
        request[USAGE] = generation.usage()


def read(raw: bytes, model: ServedModel) -> tuple[ChatCompletionRequest, int]:
    """The request and how many sequences it asks for; raises a 400 or 404 where that shows
    without its prompt's ids."""
    body = protocol.decode(_DECODER, raw)
    check_model(model, body.model)
    _check_fields(body)
    check_drafter(model, body.fulcrum)
    stop_strings(body.stop)
    return body, num_choices(body.n)


async def encode_messages(
    model: ServedModel, messages: list[Message], size: int, *, add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation by the model's own template; raises a 400 where that refuses.

    `size` is about how many characters the messages have.
    """
    template = model.chat_template
    if template is None:
        raise invalid(
            "messages",
            f"The model '{model.name}' has no chat template; use /v1/completions.",
            code="no_chat_template",
        )
    if not messages:
        raise invalid("messages", "'messages' must hold at least one message.")

    def encode() -> list[int]:
        plain = [_plain_message(message, index) for index, message in enumerate(messages)]
        return template.encode(plain, model.tokenizer, add_generation_prompt=add_generation_prompt)

    try:
        ids = await run_sized(size, encode)
    except ChatTemplateError as error:
        raise invalid("messages", f"The model's chat template refused: {error}") from None
    if not ids:
        raise invalid("messages", "The messages have no tokens.")
    check_ids("messages", ids, model.vocab_size)
    return ids


def _plain_message(message: Message, index: int) -> dict[str, Any]:
    """The message as templates take it, its text parts joined by newlines."""
    at = f"messages[{index}]."
    if message.role not in _ROLES:
        raise invalid(at + "role", f"'{at}role' must be one of {', '.join(_ROLES)}.")
    unsupported.refuse(message, unsupported.MESSAGE, at)
    content = message.content
    if content is None:
        raise invalid(at + "content", f"'{at}content' must be a string or a list of text parts.")
    if isinstance(content, list):
        for part_index, part in enumerate(content):
            if part.type != "text" or part.text is None:
                raise invalid(
                    f"{at}content[{part_index}]",
                    f"'{at}content[{part_index}]' must be a part of type 'text' with its text.",
                )
        content = "\n".join(part.text or "" for part in content)
    # Templates were written before OpenAI renamed the role.
    role = "system" if message.role == "developer" else message.role
    plain: dict[str, Any] = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    return plain


def _check_fields(body: ChatCompletionRequest) -> None:
    unsupported.refuse(body, unsupported.CHAT)
    if body.stream_options is not None:
        if not body.stream:
            raise invalid("stream_options", "'stream_options' needs 'stream': true.")
        unsupported.refuse(body.stream_options, unsupported.STREAM_OPTIONS, "stream_options.")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs': true.")


def _params(
    body: ChatCompletionRequest, model: ServedModel, num_prompt_tokens: int
) -> SamplingParams:
    name, wanted = "max_completion_tokens", body.max_completion_tokens
    if wanted is None:
        name, wanted = "max_tokens", body.max_tokens
    elif body.max_tokens is not None:
        raise invalid("max_tokens", "Send either 'max_tokens' or 'max_completion_tokens'.")
    if wanted == 0:
        raise invalid(name, f"'{name}' must be at least 1, got 0.")
    num_logprobs = logprobs_count("top_logprobs", body.top_logprobs)
    return sampling_params(
        body,
        model,
        max_tokens=fit_max_tokens(name, wanted, None, num_prompt_tokens, model.max_model_len),
        num_logprobs=(num_logprobs or 0) if body.logprobs else None,
    )


def _whole(
    body: ChatCompletionRequest, model: ServedModel, generation: Generation, deltas: list[Delta]
) -> protocol.ChatCompletion:
    choices = [
        protocol.ChatChoice(
            delta.index,
            protocol.AssistantMessage(delta.text),
            chat_logprobs(model, delta.logprobs) if body.logprobs else None,
            delta.finish_reason or "stop",
        )
        for delta in deltas
    ]
    return protocol.ChatCompletion(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model.name,
        choices=choices,
        usage=generation.usage(body.fulcrum),
        system_fingerprint=model.fingerprint,
    )


def chat_logprobs(
    model: ServedModel, entries: list[tuple[int, TokenLogprobs]]
) -> protocol.ChatLogprobs:
    content = []
    for _, entry in entries:
        alternatives = []
        for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
            text, data = spelling(model.tokenizer, token_id)
            alternatives.append(protocol.TopLogprob(text, logprob, data))
        text, data = spelling(model.tokenizer, entry.token_id)
        content.append(protocol.ChatLogprob(text, entry.logprob, data, alternatives))
    return protocol.ChatLogprobs(content)


class ChatFramer:
    """Chunks of `chat.completion.chunk`; the parts that stay the same are encoded once."""

    def __init__(
        self, body: ChatCompletionRequest, model: ServedModel, generation: Generation
    ) -> None:
        self._model = model
        self._generation = generation
        self._with_logprobs = bool(body.logprobs)
        self._options = body.fulcrum
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        constant = msgspec.json.encode(
            {
                "id": f"chatcmpl-{uuid.uuid4().hex}",
                "object": "chat.completion.chunk",
                "created": int(time.time()),
                "model": model.name,
                "system_fingerprint": model.fingerprint,
            }
        )
        self._head = b"data: " + constant[:-1] + b',"choices":['
        self._heads = [
            self._head + b'{"index":%d,"delta":' % index for index in range(len(generation.streams))
        ]
        self._tail = b'],"usage":null}\n\n' if self._with_usage else b"]}\n\n"

    def begin(self) -> bytes:
        role = b'{"role":"assistant","content":"","refusal":null},"logprobs":null,'
        return b"".join(head + role + b'"finish_reason":null}' + self._tail for head in self._heads)

    def frame(self, delta: Delta) -> bytes:
        data = b""
        text = delta.text
        if text or delta.logprobs:
            logprobs = b"null"
            if self._with_logprobs:
                logprobs = msgspec.json.encode(chat_logprobs(self._model, delta.logprobs))
            data = b'%b{"content":%b},"logprobs":%b,"finish_reason":null}%b' % (
                self._heads[delta.index],
                msgspec.json.encode(text),
                logprobs,
                self._tail,
            )
        if delta.finish_reason is not None:
            data += b'%b{},"logprobs":null,"finish_reason":"%b"}%b' % (
                self._heads[delta.index],
                delta.finish_reason.encode(),
                self._tail,
            )
        return data

    def end(self) -> bytes:
        if not self._with_usage:
            return DONE
        usage = msgspec.json.encode(self._generation.usage(self._options))
        return b'%b],"usage":%b}\n\n%b' % (self._head, usage, DONE)
