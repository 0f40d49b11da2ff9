"""Who may change the server: holders of the key, or programs of this machine where none is set.

A browser sends a page's requests from anywhere to a server on this machine, so that neither the
address nor the absence of a key is enough: the request must come from the server's own page or
from no page at all.
"""

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from server.errors import ApiError
from server.http import SETTINGS

_OWN_SITES = ("same-origin", "none")
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP")


def check_admin(request: web.Request) -> None:
    """Raise a 403 unless the request may change the server.

    Where a key is set the middleware has checked it already, as for every request.
    """
    _check_origin(request)
    if request.app[SETTINGS].api_key is not None:
        return
    forwarded = any(name in request.headers for name in _FORWARDED)
    if forwarded or not _is_loopback(request.remote) or not _is_local_name(request.host):
        raise ApiError(
            403,
            "Without an API key this is for programs of the server's own machine: set --api-key, "
            "or ask through 127.0.0.1.",
            code="admin_only",
        )


def _check_origin(request: web.Request) -> None:
    site = request.headers.get("Sec-Fetch-Site", "none").lower()
    origin = request.headers.get("Origin")
    if site not in _OWN_SITES or (origin is not None and urlsplit(origin).netloc != request.host):
        raise ApiError(403, "Requests of other sites' pages are refused.", code="cross_origin")


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_local_name(host: str) -> bool:
    # A foreign name that resolves to this machine is how DNS rebinding gets past the browser.
    name = urlsplit(f"//{host}").hostname
    return name == "localhost" or _is_loopback(name)
