"""What the default system line of `blip2 serve` does to the mini model's answers: docs/serving.md.

    python benchmarks/system_line.py --questions 1000

The same questions of held-out scenes and of easy-VQA, with the line before the prompt and without it,
greedy; the share answered right, and how many answers differ at all.
"""

import argparse
import json

import blip2
from blip2 import paths
from blip2.data.shards import open_split
from blip2.evaluation.vqa import is_right
from blip2.inference.safety import SYSTEM_LINE
from blip2.preprocessing.prompts import question_prompt

SPLITS = ("new_scenes", "new_noun_pairs", "easy_vqa_test")
BATCH = 64


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--questions", type=int, default=1000, help="of each split")
    args = parser.parse_args()
    model = blip2.load(args.model)
    form = model.settings.prompts.question
    found = {}
    for name in SPLITS:
        split = open_split(paths.data_dir() / "open-pairs", name)
        asked = [(i, question) for i, sample in enumerate(split.described()) for question in sample.questions]
        asked = asked[:: max(1, len(asked) // args.questions)][: args.questions]
        said: dict[str, list[str]] = {"without": [], "with": []}
        for first in range(0, len(asked), BATCH):
            part = asked[first : first + BATCH]
            images = [split[i].image for i, _ in part]
            questions = [question.question for _, question in part]
            prompts = [question_prompt(question, form) for question in questions]
            said["without"] += model.generate(images, prompts, questions)
            said["with"] += model.generate(images, [f"{SYSTEM_LINE} {prompt}" for prompt in prompts], questions)
        found[name] = {
            "questions": len(asked),
            **{
                f"right {way} the line": sum(is_right(a, q.answer) for a, (_, q) in zip(texts, asked, strict=True))
                / len(asked)
                for way, texts in said.items()
            },
            "answers that differ": sum(a != b for a, b in zip(said["without"], said["with"], strict=True)) / len(asked),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
