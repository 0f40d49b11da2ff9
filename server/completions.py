"""`POST /v1/completions`: prompts as text or token ids in, their continuations out."""

import time
import uuid

import msgspec
from aiohttp import web

from engine.types import SamplingParams
from server import protocol, unsupported
from server.echo import Echo, completion_logprobs
from server.errors import check_ids, invalid
from server.generation import Generation
from server.http import CLIENT, MODEL, USAGE, arrival, check_model, json_response, read_body
from server.protocol import CompletionRequest
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
from server.tokens import CHARS_PER_LOGPROB, run_sized

DEFAULT_MAX_TOKENS = 16  # OpenAI's

_DECODER = msgspec.json.Decoder(CompletionRequest)


async def completions(request: web.Request) -> web.StreamResponse:
    raw, model = await read_body(request), request.app[MODEL]
    body, num_sequences = read(raw, model)
    arrived = arrival(request.headers, request.remote, raw, body)
    generation = request.app[CLIENT].open(arrived, num_sequences)
    try:
        texts_or_ids = await run_sized(len(raw), lambda: split_prompts(body.prompt, model))
        prompts = await run_sized(len(raw), lambda: encode_prompts(model, texts_or_ids))
        seeded, num_per_prompt = body.seed is not None, num_choices(body.n)
        choices: list[list[SamplingParams]] = []
        for prompt in prompts:
            params = _params(body, model, len(prompt))
            choices.append([for_choice(params, i, seeded=seeded) for i in range(num_per_prompt)])
        echoes = await run_sized(
            len(raw),
            lambda: [
                Echo(model.tokenizer, given, ids) if body.echo else None
                for given, ids in zip(texts_or_ids, prompts, strict=True)
            ],
        )
        generation.submit(
            prompts,
            choices,
            stops=stop_strings(body.stop),
            hide_output=body.max_tokens == 0,
            options=body.fulcrum,
        )
        answer = CompletionAnswer(body, model, generation, echoes)
        if body.stream:
            return await stream_events(request, generation, answer)
        deltas = await generation.take_all()
        size = sum(delta.num_logprobs for delta in deltas) * CHARS_PER_LOGPROB
        return await run_sized(size, lambda: json_response(answer.whole(deltas)))
    finally:
        generation.close()
        request[USAGE] = generation.usage()


def read(raw: bytes, model: ServedModel) -> tuple[CompletionRequest, int]:
    """The request and how many sequences it asks for; raises a 400 or 404 where that shows
    without its prompts' ids."""
    body = protocol.decode(_DECODER, raw)
    check_model(model, body.model)
    _check_fields(body)
    check_drafter(model, body.fulcrum)
    stop_strings(body.stop)
    return body, num_prompts(body.prompt) * num_choices(body.n)


Prompt = str | list[str | int | list[int]]


def num_prompts(prompt: Prompt) -> int:
    """How many prompts there are, without looking at each."""
    if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
        return 1
    return len(prompt)


