"""Load generator for any OpenAI-compatible URL: `python -m bench.serve --url … --model …`.

Each level keeps that many streamed requests in flight until all of the level are done (a closed
loop), and reports output tokens per second, time to the first token (TTFT), inter-token latency
(ITL) and end-to-end time. With --contexts, also one stream with prompts of each of these lengths.

ITL is the time between successive chunks that carry text, one value per gap over all requests: a
chunk of several tokens counts once, as the client sees it. TPOT, the time per output token of a
request after its first chunk, is given beside it and does divide by the tokens. Tokens are those
of the server's usage; where it gives none, chunks are counted instead, and the output says so.
"""

import argparse
import asyncio
import importlib.util
import itertools
import sys
from pathlib import Path

import aiohttp
import msgspec
import uvloop

from bench.client import Outcome, Target, complete
from bench.options import json_object, levels, positive
from bench.prompts import PromptSource
from bench.summary import Level, summarize, table

# Prompts of the probes must not be those of a level: indices from here on are theirs.
_PROBE_INDEX = 1 << 30


class BenchError(Exception):
    """The server cannot be measured; the message says why."""


class LengthModel(msgspec.Struct, frozen=True):
    """Tokens of a prompt by its words: tokens = fixed + per_word * words."""

    fixed: float = 0.0
    per_word: float = 1.0

    def num_words(self, num_tokens: int) -> int:
        """Words for about `num_tokens` tokens, at least one."""
        return max(1, round((num_tokens - self.fixed) / self.per_word))


def _probe_error(outcome: Outcome, target: Target) -> BenchError:
    return BenchError(f"{target.path} does not answer a probe request: {outcome.error}")


