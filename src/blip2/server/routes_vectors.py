"""POST /v1/embeddings and /v1/score: pictures and texts as vectors, and how well they fit."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from blip2.server.documents import documented
from blip2.server.faults import Fault
from blip2.server.pictures import read_picture
from blip2.server.schemas import EmbeddingRequest, ImagePart, Messages, ScoreRequest
from blip2.server.service import Service


def vector_routes(service: Service) -> APIRouter:
    """The routes of the retrieval part."""
    router = APIRouter()

    @router.post("/v1/embeddings", **documented(EmbeddingRequest, "Vectors of texts or of a picture"))
    async def embeddings(request: Request) -> Response:
        return await service.answer(request, EmbeddingRequest, lambda body: _embed(service, body))

    @router.post("/v1/score", **documented(ScoreRequest, "How well texts fit a picture"))
    @router.post("/score", include_in_schema=False)
    async def score(request: Request) -> Response:
        return await service.answer(request, ScoreRequest, lambda body: _score(service, body))

    return router


async def _embed(service: Service, body: EmbeddingRequest) -> dict[str, Any]:
    _ = service.model.retriever  # says so where the model has none
    if (body.input is None) == (body.messages is None):
        raise Fault(400, "Give either input, texts, or messages, a picture.", param="input")
    if body.input is not None:
        texts = _texts(service, body.input, "input")
        vectors = await service.with_model(lambda: service.model.embed_texts(texts))  # (B, E)
        num_tokens = await service.in_reader(lambda: _num_tokens(service, texts))
    else:
        assert body.messages is not None
        url = _only_picture(body.messages)
        image = await service.in_reader(lambda: read_picture(url, service.settings, number=1))
        found = (await service.with_model(lambda: service.model.embed_images(image)))[0]  # (Q, E)
        mean = found.mean(axis=0)
        vectors = (mean / max(float(np.linalg.norm(mean)), 1e-12))[None]
        num_tokens = service.model.retriever.model.config.num_query_tokens
    form = body.encoding_format or "float"
    data = [{"object": "embedding", "index": i, "embedding": _encoded(row, form)} for i, row in enumerate(vectors)]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": service.settings.name, "usage": usage}


async def _score(service: Service, body: ScoreRequest) -> dict[str, Any]:
    _ = service.model.retriever
    texts = _texts(service, body.text_1, "text_1")
    url = body.text_2.content[0].image_url.url
    image = await service.in_reader(lambda: read_picture(url, service.settings, number=1))
    matches = await service.with_model(lambda: service.model.match(image, texts))
    data = [{"index": i, "object": "score", "score": match.itm, "itc": match.itc} for i, match in enumerate(matches)]
    return {"object": "list", "data": data, "model": service.settings.name}


def _texts(service: Service, given: str | Sequence[str], param: str) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    most = service.settings.limits.text_characters
    if sum(map(len, texts)) > most:
        raise Fault(400, f"The texts have more than {most} characters.", param=param)
    if not all(text.strip() for text in texts):
        raise Fault(400, "One of the texts is empty.", param=param)
    return texts


def _only_picture(messages: Messages) -> str:
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    pictures = [part for part in parts if isinstance(part, ImagePart)]
    if len(messages) != 1 or len(parts) != 1 or len(pictures) != 1:
        raise Fault(400, "A vector is that of one picture: give one user message with one image_url.", param="messages")
    return pictures[0].image_url.url


def _num_tokens(service: Service, texts: Sequence[str]) -> int:
    retriever = service.model.retriever
    return int(retriever.tokenizer.encode(texts, retriever.max_text_tokens).attention_mask.sum())


def _encoded(row: np.ndarray, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(np.ascontiguousarray(row, dtype="<f4").tobytes()).decode("ascii")
    return row.tolist()
