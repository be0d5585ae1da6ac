"""easy-VQA: one coloured shape a picture and questions about it, with an official split."""

import json
from collections import defaultdict
from collections.abc import Iterator

from blip2 import registry
from blip2.data.sample import Question, Sample


def read_easy_vqa(part: str) -> Iterator[Sample]:
    """The samples of `part`, "train" or "test", each picture with all its questions."""
    with registry.open_wheel("easy-vqa") as wheel:
        asked: dict[int, list[Question]] = defaultdict(list)
        for question, answer, image in json.loads(wheel.read(f"easy_vqa/data/{part}/questions.json")):
            asked[image].append(Question(_asked(question), answer, "easy"))
        for number in sorted(asked):
            yield Sample(
                id=f"easy-vqa/{part}/{number:05d}",
                image=wheel.read(f"easy_vqa/data/{part}/images/{number}.png"),
                captions=(),
                questions=tuple(asked[number]),
                source="easy-vqa",
                style="shapes",
                licence="MIT",
            )


def _asked(question: str) -> str:
    return question[0].upper() + question[1:].rstrip("? ") + "?"
