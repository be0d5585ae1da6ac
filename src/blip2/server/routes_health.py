"""GET /healthz (the process lives), /readyz (it takes requests), /metrics (Prometheus), /v1/models."""

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from blip2.server.documents import documented
from blip2.server.service import Service


def health_routes(service: Service) -> APIRouter:
    """The routes that tell how the server is."""
    router = APIRouter()

    @router.get("/healthz", summary="Whether the process lives", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @router.get("/readyz", **documented(None, "Whether requests are taken", "text/plain"))
    async def readyz() -> Response:
        is_ready = service.is_ready and service.engine.is_alive
        return PlainTextResponse("ready\n" if is_ready else "not ready\n", 200 if is_ready else 503)

    @router.get("/metrics", **documented(None, "Figures for Prometheus", "text/plain"))
    async def metrics() -> Response:
        return Response(service.metrics.as_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", **documented(None, "The model that is served"))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_entry(service)]})

    @router.get("/v1/models/{name}", **documented(None, "One model"))
    async def model(name: str) -> Response:
        service.check_model(name)
        return JSONResponse(_entry(service))

    return router


def _entry(service: Service) -> dict[str, object]:
    name = service.settings.name
    return {"id": name, "object": "model", "created": service.created, "owned_by": "blip2"}
