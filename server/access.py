"""What every request has: an id, and a line in the access log."""

import logging
import random
import re
from collections.abc import Mapping

from server.protocol import Usage

logger = logging.getLogger("fulcrum.access")

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(headers: Mapping[str, str]) -> str:
    """The client's own x-request-id where it is a sound one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{random.getrandbits(128):032x}"


def log(
    method: str,
    path: str,
    status: int,
    duration_s: float,
    request_id: str,
    usage: Usage | None = None,
) -> None:
    logger.info(
        "%s %s %d %.1f ms",
        method,
        path,
        status,
        duration_s * 1000,
        extra={
            "fields": {
                "method": method,
                "path": path,
                "status": status,
                "duration_ms": round(duration_s * 1000, 1),
                "request_id": request_id,
                "prompt_tokens": usage.prompt_tokens if usage else None,
                "completion_tokens": usage.completion_tokens if usage else None,
            }
        },
    )
