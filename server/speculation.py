"""`GET /v1/speculation`: which drafters qualify, what is chosen now and why, what it has gained."""

from aiohttp import web

from engine.types import DrafterChoice
from server.errors import invalid
from server.http import CLIENT, json_response
from server.protocol import FulcrumOptions
from server.served import ServedModel


async def speculation(request: web.Request) -> web.Response:
    """The policy's state, as the engine thread tells it between two steps."""
    return json_response(await request.app[CLIENT].speculation())


def check_drafter(model: ServedModel, options: FulcrumOptions | None) -> None:
    """Raise a 400 where a request names a drafter that this server does not have."""
    choice: DrafterChoice = "auto" if options is None else options.speculation
    if choice in ("auto", "off") or choice in model.drafters:
        return
    raise invalid(
        "fulcrum.speculation",
        f"'{choice}' does not draft on this server, which has "
        f"{', '.join(model.drafters) or 'no drafters'}; start it with --speculation auto.",
        code="unavailable_drafter",
    )
