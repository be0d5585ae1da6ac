"""POST /v1/attention: where the Q-Former looked for an answer, by query and by word."""

from typing import Any

from fastapi import APIRouter, Request, Response

from blip2.inference.attention_maps import AttentionMaps, attention_maps, word_sources
from blip2.server.dialogue import Prepared, prepare, read_question
from blip2.server.documents import documented
from blip2.server.faults import Fault
from blip2.server.schemas import AttentionRequest
from blip2.server.service import Service

ROOM = 64  # tokens of an answer, so that the prompt is the one it was given to


def attention_routes(service: Service) -> APIRouter:
    """The route of attention maps."""
    router = APIRouter()

    @router.post("/v1/attention", **documented(AttentionRequest, "Where the model looked"))
    async def attention(request: Request) -> Response:
        return await service.answer(request, AttentionRequest, lambda body: _look(service, body))

    return router


async def _look(service: Service, body: AttentionRequest) -> dict[str, Any]:
    model = service.model
    question = read_question(body.messages, service.settings)

    def read() -> Prepared:
        settings, room = service.settings, ROOM
        if body.by_word:
            room = max(ROOM, model.generator.tokenizer.encode_targets([body.answer]).input_ids.shape[1])
            if room > max(ROOM, settings.limits.max_tokens):  # each query takes a pass over all of them
                raise Fault(400, f"The answer has more than {settings.limits.max_tokens} tokens.", param="answer")
        return prepare(question, model.generator, model.settings.prompts, settings, max_new_tokens=room)

    prepared = await service.in_reader(read)

    def look() -> AttentionMaps:
        features = model.image_features(prepared.image)
        queries = attention_maps(model, features, prepared.instruction)
        words = []
        if body.by_word:
            words = word_sources(model.generator, features, prepared.prompt, prepared.instruction, body.answer)
        return AttentionMaps(queries, words)

    maps = await service.with_model(look)
    answer: dict[str, Any] = {
        "object": "attention",
        "grid": list(maps.average.shape),
        "num_queries": len(maps.queries),
        "average": maps.average.flatten().tolist(),
        "queries": maps.queries.flatten(1).tolist(),
    }
    if body.by_word:
        answer["words"] = [{"text": word.text, "weights": word.weights.tolist()} for word in maps.words]
    return answer
