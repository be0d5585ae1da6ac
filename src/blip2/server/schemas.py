"""What requests must look like: OpenAI's fields, each with its bounds; a field that is not listed is refused.

Fields of OpenAI's that this server cannot honour are listed with the one value that asks for nothing, so that clients
which always send them are served, and what would be ignored is refused.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=100_000)]
ComparedText = Annotated[str, StringConstraints(max_length=8_192)]  # the Q-Former reads a sentence or two
ComparedTexts = Annotated[list[ComparedText], Field(min_length=1, max_length=256)]
ShortText = Annotated[str, StringConstraints(max_length=512)]
Nothing = Literal[None]


class Strict(BaseModel):
    """Unknown fields are refused, and so is a number where a text belongs."""

    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(Strict):
    """A part of a message that is text."""

    type: Literal["text"]
    text: Text


class ImageAddress(Strict):
    """Where a picture is: a data URI."""

    url: Annotated[str, StringConstraints(max_length=30_000_000)]
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Strict):
    """A part of a message that is a picture."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Text | Annotated[list[Part], Field(min_length=1, max_length=64)]


class SystemMessage(Strict):
    """Guides the answers."""

    role: Literal["system", "developer"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)]
    name: ShortText | None = None


class UserMessage(Strict):
    """A question, with a picture or about an earlier one; a picture alone asks for a caption.

    Attributes:
        image: which picture it is about, counted from 1; None: the latest one.
    """

    role: Literal["user"]
    content: Content
    name: ShortText | None = None
    image: Annotated[int, Field(ge=1, le=64)] | None = None


class AssistantMessage(Strict):
    """What was answered; nothing, where it was a refusal or a call of tools."""

    role: Literal["assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=64)] | None = None
    name: ShortText | None = None
    refusal: ShortText | None = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    reasoning_content: Nothing = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class StreamOptions(Strict):
    """What else a stream tells."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(Strict):
    """The only form of answers."""

    type: Literal["text"]


class ModelRequest(Strict):
    """What every request names: the model that is to answer."""

    model: ShortText


class ChatRequest(ModelRequest):
    """POST /v1/chat/completions.

    Attributes:
        temperature, top_p: draw words by chance; without them, or at temperature 0, the likeliest are taken.
        repetition_penalty, min_tokens: as vLLM has them.
        stream_options: only beside `stream`.
        best_of: of a caption: how many are made, of which the one most similar to the picture is given.
    """

    messages: Messages
    max_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.5, le=2, allow_inf_nan=False)] | None = None
    n: Annotated[int, Field(ge=1, le=64)] | None = None
    best_of: Annotated[int, Field(ge=1, le=64)] | None = None
    stop: ShortText | Annotated[list[ShortText], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: ShortText | None = None
    metadata: dict[ShortText, ShortText] | None = None
    safety_identifier: ShortText | None = None
    prompt_cache_key: ShortText | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None


class AttentionRequest(ModelRequest):
    """POST /v1/attention: where the model looked for `answer`, the answer to the last of `messages`."""

    messages: Messages
    answer: Annotated[str, StringConstraints(max_length=2000)]
    by_word: bool = False


class EmbeddingRequest(ModelRequest):
    """POST /v1/embeddings: of texts (`input`), or of a picture (`messages`, one user message, as vLLM takes it)."""

    input: ComparedText | ComparedTexts | None = None
    messages: Messages | None = None
    encoding_format: Literal["float", "base64"] | None = None
    user: ShortText | None = None


class ScoredContent(Strict):
    """A picture, as vLLM's score endpoint takes it."""

    content: Annotated[list[ImagePart], Field(min_length=1, max_length=1)]


class ScoreRequest(ModelRequest):
    """POST /v1/score: how well each text of `text_1` fits the picture `text_2`."""

    text_1: ComparedText | ComparedTexts
    text_2: ScoredContent
    user: ShortText | None = None
