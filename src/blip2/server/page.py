"""The chat page: built files that lie beside this one, and what the page must know of this server."""

import json
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from blip2 import __version__
from blip2.checkpoints.native import PARTS
from blip2.server.service import Service

FOLDER = Path(__file__).parent / "static"
FORMATS = ("image/jpeg", "image/png", "image/webp", "image/gif", "image/bmp")


def add_page(app: FastAPI, service: Service) -> None:
    """The page at /, its files under /static/, and /page.json."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return FileResponse(FOLDER / "index.html", headers={"Cache-Control": "no-cache"})

    @router.get("/page.json")
    async def page_settings() -> Response:
        return JSONResponse(_settings(service))

    app.include_router(router)
    app.mount("/static", StaticFiles(directory=FOLDER), name="static")


def _settings(service: Service) -> dict[str, Any]:
    limits, parts = service.settings.limits, service.model.settings.parts
    assert set(parts) <= set(PARTS)
    examples = json.loads((FOLDER / "examples" / "examples.json").read_text(encoding="utf-8"))
    return {
        "name": "blip2",
        "version": __version__,
        "needs_key": bool(service.settings.api_keys),
        "model": service.settings.name,
        "can": {"generate": "generation" in parts, "match": "stage1" in parts, "attention": "generation" in parts},
        "examples": [one | {"url": f"/static/examples/{one['name']}"} for one in examples],
        "limits": {
            "body_bytes": limits.body_bytes,
            "image_pixels": limits.image_pixels,
            "images": limits.images,
            "messages": limits.messages,
            "max_tokens": limits.max_tokens,
        },
        "formats": list(FORMATS),
    }
