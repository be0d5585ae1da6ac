"""From OpenAI's messages to what the model is asked: one picture, the turns about it, and the question.

A BLIP-2 model looks at one picture at a time. Several may come in one conversation, each in a turn of its own; a
question is about the latest, or about the one that `image` or a beginning like "Image 2:" names, and what was said
about the others is not repeated to the model. A picture without a question asks for a caption.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from blip2.checkpoints.native import Prompts
from blip2.inference.chat import Turns, fit_dialogue
from blip2.inference.generation import Generator
from blip2.server.faults import Fault
from blip2.server.pictures import read_picture
from blip2.server.schemas import AssistantMessage, ImagePart, SystemMessage, TextPart, UserMessage
from blip2.server.settings import ServerSettings

Turn = SystemMessage | UserMessage | AssistantMessage
_NAMED = re.compile(r"\s*(?:image|picture)\s+(\d{1,2})\s*:\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """What the last message asks.

    Attributes:
        text: the question; "" asks for a caption.
        picture: the address of the picture it is about, and which one that is, from 1.
        history: earlier questions about this picture, each with its answer.
        system: what the system messages say.
        texts: all texts of the request, for filters.
    """

    text: str
    picture: tuple[str, int]
    history: Turns
    system: str
    texts: Sequence[str]


@dataclass(frozen=True)
class Prepared:
    """A question as the engine takes it.

    Attributes:
        image: the decoded picture.
        prompt: what the language model continues.
        instruction: what an instruction-aware Q-Former is told.
        num_tokens: of the prompt and the visual prompt.
        stop: what ends the answer besides the model's own end and the request's; "" for nothing.
        warnings: what the caller should know, such as that old turns were left out.
    """

    image: Image.Image
    prompt: str
    instruction: str
    num_tokens: int
    stop: str = ""
    warnings: list[str] = field(default_factory=list)


def read_question(messages: Sequence[Turn], settings: ServerSettings) -> Question:
    """What a conversation asks; no picture is decoded.

    Raises:
        Fault: 400, with what is wrong and where.
    """
    _check_size(messages, settings)
    if not isinstance(messages[-1], UserMessage):
        raise Fault(400, "The last message must be the user's, for it is the one that is answered.", param="messages")
    pictures: list[str] = []
    system: list[str] = []
    turns: list[tuple[int, str, str]] = []  # picture, question, answer
    asked: tuple[int, str] | None = None
    latest = 0
    for message in messages:
        if isinstance(message, SystemMessage):
            system.append(_text(message.content))
        elif isinstance(message, UserMessage):
            number, latest, text = _read_turn(message, pictures, latest)
            asked = number, text
        elif asked is not None:
            turns.append((*asked, _text(message.content)))
            asked = None
    assert asked is not None
    number, question = asked
    history = [(text, answer) for picture, text, answer in turns if picture == number and text and answer.strip()]
    texts = [*system, *(text for _, *pair in turns for text in pair), question]
    return Question(question, (pictures[number - 1], number), history, " ".join(system), texts)


def _read_turn(message: UserMessage, pictures: list[str], latest: int) -> tuple[int, int, str]:
    """Which picture a turn is about, which one is the latest now, and what the turn says.

    A new picture is added to `pictures`; one that is sent again is the one it was.
    """
    parts = [] if isinstance(message.content, str) else message.content
    new = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if len(new) > 1:
        raise Fault(
            400,
            "There are several pictures in one turn, and this model looks at one at a time. "
            "Send each in a turn of its own, and name the one you mean: Image 2: what is this?",
            param="messages",
        )
    pictures += [url for url in new if url not in pictures]
    text = _text(message.content)
    named = _NAMED.match(text)
    latest = pictures.index(new[0]) + 1 if new else latest
    number = message.image or (int(named[1]) if named else latest)
    if not pictures:
        raise Fault(400, "There is no picture in the messages up to this question. Send one first.", param="messages")
    if not 1 <= number <= len(pictures):
        raise Fault(400, f"There is no picture {number}; {len(pictures)} were sent so far.", param="messages")
    text = text[named.end() :] if named and not message.image else text
    if not text and not new:
        raise Fault(400, "A message is empty. Ask something, or send a picture for a caption.", param="messages")
    return number, latest, text


def _text(content: str | Sequence[TextPart | ImagePart] | None) -> str:
    if content is None or isinstance(content, str):
        return (content or "").strip()
    return "\n".join(part.text for part in content if isinstance(part, TextPart)).strip()


def _check_size(messages: Sequence[Turn], settings: ServerSettings) -> None:
    limits = settings.limits
    if len(messages) > limits.messages:
        raise Fault(400, f"There are {len(messages)} messages; at most {limits.messages} are read.", param="messages")
    parts = [part for message in messages if isinstance(message.content, list) for part in message.content]
    num_pictures = sum(isinstance(part, ImagePart) for part in parts)
    if num_pictures > limits.images:
        raise Fault(400, f"There are {num_pictures} pictures; at most {limits.images} are read.", param="messages")
    num_characters = sum(len(_text(message.content)) for message in messages)
    if num_characters > limits.text_characters:
        raise Fault(400, f"The texts have more than {limits.text_characters} characters.", param="messages")


def prepare(
    question: Question, generator: Generator, prompts: Prompts, settings: ServerSettings, *, max_new_tokens: int
) -> Prepared:
    """Decodes the picture and makes the prompt.

    Raises:
        Fault: 400 where a filter refuses; BadImage, UserError.
    """
    url, number = question.picture
    image = read_picture(url, settings, number=number)
    if settings.filter is not None and (reason := settings.filter.refuses_request(question.texts, [image])):
        raise Fault(400, reason, code="content_filter", param="messages")
    if not question.text:
        num_tokens = generator.tokenizer.encode_prompts([prompts.caption]).input_ids.shape[1]
        num_queries = generator.model.config.num_query_tokens
        warnings = ["A system message has no effect on a caption."] if question.system.strip() else []
        caption = prompts.caption, prompts.caption_instruction
        return Prepared(image, *caption, num_tokens + num_queries, warnings=warnings)
    asked = fit_dialogue(
        generator,
        question.history,
        question.text,
        prompts.question,
        max_new_tokens=max_new_tokens,
        system=" ".join(line for line in (settings.system, question.system) if line.strip()),
    )
    warnings = []
    if asked.num_left_out:
        turns = "turn was" if asked.num_left_out == 1 else f"{asked.num_left_out} turns were"
        warnings.append(f"The oldest {turns} left out, for the model cannot read more.")
    return Prepared(image, asked.prompt, question.text, asked.num_tokens, asked.stop, warnings)