async def _probe(
    session: aiohttp.ClientSession, target: Target, source: PromptSource, num_tokens: int
) -> tuple[Target, LengthModel]:
    """Find out whether the server gives usage, and how many tokens a word makes there.

    Two prompts of different lengths separate what the chat template adds from the words' share.
    """
    num_words = (max(4, num_tokens // 4), max(8, num_tokens))
    short = msgspec.structs.replace(target, max_tokens=1)
    prompts = [source.prompt(_PROBE_INDEX + i, words) for i, words in enumerate(num_words)]
    first = await complete(session, short, prompts[0])
    if first.status == 400 and target.ask_usage:
        # Some servers refuse stream_options.
        target = msgspec.structs.replace(target, ask_usage=False)
        short = msgspec.structs.replace(short, ask_usage=False)
        first = await complete(session, short, prompts[0])
    # One token may well be the end of the text: a stream without text is an answer too.
    if first.status != 200:
        raise _probe_error(first, target)
    second = await complete(session, short, prompts[1])
    if second.status != 200:
        raise _probe_error(second, target)
    if first.prompt_tokens is None or second.prompt_tokens is None:
        return target, LengthModel()
    per_word = (second.prompt_tokens - first.prompt_tokens) / (num_words[1] - num_words[0])
    if per_word <= 0:
        return target, LengthModel()
    return target, LengthModel(first.prompt_tokens - per_word * num_words[0], per_word)


async def run_level(
    session: aiohttp.ClientSession, target: Target, prompts: list[str], concurrency: int
) -> list[Outcome]:
    """Keep `concurrency` requests in flight until every prompt was sent and answered."""
    outcomes: list[Outcome] = []
    pending = iter(prompts)

    async def worker() -> None:
        for prompt in pending:
            outcomes.append(await complete(session, target, prompt))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return outcomes


class Levels(msgspec.Struct, frozen=True):
    """What was measured, by concurrency and by tokens of a prompt."""

    levels: list[Level]
    contexts: list[Level]


async def run(options: argparse.Namespace) -> Levels:
    """Probe, warm up, and measure each level and context in turn."""
    source = PromptSource(options.text, options.seed)
    target = Target(
        url=options.url,
        model=options.model,
        endpoint=options.endpoint,
        max_tokens=options.output_tokens,
        ignore_eos=options.ignore_eos,
        extra=options.extra,
    )
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    async with aiohttp.ClientSession(
        headers=headers,
        # A connection for each request: llama-server closes its own after a stream unannounced.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=options.timeout_s),
        read_bufsize=1 << 20,
    ) as session:
        target, lengths = await _probe(session, target, source, options.prompt_tokens)
        num_words = lengths.num_words(options.prompt_tokens)
        warm_up = [source.prompt(_PROBE_INDEX + 2 + i, num_words) for i in range(options.warm_up)]
        await run_level(session, target, warm_up, max(options.concurrency))
        indices = itertools.count()

        async def measure(concurrency: int, num_words: int, least: int) -> Level:
            # Fewer requests than the level holds would measure a lower level.
            count = max(concurrency, options.requests_per_level or least)
            prompts = [source.prompt(next(indices), num_words) for _ in range(count)]
            return summarize(concurrency, await run_level(session, target, prompts, concurrency))

        levels: list[Level] = []
        for concurrency in options.concurrency:
            levels.append(await measure(concurrency, num_words, 4 * concurrency))
            print(f"concurrency {concurrency}: done", file=sys.stderr)
        contexts: list[Level] = []
        for num_tokens in options.contexts:
            contexts.append(await measure(1, lengths.num_words(num_tokens), 4))
            print(f"prompts of {num_tokens} tokens: done", file=sys.stderr)
    return Levels(levels, contexts)


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000/v1", help="base URL, with /v1 (%(default)s)")
    add("--model", required=True, help="model name to ask for")
    add("--api-key", help="sent as a bearer token")
    add("--endpoint", choices=("completions", "chat"), default="completions")
    add("--concurrency", type=levels, default=[1, 8, 32], help="levels, e.g. 1,8,32")
    add("--prompt-tokens", type=positive, default=128, help="about this many (%(default)s)")
    add("--contexts", type=levels, default=[], help="tokens of prompts, e.g. 128,1024,8000")
    add("--output-tokens", type=positive, default=128, help="max_tokens (%(default)s)")
    add(
        "--requests-per-level",
        type=positive,
        help="at least the concurrency; default: four times it",
    )
    add("--warm-up", type=int, default=2, help="requests before the first level (%(default)s)")
    add("--text", type=Path, help="cut prompts from this file instead of built-in words")
    add("--seed", type=int, default=0, help="of the prompts; equal prompts may hit a prefix cache")
    add("--ignore-eos", action="store_true", help="send ignore_eos (vLLM, llama-server, Fulcrum)")
    add("--extra", type=json_object, default={}, help="JSON object added to every request body")
    add("--timeout-s", type=float, default=600.0, help="of one request (%(default)s)")
    add("--json", type=Path, help="write the figures to this file as well")
    add("--plot", type=Path, help="draw tokens/s into this PNG file (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install '.[bench]'")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON; 1 when a request failed, 2 when none can work."""
    options = parse_options(arguments)
    try:
        measured = uvloop.run(run(options))
    except (BenchError, OSError, ValueError) as failure:
        print(f"bench.serve: {failure}", file=sys.stderr)
        return 2
    print(
        f"{options.url}  {options.endpoint}, model {options.model}, prompts of about "
        f"{options.prompt_tokens} tokens, {options.output_tokens} output tokens; times in ms"
    )
    every = measured.levels + measured.contexts
    print(table(every))
    if not all(level.tokens_from_usage for level in every if level.num_errors == 0):
        print("The server gave no usage: tokens are counted as chunks with text.")
    for level in every:
        for error in level.errors:
            print(f"concurrency {level.concurrency}: {error}", file=sys.stderr)
    if options.json:
        settings = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(options).items()
            if key not in ("api_key", "json", "plot")
        }
        document = {"settings": settings, **msgspec.structs.asdict(measured)}
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=2))
    if options.plot:
        from bench.serve_plot import draw  # matplotlib comes with an extra

        draw(options.plot, options.model, measured.levels, measured.contexts)
    return 1 if any(level.num_errors for level in every) else 0


if __name__ == "__main__":
    sys.exit(main())
