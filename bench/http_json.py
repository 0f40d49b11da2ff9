"""Requests with JSON both ways, for benches of the control plane."""

from typing import Any

import aiohttp


async def get_json(session: aiohttp.ClientSession, url: str, body: Any = None) -> Any:
    """The answer's JSON, to a POST where there is a body; raises RuntimeError for an error."""
    method = "GET" if body is None else "POST"
    async with session.request(method, url, json=body) as response:
        answer = await response.json()
        if response.status >= 400:
            raise RuntimeError(f"{url}: HTTP {response.status}: {answer}")
        return answer
