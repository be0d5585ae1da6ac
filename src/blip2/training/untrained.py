"""A new bridge between any image encoder and any LLM: a model folder that has learnt nothing yet, and its recipes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from blip2.checkpoints import frozen, native, placing
from blip2.errors import UnknownModel, UserError
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.model.stage2 import Blip2Stage2
from blip2.training.export import model_settings
from blip2.training.recipe import read_recipe, to_yaml
from blip2.training.sections import ModelSection, Recipe

STAGES = {"stage1": "mini/stage1", "stage2": "mini/stage2"}  # what the new recipes take their data and lengths from


@dataclass(frozen=True)
class Shape:
    """What a new Q-Former is like.

    Attributes:
        text_init: the BERT whose sizes, weights and tokenizer it takes, as `frozen.load_text_init` knows it.
        section: its other settings, as in a recipe.
    """

    text_init: str
    section: dict[str, Any]


SHAPES = {
    "base": Shape("bert-base-uncased", {}),  # the paper's
    "mini": Shape(
        "minilm-l6-v2",
        {
            "num_query_tokens": 16,
            "query_pooling": "mean",
            "text_pooling": "mean",
            "freeze_word_embeddings": True,
            "embed_dim": 384,
            "attention_dropout": 0.0,
        },
    ),
}


def init(
    folder: Path,
    *,
    vision: str,
    language: str | None = None,
    qformer: str = "base",
    num_query_tokens: int | None = None,
    seed: int = 0,
) -> list[Path]:
    """Writes an untrained model folder: BERT's weights where it has them, noise elsewhere.

    Args:
        folder: where to; beside the model it gets stage1.yaml and, with an LLM, stage2.yaml, to train it with.
        vision: image encoder, as `frozen.load_vision` takes it.
        language: LLM, as `frozen.load_language` takes it; None for a bridge that only compares.
        qformer: one of SHAPES, or a BERT by its folder or hub name, whose sizes it gets.
        num_query_tokens: learned queries; None: 32 (mini: 16).
        seed: of the noise.

    Returns:
        The files written.

    Raises:
        UnknownModel, Untrusted, BadData: a part that is not to be had, not known or not safe.
        UserError: there is something already that would be replaced.
    """
    if any((folder / name).exists() for name in (native.SETTINGS_FILE, *(f"{stage}.yaml" for stage in STAGES))):
        raise UserError(f"{folder} holds a model or its recipes already. Name another folder, or remove that one.")
    placing.checked_place(folder, native.SETTINGS_FILE)
    shape = SHAPES.get(qformer, Shape(qformer, {}))
    asked: dict[str, Any] = dict(shape.section)
    if num_query_tokens is not None:
        asked["num_query_tokens"] = num_query_tokens
    section = ModelSection(vision=vision, language=language, text_init=shape.text_init, **asked)
    recipes = {stage: _recipe(stage, folder, section) for stage in STAGES if language or stage == "stage1"}
    taken = ("embeddings.word_embeddings.weight",) if section.freeze_word_embeddings else ()
    bert = _bert(shape).state_dict
    settings = model_settings(folder.name, replace(recipes["stage1"], model=section), taken)
    torch.manual_seed(seed)
    first = Blip2Stage1(None, settings.qformer)
    load_text_weights(first, bert)
    parts = {"stage1": native.trained_state(first, taken)}
    if language is not None:
        second = Blip2Stage2(None, settings.qformer, None, language_width=frozen.language_width(language))
        second.load_state_dict(parts["stage1"], strict=False)
        parts["generation"] = native.trained_state(second)
    notes = {"untrained": True, "seed": seed}
    native.save_model_folder(folder, replace(settings, notes=notes), parts, halve=False)
    for stage, recipe in recipes.items():
        (folder / f"{stage}.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    names = [*(f"{name}.safetensors" for name in parts), native.SETTINGS_FILE, *(f"{stage}.yaml" for stage in recipes)]
    return [folder / name for name in names]


def _bert(shape: Shape) -> frozen.TextInit:
    try:
        return frozen.load_text_init(shape.text_init)
    except UnknownModel as error:
        if shape is not SHAPES["base"]:
            raise
        raise UnknownModel(f"{error} Without a hub there is --qformer mini, of MiniLM.") from None


def _recipe(stage: str, folder: Path, section: ModelSection) -> Recipe:
    """The mini model's recipe of that stage with the new model's parts and no more of its own."""
    base, name = read_recipe(STAGES[stage]), f"{folder.name}-{stage}"
    if stage == "stage1":
        start, model = str(folder.resolve()), replace(section, language=None)
        is_mini = section.text_init == SHAPES["mini"].text_init
        training = base.training if is_mini else replace(base.training, sentence_weight=0.0, min_temperature=0.0)
    else:
        start, model, training = f"{folder.name}-stage1", section, base.training
    return replace(base, name=name, model=replace(model, init_from=start), training=training)