def split_prompts(prompt: Prompt, model: ServedModel) -> list[str | list[int]]:
    """The four shapes of `prompt` as one list; raises a 400 for mixtures and unknown ids."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "'prompt' must not be empty.")
    texts = [item for item in prompt if isinstance(item, str)]
    ids = [item for item in prompt if isinstance(item, int)]
    id_lists = [item for item in prompt if isinstance(item, list)]
    if len(texts) == len(prompt):
        return list(texts)
    if len(ids) == len(prompt):
        id_lists = [ids]
    elif len(id_lists) != len(prompt):
        raise invalid("prompt", "'prompt' must hold only strings, only ids or only lists of ids.")
    for token_ids in id_lists:
        if not token_ids:
            raise invalid("prompt", "'prompt' must not hold an empty list.")
        check_ids("prompt", token_ids, model.vocab_size)
    return list(id_lists)


def encode_prompts(model: ServedModel, texts_or_ids: list[str | list[int]]) -> list[list[int]]:
    """Ids of every prompt, the texts encoded as plain text; raises a 400 for one without any."""
    prompts = [
        model.tokenizer.encode(item, add_bos=True, parse_special=False)
        if isinstance(item, str)
        else item
        for item in texts_or_ids
    ]
    if not all(prompts):
        raise invalid("prompt", "'prompt' has no tokens.")
    for ids in prompts:
        check_ids("prompt", ids, model.vocab_size)
    return prompts


def _check_fields(body: CompletionRequest) -> None:
    unsupported.refuse(body, unsupported.COMPLETION)
    if body.stream_options is not None:
        if not body.stream:
            raise invalid("stream_options", "'stream_options' needs 'stream': true.")
        unsupported.refuse(body.stream_options, unsupported.STREAM_OPTIONS, "stream_options.")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "'max_tokens' must be at least 1 without 'echo'.")


def _params(body: CompletionRequest, model: ServedModel, num_prompt_tokens: int) -> SamplingParams:
    num_logprobs = logprobs_count("logprobs", body.logprobs)
    max_tokens = fit_max_tokens(
        "max_tokens", body.max_tokens, DEFAULT_MAX_TOKENS, num_prompt_tokens, model.max_model_len
    )
    return sampling_params(
        body,
        model,
        # The engine always samples once; `hide_output` keeps that token from the answer.
        max_tokens=max(1, max_tokens),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_logprobs if body.echo else None,
    )


class CompletionAnswer:
    """Renders one request's choices: whole, or as the framer of its events."""

    def __init__(
        self,
        body: CompletionRequest,
        model: ServedModel,
        generation: Generation,
        echoes: list[Echo | None],
    ) -> None:
        self._model = model
        self._generation = generation
        self._with_logprobs = body.logprobs is not None
        self._num_alternatives = body.logprobs or 0
        num_per_prompt = len(generation.streams) // len(echoes)
        self._echo_by_choice = [echo for echo in echoes for _ in range(num_per_prompt)]
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._options = body.fulcrum
        self._with_usage = bool(body.stream_options and body.stream_options.include_usage)
        constant = msgspec.json.encode(
            {
                "id": self._id,
                "object": "text_completion",
                "created": self._created,
                "model": model.name,
                "system_fingerprint": model.fingerprint,
            }
        )
        self._head = b"data: " + constant[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._with_usage else b"]}\n\n"

    def whole(self, deltas: list[Delta]) -> protocol.Completion:
        choices = []
        for delta in deltas:
            text, logprobs = self._render(delta)
            reason = delta.finish_reason or "stop"
            choices.append(protocol.CompletionChoice(delta.index, text, logprobs, reason))
        return protocol.Completion(
            id=self._id,
            created=self._created,
            model=self._model.name,
            choices=choices,
            usage=self._generation.usage(self._options),
            system_fingerprint=self._model.fingerprint,
        )

    def begin(self) -> bytes:
        return b""

    def frame(self, delta: Delta) -> bytes:
        text, logprobs = self._render(delta)
        data = b""
        if text or (logprobs is not None and logprobs.tokens):
            data = b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":null}%b' % (
                self._head,
                delta.index,
                msgspec.json.encode(text),
                b"null" if logprobs is None else msgspec.json.encode(logprobs),
                self._tail,
            )
        if delta.finish_reason is not None:
            data += b'%b{"index":%d,"text":"","logprobs":null,"finish_reason":"%b"}%b' % (
                self._head,
                delta.index,
                delta.finish_reason.encode(),
                self._tail,
            )
        return data

    def end(self) -> bytes:
        if not self._with_usage:
            return DONE
        usage = msgspec.json.encode(self._generation.usage(self._options))
        return b'%b],"usage":%b}\n\n%b' % (self._head, usage, DONE)

    def _render(self, delta: Delta) -> tuple[str, protocol.CompletionLogprobs | None]:
        """Text and log probabilities of a delta, the prompt's before the first one."""
        echo = self._echo_by_choice[delta.index]
        offset = len(echo.text) if echo else 0
        text = delta.text
        logprobs = None
        if self._with_logprobs:
            logprobs = completion_logprobs(
                self._model.tokenizer,
                [(offset + at, entry.token_id, entry) for at, entry in delta.logprobs],
                self._num_alternatives,
            )
        if echo and delta.first:
            text = echo.text + text
            if logprobs is not None:
                prompt = echo.logprobs(delta.prompt_logprobs, self._num_alternatives)
                logprobs = _joined(prompt, logprobs)
        return text, logprobs


def _joined(
    first: protocol.CompletionLogprobs, second: protocol.CompletionLogprobs
) -> protocol.CompletionLogprobs:
    top_logprobs = None
    if first.top_logprobs is not None and second.top_logprobs is not None:
        top_logprobs = first.top_logprobs + second.top_logprobs
    return protocol.CompletionLogprobs(
        first.tokens + second.tokens,
        first.token_logprobs + second.token_logprobs,
        top_logprobs,
        first.text_offset + second.text_offset,
    )
