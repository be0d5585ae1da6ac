"""Finished runs -> a model folder that `blip2.load` reads: the retrieval part, the generating part, or both."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from blip2.checkpoints import frozen, native, placing
from blip2.errors import BadRecipe
from blip2.preprocessing.text import QFormerTokenizer
from blip2.registry import PACKAGES
from blip2.training import state, tuned_parts
from blip2.training.parts import qformer_config
from blip2.training.recipe import recipe_from_settings, to_settings
from blip2.training.sections import Recipe
from blip2.training.tuned_parts import is_tuned

MODEL = "model."
WORD_EMBEDDINGS = "embeddings.word_embeddings.weight"
SHARED = (
    "vision",
    "text_init",
    "num_query_tokens",
    "embed_dim",
    "query_pooling",
    "text_pooling",
    "freeze_word_embeddings",
    "train_vision",
    "image_size",
)

Runs = Path | Mapping[Path, float] | None  # one run, or runs and the weight of each in their average


def export(
    folder: Path,
    name: str,
    *,
    stage1: Runs = None,
    generation: Runs = None,
    caption_best_of: int = 1,
    match_weight: float = 1.0,
) -> native.ModelSettings:
    """Writes a model folder from one run or two, or from averages of runs.

    Runs that began from one another can be averaged, weight by weight, which often does better than any of them
    (model soups, Wortsman et al. 2022). Runs from different starts cannot: their average knows nothing.

    Args:
        folder: where to; replaced as a whole if it is there.
        name: what the model is called.
        stage1: run or checkpoint of stage 1, which can embed and match; or several and the weight of each.
        generation: the same of stage 2 or instruct, which can caption and answer.
        caption_best_of: how many captions the model makes where nobody says, for the retrieval part to choose one.
        match_weight: see `native.ModelSettings`.

    Raises:
        BadRecipe: no run is given, a choice of captions without both, a run is of the wrong stage, or runs differ in
            what they share; weights that are not positive.
        MissingFile: a path that holds no complete checkpoint.
    """
    given = {part: runs for part, runs in (("stage1", stage1), ("generation", generation)) if runs}
    if not given:
        raise BadRecipe("There is nothing to export: give a run of stage 1, of stage 2 or instruct, or both.")
    if caption_best_of > 1 and len(given) < 2:
        raise BadRecipe("To choose among captions takes both parts: give a run of stage 1 and one of generation.")
    placing.checked_place(folder, native.SETTINGS_FILE)
    read = {part: _Part(part, runs if isinstance(runs, Mapping) else {runs: 1.0}) for part, runs in given.items()}
    recipes = [recipe for part in read.values() for recipe in part.recipes]
    _check_alike(recipes)
    taken = (WORD_EMBEDDINGS,) if recipes[0].model.freeze_word_embeddings else ()
    settings = model_settings(name, recipes[-1], taken)
    notes: dict[str, Any] = {"recipes": {name: part.notes() for name, part in read.items()}}
    parts = {
        name: {k: v for k, v in part.weights.items() if k not in taken and not is_tuned(k)}
        for name, part in read.items()
    }
    settings = replace(settings, notes=notes, caption_best_of=caption_best_of, match_weight=match_weight)
    tuned = {k: v for part in read.values() for k, v in part.weights.items() if is_tuned(k)}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        settings, folders = tuned_parts.write(Path(beside), recipes[-1], tuned, settings)
        return native.save_model_folder(folder, settings, parts, folders=folders)


class _Part:
    """What the runs of one part hold: their recipes and the average of their weights."""

    def __init__(self, part: str, runs: Mapping[Path, float]) -> None:
        if min(runs.values()) <= 0:
            raise BadRecipe(f"{part}: the weight of a run in an average must be above 0.")
        self.shares = [weight / sum(runs.values()) for weight in runs.values()]
        self.recipes: list[Recipe] = []
        self.weights: dict[str, Tensor] = {}
        for path, share in zip(runs, self.shares, strict=True):
            recipe, weights = _read(path, part)
            if self.recipes:
                _check_alike([self.recipes[0], recipe])
                if recipe.prompts != self.recipes[0].prompts:
                    raise BadRecipe(f"{path} was taught with other prompts than the run before it: no average of them.")
                if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in self.weights.items()}:
                    raise BadRecipe(f"{path} cannot be averaged with the run before it: their weights differ in shape.")
            self.recipes.append(recipe)
            for name, tensor in weights.items():
                self.weights[name] = self.weights.get(name, 0) + share * tensor

    def notes(self) -> list[dict[str, Any]]:
        pairs = zip(self.shares, self.recipes, strict=True)
        return [{"share": round(share, 6), "recipe": _told(recipe)} for share, recipe in pairs]


def _told(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings; a start is named without the folders of the machine it lay on."""
    settings = to_settings(recipe)
    start = recipe.model.init_from
    if start is not None and (Path(start).is_absolute() or Path(start).exists()):
        settings["model"]["init_from"] = Path(start).name
    return settings


def _read(path: Path, part: str) -> tuple[Recipe, dict[str, Tensor]]:
    checkpoint = state.find_checkpoint(path)
    recipe = recipe_from_settings(state.read_state(checkpoint)["recipe"], f"{checkpoint}/state.json")
    if (recipe.stage == "stage1") != (part == "stage1"):
        raise BadRecipe(f"{path} is a run of {recipe.stage}, which cannot be {native.PARTS[part]}.")
    weights = state.load_model(checkpoint)  # besides the model there may be a classifier, which ends with the training
    return recipe, {name[len(MODEL) :]: tensor for name, tensor in weights.items() if name.startswith(MODEL)}


def _check_alike(recipes: list[Recipe]) -> None:
    first, last = recipes[0].model, recipes[-1].model
    for field in SHARED:
        if getattr(first, field) != getattr(last, field):
            raise BadRecipe(f"The runs differ in model.{field}: {getattr(first, field)} and {getattr(last, field)}.")


def model_settings(name: str, recipe: Recipe, taken: tuple[str, ...]) -> native.ModelSettings:
    """blip2.json of a model with a recipe's parts; `taken` names what its text start holds and no part stores."""
    section = recipe.model
    vision = frozen.load_vision(section.vision, image_size=section.image_size)
    text_init = frozen.load_text_init(section.text_init)
    tokenizer = QFormerTokenizer(text_init.tokenizer_file)
    return native.ModelSettings(
        name=name,
        vision=native.FrozenPart(section.vision, _package_sha256(section.vision)),
        qformer=qformer_config(recipe, text_init, vision.width, tokenizer.vocab_size),
        image_size=vision.image_size,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        prompts=native.Prompts(
            recipe.prompts.before_caption, recipe.prompts.caption_instruction, recipe.prompts.question
        ),
        text_init=native.FrozenPart(section.text_init, _package_sha256(section.text_init)),
        language=native.FrozenPart(section.language, _package_sha256(section.language)) if section.language else None,
        instruction_aware=section.instruction_aware,
        max_text_tokens=recipe.data.max_text_length,
        from_text_init=taken,
    )


def _package_sha256(name: str) -> str | None:
    return PACKAGES[name].sha256 if name in PACKAGES else None
