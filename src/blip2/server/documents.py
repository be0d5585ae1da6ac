"""The OpenAPI document: bodies are read by hand, off the event loop, so each route says here what it takes."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from blip2 import __version__
from blip2.server.schemas import AttentionRequest, ChatRequest, EmbeddingRequest, ScoreRequest

_PLACE = "#/components/schemas/{model}"
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
BODIES: tuple[type[BaseModel], ...] = (ChatRequest, AttentionRequest, EmbeddingRequest, ScoreRequest)
STATUSES = {
    400: "The request is at fault; the message says what is wrong.",
    401: "A key is needed.",
    403: "The host or the origin is not allowed.",
    404: "There is no such model.",
    408: "The request came too slowly.",
    413: "The request is too large.",
    415: "The body is no JSON.",
    429: "Too many requests; Retry-After says when to come again.",
    503: "The server is being shut down.",
}


def documented(schema: type[BaseModel] | None, title: str, answer: str = "application/json") -> dict[str, Any]:
    """Arguments of a route's decorator: its title, its body, its answers."""
    statuses = STATUSES if schema is not None else {status: STATUSES[status] for status in (401, 403, 404, 429)}
    refused = {"application/json": {"schema": {"$ref": _PLACE.format(model="Error")}}}
    responses: dict[int | str, Any] = {
        status: {"description": text, "content": refused} for status, text in statuses.items()
    }
    responses[200] = {"description": "Done.", "content": {answer: {}}}
    if schema is None:
        return {"summary": title, "responses": responses}
    place = {"$ref": _PLACE.format(model=schema.__name__)}
    body = {"required": True, "content": {"application/json": {"schema": place}}}
    return {"summary": title, "responses": responses, "openapi_extra": {"requestBody": body}}


def document(app: FastAPI, *, model: str, has_keys: bool) -> dict[str, Any]:
    """The document of the app's routes, for a server of `model`."""
    found = get_openapi(title="blip2", version=__version__, routes=app.routes)
    schemas: dict[str, Any] = {"Error": _ERROR}
    for body in BODIES:
        whole = body.model_json_schema(ref_template=_PLACE)
        whole["properties"]["model"] = {"type": "string", "enum": [model]}
        schemas |= whole.pop("$defs", {}) | {body.__name__: whole}
    for methods in found["paths"].values():
        for route in methods.values():
            route["responses"].pop("422", None)  # what the framework would answer; faults are 400 here
    found.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
    if has_keys:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
