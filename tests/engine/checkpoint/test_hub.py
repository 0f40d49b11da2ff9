"""Fetching from a hub, played by local HTTP servers: resumed, checked, and the token kept home."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from engine.checkpoint import download
from engine.checkpoint.progress import SilentProgress
from engine.checkpoint.sources import ResolvedModel, resolve
from engine.config import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB


class FakeHub:
    """A hub with one model, org/tiny, and switches for what goes wrong."""

    def __init__(self) -> None:
        self.files = {
            "config.json": b"{}",
            "tokenizer.json": b'{"a": 1}',
            "README.md": b"not wanted",
            "model.safetensors": WEIGHTS,
        }
        self.listed_names: list[str] | None = None
        self.sha256 = hashlib.sha256(WEIGHTS).hexdigest()
        self.token: str | None = None
        self.drops = 0  # answers with the weights that end half-way
        self.knows_ranges = True
        self.lists_sizes = True
        self.storage: FakeHub | None = None  # where the weights are redirected to
        self.renamed_from = ""  # a former name of the model, which is redirected
        self.requests: list[tuple[str, dict[str, str]]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def listing(self) -> dict[str, Any]:
        siblings: list[dict[str, Any]] = []
        for name in self.listed_names or self.files:
            sibling = {"rfilename": name, "size": len(self.files.get(name, b""))}
            if name == "model.safetensors":
                sibling["lfs"] = {"sha256": self.sha256, "size": sibling["size"]}
            if not self.lists_sizes:
                del sibling["size"]
            siblings.append(sibling)
        return {"sha": COMMIT, "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append((path, dict(self.headers)))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._answer(401, b"no")
        if path in ("/api/models/org/tiny/revision/main", "/api/models/org/tiny/revision/v/2"):
            return self._answer(200, json.dumps(hub.listing()).encode())
        if hub.renamed_from and hub.renamed_from in path:
            location = self.path.replace(hub.renamed_from, "org/tiny")
            return self._answer(307, b"", Location=location)
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if name == path or name not in hub.files:
            return self._answer(404, b"no")
        if hub.storage and name == "model.safetensors":
            return self._answer(302, b"", Location=hub.storage.url + path)
        return self._send_file(hub.files[name], may_drop=name == "model.safetensors")

    def _send_file(self, content: bytes, may_drop: bool) -> None:
        start, status, headers = 0, 200, {}
        asked = self.headers.get("Range")
        if asked and self.hub.knows_ranges:
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(content):
                return self._answer(416, b"")
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        body = content[start:]
        if may_drop and self.hub.drops:
            self.hub.drops -= 1
            self.close_connection = True
            return self._answer(status, body[: len(body) // 2], len(body), **headers)
        return self._answer(status, body, **headers)

    def _answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "_FIRST_PAUSE_S", 0.0)
    yield fake
    fake.close()


def _fetch(model: str = "org/tiny") -> ResolvedModel:
    return resolve(model, SilentProgress())


def test_a_model_is_fetched_whole_and_then_used_without_the_hub(hub: FakeHub) -> None:
    resolved = _fetch()
    assert (resolved.name, resolved.kind) == ("org/tiny", "folder")
    assert (resolved.path / "model.safetensors").read_bytes() == WEIGHTS
    fetched = sorted(path.name for path in resolved.path.iterdir())
    assert fetched == ["config.json", "model.safetensors", "tokenizer.json"]
    hub.close()
    assert _fetch() == resolved


def test_a_revision_with_a_slash_is_asked_for_as_written(hub: FakeHub) -> None:
    assert (_fetch("org/tiny@v/2").path / "config.json").is_file()


def test_a_dropped_connection_is_resumed_where_it_broke(hub: FakeHub) -> None:
    hub.drops = 1
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [h.get("Range") for path, h in hub.requests if path.endswith("model.safetensors")]
    assert ranges == [None, f"bytes={len(WEIGHTS) // 2}-"]


def test_an_interrupted_run_is_continued_by_the_next(hub: FakeHub) -> None:
    hub.drops = 100  # more than one run puts up with: each brings half of the rest, then nothing
    with pytest.raises(ConfigError, match="run again"):
        _fetch()
    hub.drops = 0
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.requests[-1][1]["Range"].startswith("bytes=")
    assert hub.requests[-1][1]["Range"] != "bytes=0-"


def test_a_part_longer_than_the_file_is_dropped(hub: FakeHub, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "hub" / "org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.incomplete").write_bytes(b"x" * (len(WEIGHTS) + 1))
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_part_that_cannot_be_continued_is_fetched_anew(hub: FakeHub, tmp_path: Path) -> None:
    hub.lists_sizes = False
    snapshot = tmp_path / "cache" / "hub" / "org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors.incomplete").write_bytes(b"x" * len(WEIGHTS))
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_server_without_ranges_sends_from_the_beginning(hub: FakeHub) -> None:
    hub.drops, hub.knows_ranges = 1, False
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_wrong_sha256_is_refused_and_nothing_of_it_kept(hub: FakeHub, tmp_path: Path) -> None:
    good, hub.sha256 = hub.sha256, "0" * 64
    with pytest.raises(ConfigError, match="SHA-256"):
        _fetch()
    assert not list((tmp_path / "cache").rglob("model.safetensors*"))
    hub.sha256 = good
    assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS


def test_a_wrong_size_is_refused(hub: FakeHub) -> None:
    listing = hub.listing()
    listing["siblings"][0]["size"] = 1
    hub.listing = lambda: listing  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"config\.json"):
        _fetch()


def test_the_token_is_sent_to_the_hub_and_not_where_it_redirects(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token = "secret"
    hub.storage = FakeHub()
    try:
        assert (_fetch().path / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.storage.requests
        assert all("Authorization" not in headers for _, headers in hub.storage.requests)
    finally:
        hub.storage.close()


def test_the_token_stays_with_redirects_inside_the_hub(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.token = "secret"
    hub.renamed_from = "org/old"
    assert (_fetch("org/old").path / "config.json").is_file()


@pytest.mark.parametrize(
    ("token", "advice"), [(None, "set HF_TOKEN to a token"), ("wrong", "HF_TOKEN may not read")]
)
def test_a_refusal_says_what_to_do_in_one_line(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch, token: str | None, advice: str
) -> None:
    hub.token = "secret"
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=f"401: .*{advice}") as caught:
        _fetch()
    assert "\n" not in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_an_unknown_model_or_revision_says_so(hub: FakeHub) -> None:
    with pytest.raises(ConfigError, match=r"404: the hub has no org/none .*check the spelling"):
        _fetch("org/none")
    with pytest.raises(ConfigError, match="org/tiny at revision v9"):
        _fetch("org/tiny@v9")


def test_an_unreachable_hub_says_so(hub: FakeHub) -> None:
    hub.close()
    with pytest.raises(ConfigError, match="check the network and HF_ENDPOINT"):
        _fetch()


@pytest.mark.parametrize("name", ["../evil.json", "/etc/evil", "a/../../evil", "a\\evil", ""])
def test_names_that_lead_out_of_the_folder_are_refused(
    hub: FakeHub, tmp_path: Path, name: str
) -> None:
    hub.listed_names = ["config.json", name]
    with pytest.raises(ConfigError, match="refused"):
        _fetch()
    assert not list(tmp_path.rglob("*evil*"))


def test_only_the_shards_of_the_index_are_fetched(hub: FakeHub) -> None:
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {"a": shards[0], "b": shards[1]}
    hub.files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        shards[0]: b"one",
        shards[1]: b"two",
        "consolidated.safetensors": b"everything again",
    }
    fetched = {path.name for path in _fetch().path.iterdir()}
    assert fetched == {"config.json", "model.safetensors.index.json", *shards}

    hub.files.pop(shards[1])
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors"):
        _fetch("org/tiny@v/2")


def test_a_single_gguf_is_fetched_where_there_are_no_safetensors(hub: FakeHub) -> None:
    hub.files = {"tiny-q4.gguf": b"GGUF"}
    resolved = _fetch()
    assert (resolved.name, resolved.kind, resolved.path.name) == (
        "org/tiny",
        "gguf",
        "tiny-q4.gguf",
    )


def test_several_ggufs_or_no_weights_are_an_error(hub: FakeHub) -> None:
    hub.files = {"a.gguf": b"", "b.gguf": b""}
    with pytest.raises(ConfigError, match=r"holds 2 \.gguf files"):
        _fetch()
    hub.files = {"config.json": b"{}"}
    with pytest.raises(ConfigError, match="neither"):
        _fetch()
