"""The prompts whose answers a head learns from: lines of a file, some of them set as other tasks.

A head is asked for drafts where texts are summarised, translated or looked up as often as where a
question is answered, so a share of the prompts is put to the model as such a task.
"""

import gzip
import json
import random
from collections.abc import Iterator
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
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def vary_prompts(prompts: list[str], seed: int) -> Iterator[str]:
    """The prompts in random order, without end, some of them set as another task."""
    rng = random.Random(seed)
    while True:
        for text in rng.sample(prompts, len(prompts)):
            draw = rng.random()
            if draw < _SHARE_ABOUT_ONE:
                yield rng.choice(_ABOUT_ONE).format(text=text)
            elif draw < _SHARE_ABOUT_ONE + _SHARE_ABOUT_SEVERAL:
                texts = "\n\n".join(rng.choices(prompts, k=rng.randint(2, 6)))
                yield rng.choice(_ABOUT_SEVERAL).format(texts=texts, question=text)
            else:
                yield text
