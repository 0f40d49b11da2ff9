"""Deterministic prompts of a wanted number of words, from a text file or from built-in words.

Used by bench.serve. No two prompts of a seed share their beginning, so that a prefix cache on
the server side cannot shorten the prefill that is being measured.
"""

import random
from pathlib import Path

# Common words: nearly always one token each, whatever the tokenizer.
_COMMON = """
the of and to in is that it was for on are with as his they be at one have this from or had
by word but what some we can out other were all there when up use your how said an each she
which do their time if will way about many then them write would like so these her long make
thing see him two has look more day could go come did number sound no most people my over
know water than call first who may down side been now find any new work part take get place
made live where after back little only round man year came show every good me give our under
"""
_WORDS = _COMMON.split()


class PromptSource:
    """Yields prompts by index; the same (text, seed, index) gives the same prompt."""

    def __init__(self, text_path: Path | None, seed: int) -> None:
        self._words = text_path.read_text(encoding="utf-8").split() if text_path else None
        if self._words is not None and len(self._words) < 2:
            raise ValueError(f"{text_path}: needs at least two words to build prompts from")
        self._seed = seed

    def prompt(self, index: int, num_words: int) -> str:
        """Return `num_words` words (at least one) of the prompt with this index."""
        generator = random.Random(f"{self._seed}/{index}")
        # A number first: two windows of one text could otherwise begin alike.
        words = [str(generator.randrange(10**6))]
        if self._words is None:
            words += generator.choices(_WORDS, k=num_words - 1)
        else:
            start = generator.randrange(len(self._words))
            # The text is read as a ring, so that a short file serves for any length.
            words += [self._words[(start + i) % len(self._words)] for i in range(num_words - 1)]
        return " ".join(words)
