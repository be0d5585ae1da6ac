"""Texts with and without guessed words, over pictures that training never saw: equal, and in how many passes.

    blip2 data build
    python benchmarks/drafts.py --work build/drafts

The greedy caption of each picture and an answer, with guesses and without: how many texts differ, and for each text the
passes of the language model, the words guessed and the seconds. Nothing is kept between texts.
"""

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import blip2
from blip2 import paths
from blip2.data.shards import open_split
from blip2.evaluation.speed import machine
from blip2.inference import loading
from blip2.model import drafting
from blip2.preprocessing.prompts import question_prompt

SPLITS = ("held_out_style", "held_out_concepts", "new_scenes")
QUESTION = "What is in the picture?"
LONGEST = 30


def main() -> None:
    """Counts, prints and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the result")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--data", type=Path, default=paths.data_dir() / "open-pairs")
    parser.add_argument("--pictures", type=int, default=120, help="of each split")
    args = parser.parse_args()
    drafting.WORTH_MAKING = 0
    loading.MOST_FLOATS = 0  # with AVX2 alone LiteRT would have the language model, and nobody would guess
    guessing, plain = _Counted(args.model, drafts=True), _Counted(args.model, drafts=False)
    prompts = plain.model.settings.prompts
    asked = {
        "caption": (prompts.caption, prompts.caption_instruction),
        "answer": (question_prompt(QUESTION, prompts.question), QUESTION),
    }
    found: dict[str, Any] = {"machine": machine()}
    for split in SPLITS:
        pictures = open_split(args.data, split)
        chosen = [pictures[i * len(pictures) // args.pictures].image for i in range(args.pictures)]
        for what, (prompt, instruction) in asked.items():
            texts = guessing.say(chosen, prompt, instruction), plain.say(chosen, prompt, instruction)
            found[f"{what}, {split}"] = {
                "texts": len(chosen),
                "differ": sum(a != b for a, b in zip(*texts, strict=True)),
                "with guesses": guessing.take(),
                "without": plain.take(),
            }
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "drafts.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


class _Counted:
    """A model that counts what its language model does, a text at a time."""

    def __init__(self, name: str, *, drafts: bool) -> None:
        self.model = blip2.load(name, parts=["generation"], drafts=drafts)
        self.model.image_cache.max_bytes = self.model.generator.image_cache.max_bytes = 0
        self.counts: Counter[str] = Counter()
        self.seconds = 0.0
        language_model = self.model.generator.language_model
        language_model.model.register_forward_hook(lambda *_: self.counts.update(passes=1))
        draft = language_model.draft

        def counted(*given: Any, **named: Any) -> list[int]:
            guesses = draft(*given, **named)
            self.counts.update(guesses=len(guesses))
            return guesses

        language_model.draft = counted

    def say(self, images: list[Any], prompt: str, instruction: str) -> list[str]:
        """A text for each picture."""
        begin = time.perf_counter()
        texts = [self.model.generate([image], prompt, instruction, max_new_tokens=LONGEST)[0] for image in images]
        self.seconds += time.perf_counter() - begin
        self.counts.update(texts=len(texts))
        return texts

    def take(self) -> dict[str, float]:
        """What was counted since, for each text."""
        counts, seconds = self.counts, self.seconds
        self.counts, self.seconds = Counter(), 0.0
        each = {name: round(counts[name] / counts["texts"], 2) for name in ("passes", "guesses")}
        return each | {"seconds": round(seconds / counts["texts"], 3)}


if __name__ == "__main__":
    main()
