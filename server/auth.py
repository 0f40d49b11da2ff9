"""The API key, compared in constant time: asked for everywhere but on the paths for everybody."""

import hashlib
import hmac
import re
from collections.abc import Mapping

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/metrics"})
# The page holds no secrets: it asks for the key that its own requests then need.
_PAGE = re.compile(r"/(page/[\w.-]+)?")


def is_open(path: str) -> bool:
    """Whether a path is for everybody."""
    return path in OPEN_PATHS or _PAGE.fullmatch(path) is not None


def holds_key(headers: Mapping[str, str], api_key: str) -> bool:
    """Whether the request's headers show the key."""
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    is_equal = hmac.compare_digest(
        _digest(given.strip().encode("utf-8", "surrogateescape")), _digest(api_key.encode())
    )
    return is_equal and scheme.lower() == "bearer"


def _digest(key: bytes) -> bytes:
    """Digests have one length, so that comparing them says nothing about the key's."""
    return hashlib.sha256(key).digest()


def require_key(api_key: str) -> Middleware:
    """A middleware that lets only holders of the key pass."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_open(request.path) and not holds_key(request.headers, api_key):
            raise ApiError(
                401,
                "Incorrect or missing API key: send 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
            )
        return await handler(request)

    return check
