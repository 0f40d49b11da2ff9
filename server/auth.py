"""The API key, compared in constant time: asked for everywhere but on the paths for everybody."""

import hashlib
import hmac
import re

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from server.errors import ApiError

OPEN_PATHS = frozenset({"/health", "/metrics"})
# The page holds no secrets: it asks for the key that its own requests then need.
_PAGE = re.compile(r"/(page/[\w.-]+)?")


def is_open(path: str) -> bool:
    """Whether a path is for everybody."""
    return path in OPEN_PATHS or _PAGE.fullmatch(path) is not None


def require_key(api_key: str) -> Middleware:
    """A middleware that lets only holders of the key pass."""
    # Digests have one length, so that the comparison says nothing about the key's.
    expected = hashlib.sha256(api_key.encode()).digest()

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_open(request.path):
            scheme, _, key = request.headers.get("Authorization", "").partition(" ")
            given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
            if not hmac.compare_digest(given, expected) or scheme.lower() != "bearer":
                raise ApiError(
                    401,
                    "Incorrect or missing API key: send 'Authorization: Bearer <key>'.",
                    code="invalid_api_key",
                )
        return await handler(request)

    return check
