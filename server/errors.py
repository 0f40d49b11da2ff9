"""The error that handlers raise, and its envelope as OpenAI's SDKs read it."""

import math
from typing import Any

import msgspec

# OpenAI's SDKs follow a Retry-After of up to 120 s and give up on a longer one.
MAX_RETRY_AFTER_S = 110.0

_TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "invalid_request_error",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    417: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that ends with an error status; the message is shown to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        is_final: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.is_final = is_final  # OpenAI's SDKs would otherwise try some statuses again

    def headers(self) -> dict[str, str]:
        """When to come again: in whole seconds, and as OpenAI's SDKs prefer it in milliseconds."""
        if self.retry_after_s is not None:
            wait_ms = max(1, math.ceil(self.retry_after_s * 1000))
            return {"Retry-After": str(-(-wait_ms // 1000)), "retry-after-ms": str(wait_ms)}
        return {"x-should-retry": "false"} if self.is_final else {}

    def envelope(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPE_BY_STATUS.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def body(self) -> bytes:
        return msgspec.json.encode(self.envelope())

    def event(self) -> bytes:
        """The error as a server-sent event, for a stream whose status is already sent."""
        return b"data: " + self.body() + b"\n\n"


def check_ids(param: str, token_ids: list[int], vocab_size: int) -> None:
    """Raise a 400 for an id that the model has no embedding for; the list is not empty."""
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise invalid(param, f"'{param}' holds an id that is not below {vocab_size}.")


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """A 400 that names the field at fault."""
    return ApiError(400, message, param=param, code=code)
