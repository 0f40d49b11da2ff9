"""Long work without holding up the event loop, and the spellings of tokens that logprobs show."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from engine.tokenizer.protocol import Tokenizer

T = TypeVar("T")

# Less takes less time than the hand-over to a thread and back.
INLINE_SIZE = 2000
CHARS_PER_LOGPROB = 100  # of a rendered position, roughly


async def run_sized(size: int, function: Callable[[], T]) -> T:
    """Call `function` here if its input is small, else in a thread.

    `size` is about the number of characters that it reads or writes.
    """
    if size <= INLINE_SIZE:
        return function()
    return await asyncio.to_thread(function)


def spelling(tokenizer: Tokenizer, token_id: int) -> tuple[str, list[int] | None]:
    """A token as a string and as bytes.

    A token that is only a part of a character has no string of its own: it is spelt
    "bytes:\\xe2\\x82", as OpenAI does. Control tokens have no bytes.
    """
    data = tokenizer.token_bytes(token_id)
    if not data:
        return tokenizer.token_text(token_id), None
    try:
        return data.decode(), list(data)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data)
