"""Real BLIP-2 runs made tiny: a CLIP tower, a Llama or T5, a BERT start and a data set of a dozen drawn pictures."""

import io
import os
from multiprocessing.connection import Connection
from pathlib import Path

from inference.tiny_model import make_tiny_model
from PIL import Image, ImageDraw

from blip2.data.sample import Question, Sample
from blip2.data.shards import write_manifest, write_split
from blip2.training.loop import Job, Summary, train
from blip2.training.recipe import recipe_from_settings
from blip2.training.sections import Recipe

from .tiny_run import telling

COLOURS = ("red", "green", "blue", "white", "black", "orange")


def make_parts(root: Path, *, decoder_only: bool = True) -> None:
    """Writes frozen parts and data under `root`."""
    make_tiny_model(root, decoder_only=decoder_only)
    folder = root / "pictures"
    folder.mkdir()
    write_manifest(folder, "pictures", {"train": write_split(folder, "train", [picture(i) for i in range(12)])})


def picture(number: int) -> Sample:
    """A coloured square, left or right."""
    colour, side = COLOURS[number % 6], ("left", "right")[number // 6]
    image = Image.new("RGB", (32, 32), "grey")
    left = 2 if side == "left" else 18
    ImageDraw.Draw(image).rectangle((left, 8, left + 12, 24), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    questions = (Question("what colour is the cup?", colour, "colour"), Question("is it left?", "yes", "relation"))
    return Sample(f"{number}", buffer.getvalue(), (f"a {colour} cup {side}",), questions, concept=f"{colour} {side}")


def tiny_recipe(root: Path, stage: str, steps: int = 6, **model: object) -> Recipe:
    """A recipe over the parts in `root`."""
    task = "question" if stage == "instruct" else "caption"
    return recipe_from_settings(
        {
            "stage": stage,
            "name": f"tiny-{stage}",
            "seed": 5,
            "model": {
                "vision": str(root / "vision"),
                "language": None if stage == "stage1" else str(root / "language"),
                "text_init": str(root / "text"),
                "num_query_tokens": 4,
                "embed_dim": 16,
                "freeze_word_embeddings": True,
                "instruction_aware": stage == "instruct",
                **model,
            },
            "data": {
                "folder": str(root / "pictures"),
                "mixture": [{"split": "train", "num_views": 2, "task": task}],
                "image_token_share": 0.5,
                "question_share": 0.5,
            },
            "optimizer": {"warmup_steps": 2, "learning_rate": 1e-3},
            "training": {
                "steps": steps,
                "batch_size": 4,
                "checkpoint_every": 1,
                "evaluate_every": 0,
                "precision": "float32",
                "threads": 1,
            },
        },
        "tiny",
    )


def build_in(root: Path, recipe: Recipe, run_dir: Path) -> Job:
    """The recipe's job, its feature cache under `root`."""
    os.environ["BLIP2_HOME"] = str(root / "home")
    from blip2.training.build import build

    return build(recipe, run_dir)


def run_blip2(root: Path, stage: str, run_dir: Path, steps: int = 6, tell: Connection | None = None) -> Summary:
    """Trains in this process; `tell` receives the number of each batch as it is read."""
    recipe = tiny_recipe(root, stage, steps)
    return train_telling(root, recipe, run_dir, tell)


def train_telling(root: Path, recipe: Recipe, run_dir: Path, tell: Connection | None = None) -> Summary:
    """Trains by the recipe in this process; `tell` receives the number of each batch as it is read."""
    job = build_in(root, recipe, run_dir)
    if tell:
        job.batches = telling(job.batches, tell)
    return train(job, recipe, run_dir)
