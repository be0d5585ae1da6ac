"""An image encoder that was fine-tuned, an LLM with adapters: written into the model folder, which then needs no other.

FOLDER/vision/      the tower in Hugging Face's layout, with the weights that were trained
FOLDER/language/    the language model with its adapters merged
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from blip2.checkpoints import frozen, quantize
from blip2.checkpoints.native import FROZEN, WITHIN, FrozenPart, ModelSettings
from blip2.model.vision import HuggingFaceConvNext, HuggingFaceVision
from blip2.training.lora import add_adapters, merge_adapters
from blip2.training.sections import Recipe

VISION_MODEL, LANGUAGE_MODEL = "vision_model.network.", "language_model.model."


def is_tuned(name: str) -> bool:
    """Whether a trained weight belongs to a part that is frozen otherwise."""
    return name.startswith(FROZEN)


def write(
    beside: Path, recipe: Recipe, weights: Mapping[str, Tensor], settings: ModelSettings
) -> tuple[ModelSettings, dict[str, Path]]:
    """The settings that name the tuned parts, and the folders they were written to, under `beside`."""
    folders: dict[str, Path] = {}
    if vision := _of(weights, VISION_MODEL):
        folders[quantize.VISION] = beside / quantize.VISION
        _write_vision(folders[quantize.VISION], recipe, vision)
        settings = replace(settings, vision=FrozenPart(f"{WITHIN}{quantize.VISION}"))
    if adapters := _of(weights, LANGUAGE_MODEL):
        folders[quantize.LANGUAGE] = beside / quantize.LANGUAGE
        _write_language(folders[quantize.LANGUAGE], recipe, adapters)
        settings = replace(settings, language=FrozenPart(f"{WITHIN}{quantize.LANGUAGE}"))
    return settings, folders


def _of(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def _write_vision(folder: Path, recipe: Recipe, weights: dict[str, Tensor]) -> None:
    vision = frozen.load_vision(recipe.model.vision, image_size=recipe.model.image_size)
    assert isinstance(vision, HuggingFaceVision | HuggingFaceConvNext), "others are not trained"
    vision.network.load_state_dict(weights, strict=False)
    frozen.save_tower(vision, folder)


def _write_language(folder: Path, recipe: Recipe, adapters: dict[str, Tensor]) -> None:
    assert recipe.model.language is not None
    network, tokenizer = frozen.load_language(recipe.model.language, dtype="auto")
    add_adapters(network, recipe.model.lora_rank)
    network.load_state_dict(adapters, strict=False)
    merge_adapters(network)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
