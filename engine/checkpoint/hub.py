"""Models of a hub that speaks the Hugging Face API over plain HTTPS, kept in the cache.

Sources calls it for ids such as org/name or org/name@revision. A revision once fetched is used
as it is, without asking the hub again.
"""

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from engine.checkpoint import safetensors
from engine.checkpoint.cache import exclusive
from engine.checkpoint.download import HttpClient, RemoteFile
from engine.checkpoint.progress import Progress
from engine.config import ConfigError

_DEFAULT_ENDPOINT = "https://huggingface.co"
_MAX_LISTING_BYTES = 32 << 20
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_INDEX = safetensors.INDEX_NAME

# What the loader and the tokenizers read, beside the weights.
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def fetch_hub(hub_id: str, revision: str, cache: Path, progress: Progress) -> Path:
    """The folder in the cache with the model's files, fetched if it is not there yet.

    Raises ConfigError.
    """
    folder = cache / "hub" / hub_id.replace("/", "--")
    marker = folder / f"revision-{quote(revision, safe='')}"
    if marker.is_file():
        return folder / marker.read_text()
    with exclusive(folder, progress):
        if not marker.is_file():
            snapshot = _fetch(hub_id, revision, folder, progress)
            # The marker comes last and at once: where it is, the snapshot is whole.
            written = marker.with_name(marker.name + ".incomplete")
            written.write_text(snapshot)
            written.replace(marker)
    return folder / marker.read_text()


def _fetch(hub_id: str, revision: str, folder: Path, progress: Progress) -> str:
    """Fetch a snapshot; returns the name of its folder."""
    endpoint = os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
    endpoint = endpoint.rstrip("/")
    if not endpoint.startswith(("https://", "http://")):
        raise ConfigError(f"HF_ENDPOINT {endpoint}: must begin with https://")
    token = os.environ.get("HF_TOKEN") or None
    client = HttpClient(token, _advice(hub_id, revision, token is not None))
    quoted = quote(revision, safe="")
    url = f"{endpoint}/api/models/{hub_id}/revision/{quoted}?blobs=true"
    listing = _parse_listing(url, client.read(url, _MAX_LISTING_BYTES))
    # Files are asked for by commit, so that all of them are of the same one.
    commit = str(listing.get("sha", ""))
    name = commit if _COMMIT.fullmatch(commit) else quoted
    files = _remote_files(listing, f"{endpoint}/{hub_id}/resolve/{name}", hub_id)
    snapshot = folder / "snapshots" / name
    snapshot.mkdir(parents=True, exist_ok=True)
    wanted = [file for file in _SIDE_FILES if file in files]
    if _INDEX in files:
        _fetch_all(client, {_INDEX: files[_INDEX]}, snapshot, hub_id, progress)
    wanted += _weight_files(files, snapshot, hub_id)
    missing = [file for file in wanted if file not in files]
    if missing:
        raise ConfigError(f"{hub_id}: its index names {missing[0]}, which the hub does not have")
    _fetch_all(client, {file: files[file] for file in wanted}, snapshot, hub_id, progress)
    return f"snapshots/{name}"


def _weight_files(files: dict[str, RemoteFile], snapshot: Path, hub_id: str) -> list[str]:
    if _INDEX in files:
        return safetensors.shard_names(snapshot / _INDEX)
    if "model.safetensors" in files:
        return ["model.safetensors"]
    shards = sorted(file for file in files if file.endswith(".safetensors"))
    if shards:
        return shards
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ConfigError(
            f"{hub_id}: holds {len(ggufs)} .gguf files; download one of them and give its path"
        )
    raise ConfigError(f"{hub_id}: holds neither .safetensors nor .gguf files at its top level")


def _fetch_all(
    client: HttpClient,
    files: dict[str, RemoteFile],
    snapshot: Path,
    hub_id: str,
    progress: Progress,
) -> None:
    files = {name: file for name, file in files.items() if not (snapshot / name).is_file()}
    sizes = [file.num_bytes for file in files.values()]
    known = [size for size in sizes if size is not None]
    progress.start(f"Fetching {hub_id}", sum(known) if len(known) == len(sizes) else None)
    for name, file in files.items():
        client.fetch(file, snapshot / name, progress)
    progress.finish()


def _parse_listing(url: str, body: bytes) -> dict[str, Any]:
    try:
        listing = json.loads(body)
    except ValueError as error:
        raise ConfigError(f"{url}: the answer is no JSON; check HF_ENDPOINT") from error
    if not isinstance(listing, dict) or not isinstance(listing.get("siblings"), list):
        raise ConfigError(f"{url}: the answer lists no files; check HF_ENDPOINT")
    return listing


def _remote_files(listing: dict[str, Any], base_url: str, hub_id: str) -> dict[str, RemoteFile]:
    """The files at the top level, by name. Names that lead out of the folder are refused."""
    files = {}
    for sibling in listing["siblings"]:
        name = sibling.get("rfilename") if isinstance(sibling, dict) else None
        if not isinstance(name, str) or not _is_inside(name):
            raise ConfigError(f"{hub_id}: the hub lists a file named {name!r}; refused")
        if "/" in name:
            continue
        lfs = sibling.get("lfs")
        sha256 = lfs.get("sha256") if isinstance(lfs, dict) else None
        size = sibling.get("size")
        files[name] = RemoteFile(
            f"{base_url}/{quote(name)}",
            size if isinstance(size, int) and size >= 0 else None,
            sha256 if isinstance(sha256, str) else None,
        )
    return files


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not (
        path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not name
    )


def _advice(hub_id: str, revision: str, has_token: bool) -> dict[int, str]:
    access = (
        "HF_TOKEN may not read this model; accept its terms on the hub, or use another token"
        if has_token
        else f"{hub_id} is private, gated or misspelt; set HF_TOKEN to a token that may read it"
    )
    return {
        401: access,
        403: access,
        404: f"the hub has no {hub_id} at revision {revision}; check the spelling",
        429: "too many requests; wait a minute and run again",
    }
