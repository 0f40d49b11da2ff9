"""Models in the cache folder that could draft for another one: small enough, and of its vocabulary.

The vocabularies are compared as the files write them, so that nothing is loaded; `--draft-model`
compares them again, token by token. The qualification asks.
"""

import json
from functools import lru_cache
from pathlib import Path

from engine.checkpoint.cache import cache_folder
from engine.checkpoint.gguf import GgufFile
from engine.checkpoint.tensor import CheckpointError

_MOST_SHARE = 0.5  # of the target's size


def find_candidate(target: Path) -> tuple[bool, str]:
    """Whether there is one for the model at `target`, and which, or what was looked at."""
    cache = cache_folder()
    snapshots = [*cache.glob("hub/*/snapshots/*"), *cache.glob("packages/*")]
    folders = [folder for folder in snapshots if (folder / "config.json").exists()]
    models = [*(file for folder in snapshots for file in folder.glob("*.gguf")), *folders]
    others = sorted(path for path in models if path.resolve() != target.resolve())
    most_bytes = _MOST_SHARE * _weights_bytes(target)
    smaller = [path for path in others if _weights_bytes(path) <= most_bytes]
    own = _vocabulary(target)
    for path in smaller:
        if own and _vocabulary(path) == own:
            name = path.relative_to(cache)
            return True, f"{name} has the same vocabulary and at most half the size"
    found = f"{len(others)} other models in the cache, {len(smaller)} of at most half the size"
    return False, f"{found}, none with the same vocabulary"


def _weights_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def _vocabulary(path: Path) -> tuple[str, ...]:
    """Tokens in the order of their ids; empty where the files do not tell."""
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.exists():
        return ()
    status = file.stat()
    return _read_vocabulary(file, (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=16)
def _read_vocabulary(file: Path, version: tuple[int, int]) -> tuple[str, ...]:
    try:
        if file.suffix == ".gguf":
            return tuple(GgufFile(file).metadata.get("tokenizer.ggml.tokens", ()))
        described = json.loads(file.read_bytes())
        ids = dict(described["model"]["vocab"])
        ids |= {added["content"]: added["id"] for added in described.get("added_tokens", ())}
    except (CheckpointError, ValueError, KeyError, TypeError):
        return ()  # of a kind that is not read here, or broken: no candidate
    return tuple(sorted(ids, key=lambda token: ids[token]))
