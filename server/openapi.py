"""`GET /openapi.json`: the endpoints of this very app, with the structs that it decodes.

Paths come from the app's routes, so that none is missing; bodies from the wire's structs. The page
reads it to know which endpoints there are.
"""

from typing import Any

import msgspec
from aiohttp import web

from engine.planning.apply_types import ApplyRequest, Status
from engine.planning.preview import Preview
from engine.planning.proposal import Proposal
from engine.speculation.report import SpeculationReport
from server import protocol
from server.http import MODEL, json_response
from server.operations import package_version
from server.telemetry_report import Health, TelemetryReport

_BODIES: dict[str, Any] = {
    "/v1/chat/completions": protocol.ChatCompletionRequest,
    "/v1/completions": protocol.CompletionRequest,
    "/tokenize": protocol.TokenizeRequest,
    "/detokenize": protocol.DetokenizeRequest,
    "/v1/optimizations/preview": Proposal,
    "/v1/optimizations/apply": ApplyRequest,
}
_ANSWERS: dict[str, tuple[str, Any]] = {
    "/v1/chat/completions": ("200", protocol.ChatCompletion),
    "/v1/completions": ("200", protocol.Completion),
    "/v1/models/{model}": ("200", protocol.ModelCard),
    "/health": ("200", Health),
    "/v1/speculation": ("200", SpeculationReport),
    "/v1/telemetry": ("200", TelemetryReport),
    "/v1/optimizations/apply": ("202", Status),
    "/v1/optimizations/apply/{id}": ("200", Status),
}
_LEFT_OUT = ("/page/{name}", "/")


class PreviewAnswer(msgspec.Struct):
    today: Preview
    proposed: Preview


_ANSWERS["/v1/optimizations/preview"] = ("200", PreviewAnswer)


async def openapi(request: web.Request) -> web.Response:
    return json_response(describe(request.app))


def describe(app: web.Application) -> dict[str, Any]:
    """The OpenAPI 3.1 document of an app."""
    types = [*_BODIES.values(), *(answer for _, answer in _ANSWERS.values())]
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    schema_of = dict(zip(map(id, types), schemas, strict=True))
    # The model that is served: a made-up name is answered by a 404 and tells nothing.
    for name in ("ChatCompletionRequest", "CompletionRequest"):
        components[name]["properties"]["model"] = {"const": app[MODEL].name}
    paths: dict[str, dict[str, Any]] = {}
    for route in app.router.routes():
        resource = route.resource
        if resource is None or route.method == "HEAD":
            continue
        path = resource.canonical
        if path in _LEFT_OUT:
            continue
        operation = _operation(path, route, schema_of)
        paths.setdefault(path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Fulcrum", "version": package_version()},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(
    path: str, route: web.AbstractRoute, schema_of: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    doc = (route.handler.__doc__ or path).strip().split("\n")[0]
    status, answer = _ANSWERS.get(path, ("200", None))
    content: dict[str, Any] = {}
    if answer is not None:
        content = {"content": {"application/json": {"schema": schema_of[id(answer)]}}}
    operation: dict[str, Any] = {
        "summary": doc,
        "responses": {
            status: {"description": "Success", **content},
            "default": {
                "description": "An error, in OpenAI's envelope",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            },
        },
    }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if route.method == "POST" and path in _BODIES:
        schema = schema_of[id(_BODIES[path])]
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema}},
        }
    return operation


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
