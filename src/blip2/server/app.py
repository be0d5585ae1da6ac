"""The server as an ASGI application: a model, its engine, the routes, and the gate before them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp

from blip2.inference.blip2 import Blip2
from blip2.server.documents import document, documented
from blip2.server.faults import answer_faults
from blip2.server.gate import Gate
from blip2.server.page import add_page
from blip2.server.routes_attention import attention_routes
from blip2.server.routes_chat import chat_routes
from blip2.server.routes_health import health_routes
from blip2.server.routes_vectors import vector_routes
from blip2.server.service import Service
from blip2.server.settings import ServerSettings


def create_app(model: Blip2, settings: ServerSettings) -> tuple[ASGIApp, Service]:
    """The application and what its routes share.

    Args:
        model: with a generating part; embedding and matching need a retrieval part besides. Nobody else may use it
            meanwhile.
        settings: see ServerSettings.
    """
    service = Service(model, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.router.redirect_slashes = False
    for routes in (chat_routes, vector_routes, attention_routes, health_routes):
        app.include_router(routes(service))

    @app.get("/openapi.json", **documented(None, "This document"))
    async def openapi() -> Response:
        return JSONResponse(document(app, model=settings.name, has_keys=bool(settings.api_keys)))

    add_page(app, service)
    answer_faults(app)
    return Gate(app, settings, service.metrics), service
