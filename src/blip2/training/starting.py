"""The weights that a run's bridge starts from: another run, a model folder, or the originals' checkpoints."""

import re
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from blip2 import paths
from blip2.checkpoints import frozen, huggingface, lavis, native
from blip2.errors import BadRecipe, MissingFile
from blip2.training import state
from blip2.training.sections import Recipe

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/model


def start_from(model: nn.Module, recipe: Recipe) -> None:
    """Load the bridge named in model.init_from; parts that the two stages do not share keep their start.

    Raises:
        MissingFile: nothing there to start from.
        BadRecipe: weights of another shape.
    """
    if recipe.model.init_from is None:
        return
    weights = bridge_weights(recipe.model.init_from, "stage1" if recipe.stage == "stage1" else "generation")
    own = model.state_dict()
    shared = {name: tensor for name, tensor in weights.items() if name in own}
    for name, tensor in shared.items():
        if own[name].shape != tensor.shape:
            raise BadRecipe(
                f"model.init_from: {name} has shape {tuple(tensor.shape)} there, {tuple(own[name].shape)} here. "
                "Start from a bridge of the same encoder, text_init and queries."
            )
    if not any(name.startswith("qformer.") for name in shared):
        raise BadRecipe(f"model.init_from: {recipe.model.init_from} holds no Q-Former.")
    model.load_state_dict(shared, strict=False)


def bridge_weights(source: str, part: str = "stage1") -> dict[str, Tensor]:
    """Trained tensors, by our names.

    Args:
        source: a run (its newest checkpoint), a checkpoint folder, a safetensors file; a model folder, ours or Hugging
            Face's, or a name of the hub; a .pth of LAVIS.
        part: which to take of a model folder that has two.

    Raises:
        MissingFile: nothing is there.
        UnknownModel: see `found_start`.
        BadData, Untrusted: what is there cannot be read, or not safely.
    """
    path = found_start(source)
    if path.suffix == ".pth":
        return lavis.read(path).weights
    if huggingface.is_checkpoint(path):
        return huggingface.read_part(path, huggingface.read_settings(path))
    if (path / native.SETTINGS_FILE).is_file():
        settings = native.read_settings(path)
        return native.load_part(path, settings, part if part in settings.parts else next(iter(settings.parts)))
    return {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}


def found_start(source: str) -> Path:
    """Where a start lies: a model folder or a file, here or, if it may be a name of the hub, in its cache (fetched if
    need be).

    Raises:
        MissingFile: nothing is there, or a run without a checkpoint.
        UnknownModel: nothing of that name is here, and the hub has no such model or was not to be reached.
    """
    path = run_folder(source)
    is_hub_name = (
        HUB_NAME.fullmatch(source) and path.suffix not in (".pth", ".safetensors") and not path.parent.exists()
    )
    if is_hub_name and not path.exists():
        path = frozen.hub_folder(source, f"model.init_from: {source!r} is no run, folder or file here")
    if path.is_file() or huggingface.is_checkpoint(path) or (path / native.SETTINGS_FILE).is_file():
        return path
    try:
        path = state.find_checkpoint(path) / state.MODEL
    except MissingFile as error:
        raise MissingFile(f"model.init_from: {error}") from None
    if not path.is_file():
        raise MissingFile(f"model.init_from: {path} is missing.")
    return path


def run_folder(source: str) -> Path:
    """The path itself, or the run of that name under the runs folder."""
    named = paths.runs_dir() / source
    return named if not Path(source).exists() and named.exists() else Path(source)
