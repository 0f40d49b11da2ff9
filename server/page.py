"""`GET /`: the page, files of server/page/ that need nothing from elsewhere."""

import asyncio
from pathlib import Path

from aiohttp import web

_FOLDER = Path(__file__).parent / "page"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".json": "application/json",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


async def index(request: web.Request) -> web.Response:
    """The page itself."""
    return await _send("index.html")


async def asset(request: web.Request) -> web.Response:
    """One of its files."""
    return await _send(request.match_info["name"])


async def _send(name: str) -> web.Response:
    path = _FOLDER / name
    content_type = _TYPES.get(path.suffix)
    # A name of the route has no slash, so that the path stays inside the folder.
    if content_type is None or name.startswith("."):
        raise web.HTTPNotFound()
    try:
        body = await asyncio.to_thread(path.read_bytes)
    except OSError:
        raise web.HTTPNotFound() from None
    return web.Response(body=body, content_type=content_type, charset="utf-8", headers=_HEADERS)


ROUTES = (web.get("/", index), web.get(r"/page/{name:[\w.-]+}", asset))
