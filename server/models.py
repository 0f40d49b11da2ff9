"""`GET /v1/models` and `GET /v1/models/{id}`: the one model that is served."""

from aiohttp import web

from server.http import MODEL, check_model, json_response
from server.protocol import ModelCard
from server.served import ServedModel


async def list_models(request: web.Request) -> web.Response:
    return json_response({"object": "list", "data": [_card(request.app[MODEL])]})


async def get_model(request: web.Request) -> web.Response:
    model = request.app[MODEL]
    check_model(model, request.match_info["model"])
    return json_response(_card(model))


def _card(model: ServedModel) -> ModelCard:
    return ModelCard(model.name, model.created, model.max_model_len)
