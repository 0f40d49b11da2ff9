"""Resumable downloads over HTTP, with a token that stays with the host it was given for.

The hub source calls it; errors come out as ConfigError, one line that says what to do.
"""

import errno
import hashlib
import http
import http.client
import re
import time
import urllib.error
import urllib.request
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec

from engine.checkpoint.progress import Progress
from engine.config import ConfigError

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0
_MAX_FRUITLESS_ATTEMPTS = 4  # in a row, none of which brought a byte
_FIRST_PAUSE_S = 0.5  # doubles with every fruitless attempt
_DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO))
_SHA256 = re.compile(r"[0-9a-f]{64}")


class RemoteFile(msgspec.Struct, frozen=True):
    """A file to fetch, with what the listing knows of it."""

    url: str
    num_bytes: int | None = None
    sha256: str | None = None


class HttpClient:
    """GET requests with an optional bearer token, which is sent to no other origin.

    `advice` maps statuses to what the user can do about them.
    """

    def __init__(self, token: str | None, advice: dict[int, str]) -> None:
        self._token = token
        self._advice = advice
        self._opener = urllib.request.build_opener(_TokenKeepingRedirects())

    def read(self, url: str, max_bytes: int) -> bytes:
        """The body of a small answer."""
        try:
            with self._open(url, {}) as response:
                body: bytes = response.read(max_bytes + 1)
        except urllib.error.HTTPError as error:
            raise self._refused(url, error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _unreachable(url, error) from error
        if len(body) > max_bytes:
            raise ConfigError(f"{url}: the answer is longer than {max_bytes} bytes")
        return body

    def fetch(self, remote: RemoteFile, target: Path, progress: Progress) -> None:
        """Fetch into `target`; a part that an earlier run left in *.incomplete is continued.

        Size and SHA-256 are checked where they are known, before the file gets its name.
        """
        part = target.with_name(target.name + ".incomplete")
        if remote.num_bytes is not None and _size(part) > remote.num_bytes:
            part.unlink()
        progress.advance(_size(part))
        expected = self._fetch_part(remote, part, progress)
        if expected.num_bytes is not None and _size(part) != expected.num_bytes:
            found = _size(part)
            part.unlink()
            raise ConfigError(
                f"{remote.url}: {found} bytes came, expected {expected.num_bytes}; run again"
            )
        if expected.sha256 is not None and _file_sha256(part) != expected.sha256:
            part.unlink()
            raise ConfigError(f"{remote.url}: SHA-256 differs from the hub's; run again")
        part.touch()  # an empty file has no part yet
        part.replace(target)

    def _fetch_part(self, remote: RemoteFile, part: Path, progress: Progress) -> RemoteFile:
        """Repeat requests until the part is whole; returns what is now known of the file."""
        fruitless, most = 0, _size(part)
        while True:
            before = _size(part)
            if remote.num_bytes is not None and before >= remote.num_bytes:
                return remote
            failure: Exception
            try:
                remote = self._append(remote, part, progress)
                if remote.num_bytes is None or _size(part) >= remote.num_bytes:
                    return remote
                failure = ConnectionError("the connection was closed early")
            except urllib.error.HTTPError as error:
                if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE and before:
                    part.unlink()  # of a file that has changed since: from the beginning
                    progress.advance(-before)
                elif error.code < 500 and error.code != http.HTTPStatus.TOO_MANY_REQUESTS:
                    raise self._refused(remote.url, error) from error
                failure = error
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in _DISK_ERRORS:
                    raise
                failure = error
            # Against the most there ever was, so that starting over again and again ends too.
            fruitless = 0 if _size(part) > most else fruitless + 1
            most = max(most, _size(part))
            if fruitless == _MAX_FRUITLESS_ATTEMPTS:
                raise _unreachable(remote.url, failure) from failure
            time.sleep(_FIRST_PAUSE_S * 2**fruitless)

    def _append(self, remote: RemoteFile, part: Path, progress: Progress) -> RemoteFile:
        start = _size(part)
        headers = {"Range": f"bytes={start}-"} if start else {}
        with self._open(remote.url, headers) as response:
            if start and not _continues(response, start):
                progress.advance(-start)  # the server sends the file from its beginning
                start = 0
            remote = _completed(remote, response.headers, start)
            with part.open("r+b" if start else "wb") as output:
                output.seek(start)
                while chunk := response.read(_CHUNK_BYTES):
                    output.write(chunk)
                    progress.advance(len(chunk))
        return remote

    def _open(self, url: str, headers: dict[str, str]) -> Any:
        request = urllib.request.Request(url, headers={"User-Agent": "fulcrum", **headers})
        if self._token:
            # Not copied to where a redirect leads, unless _TokenKeepingRedirects does so.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        return self._opener.open(request, timeout=_TIMEOUT_S)

    def _refused(self, url: str, error: urllib.error.HTTPError) -> ConfigError:
        advice = self._advice.get(error.code, "try again later")
        return ConfigError(f"{url}: status {error.code}: {advice}")


class _TokenKeepingRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; the token comes along only within the same origin."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        redirected = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if redirected is not None and token and _origin(req.full_url) == _origin(newurl):
            redirected.add_unredirected_header("Authorization", token)
        return redirected


def _continues(response: Any, start: int) -> bool:
    """Whether the answer is the rest of the file from `start` on, not the whole of it."""
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        return False
    content_range = response.headers.get("Content-Range", "")
    if not content_range.startswith(f"bytes {start}-"):
        raise ConnectionError(f"asked for bytes from {start}, the answer has {content_range}")
    return True


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _completed(remote: RemoteFile, headers: Message, start: int) -> RemoteFile:
    """`remote` with the size and SHA-256 of the answer's headers where the listing gave none."""
    num_bytes, sha256 = remote.num_bytes, remote.sha256
    if num_bytes is None and headers.get("Content-Length", "").isdigit():
        num_bytes = start + int(headers["Content-Length"])
    etag = headers.get("ETag", "").removeprefix("W/").strip('"')
    if sha256 is None and _SHA256.fullmatch(etag):
        sha256 = etag
    return RemoteFile(remote.url, num_bytes, sha256)


def _unreachable(url: str, error: Exception) -> ConfigError:
    reason = getattr(error, "reason", None) or error
    return ConfigError(f"{url}: {reason}; check the network and HF_ENDPOINT, then run again")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
