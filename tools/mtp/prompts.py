"""The prompts whose answers a head learns from: lines of a file, some of them set as other tasks.

A head is asked for drafts where texts are summarised, translated or looked up as often as where a
question is answered, so a share of the prompts is put to the model as such a task.
"""

import gzip
import json
import random
from pathlib import Path

_ABOUT_ONE = (
    "Summarize: {text}",
    "Summarize the following text.\n\n{text}",
    "{text}\n\nWrite a short summary of the text above.",
    "Rewrite the following in other words:\n\n{text}",
    "Correct the grammar and the spelling of this text:\n\n{text}",
    "Translate to French: {text}",
    "Translate to German: {text}",
    "Explain what this means: {text}",
    "List the key facts of the following text:\n\n{text}",
)
_ABOUT_SEVERAL = (
    "Read these passages.\n\n{texts}\n\nAnswer from the passages: {question}",
    "{texts}\n\nUsing only the text above, answer: {question}",
    "Summarize: {texts}",
    "Give a short summary of each of the following texts.\n\n{texts}",
)
_SHARE_ABOUT_ONE = 0.25
_SHARE_ABOUT_SEVERAL = 0.2


class PromptSet:
    """An endless list of prompts, each known by its index alone.

    They are the file's in random order, again and again in other orders, some of them set as
    another task; whoever goes on at some index meets what an uninterrupted run would have met.
    """

    def __init__(self, texts: list[str], seed: int) -> None:
        self._texts = texts
        self._seed = seed
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, index: int) -> str:
        texts = self._texts
        epoch, position = divmod(index, len(texts))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = random.Random(f"order {self._seed} {epoch}").sample(
                range(len(texts)), len(texts)
            )
        text = texts[self._order[position]]
        rng = random.Random(f"task {self._seed} {index}")
        draw = rng.random()
        if draw < _SHARE_ABOUT_ONE:
            return rng.choice(_ABOUT_ONE).format(text=text)
        if draw < _SHARE_ABOUT_ONE + _SHARE_ABOUT_SEVERAL:
            several = "\n\n".join(rng.choices(texts, k=rng.randint(2, 6)))
            return rng.choice(_ABOUT_SEVERAL).format(texts=several, question=text)
        return text


def read_prompts(path: Path) -> list[str]:
    """The `prompt` of each line of a JSON lines file, which may be gzipped.

    Raises ValueError, naming the line, where one has none.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    prompts = []
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                prompts.append(str(json.loads(line)["prompt"]))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{path}:{number}: needs an object with a "prompt"') from error
    return prompts


def hold_out(prompts: list[str], count: int, seed: int) -> tuple[list[str], list[str]]:
    """Split prompts at random into those to learn from and `count` to judge by."""
    shuffled = random.Random(seed).sample(prompts, len(prompts))
    return shuffled[count:], shuffled[:count]
