"""blip2 info: the models that are here, or one model's parts, sizes, licences and places."""

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blip2.cli import options

if TYPE_CHECKING:
    from blip2.checkpoints.native import FrozenPart, ModelSettings


def info(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model's name, folder or .pth; none lists them all.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the models, or tell of one: its parts, parameters, licences, and where they lie."""
    rows = _all_models() if model is None else [_one_model(model)]
    if json:
        for row in rows:
            print(json_format.dumps(row, ensure_ascii=False))
    elif not rows:
        from blip2 import paths

        print(f"No model is in {paths.models_dir()} yet. Train one: blip2 train mini/stage1")
    else:
        print("\n\n".join(_as_text(row) for row in rows))


def _all_models() -> list[dict[str, Any]]:
    from blip2.inference.loading import model_names

    return [_one_model(name) for name in model_names()]


def _one_model(name: str) -> dict[str, Any]:
    from blip2.checkpoints.native import FrozenPart
    from blip2.inference.loading import find_model, read_settings

    folder = find_model(name)
    settings = read_settings(folder)
    named: dict[str, FrozenPart | None] = {
        "image encoder": settings.vision,
        "language model": settings.language,
        "text start": settings.text_init,
    }
    return {
        "name": settings.name,
        "folder": str(folder),
        "queries": settings.qformer.num_query_tokens,
        "image_size": settings.image_size,
        "instruction_aware": settings.instruction_aware,
        "trained": {part: _trained_part(folder, settings, part) for part in settings.parts},
        "frozen": {role: _frozen_part(part, settings, folder) for role, part in named.items() if part is not None},
        "notes": settings.notes,
    }


def _trained_part(folder: Path, settings: "ModelSettings", part: str) -> dict[str, Any]:
    """File, size and number of parameters of a trained part, read from the file's header."""
    from safetensors import safe_open

    from blip2.checkpoints import huggingface
    from blip2.errors import BadData

    if huggingface.is_checkpoint(folder):
        parameters, size = huggingface.stored_sizes(folder, settings)
        return {"file": "*.safetensors", "bytes": size, "parameters": parameters}
    path = folder / settings.parts[part].file
    if not path.is_file():
        raise BadData(f"{path} is missing. Fetch or write the model folder again.")
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        shapes = [file.get_slice(name).get_shape() for name in names]
    return {"file": path.name, "bytes": path.stat().st_size, "parameters": sum(_product(shape) for shape in shapes)}


def _frozen_part(part: "FrozenPart", settings: "ModelSettings", folder: Path) -> dict[str, Any]:
    """Name, licence, size and place of a frozen part; of a quantised one also what it was made of and in what groups.

    Args:
        folder: the model's.
    """
    from blip2 import paths
    from blip2.checkpoints.native import WITHIN, FrozenPart
    from blip2.checkpoints.quantized import group_size
    from blip2.registry import MODELS, PACKAGES

    made_of = settings.notes.get("quantized", {}).get("parts", {}).get(part.name.removeprefix(WITHIN))
    if made_of:
        own = folder / part.name.removeprefix(WITHIN)
        return {
            "name": f"{made_of['bits']} of {made_of['name']}",
            "licence": _frozen_part(FrozenPart(made_of["name"]), settings, folder)["licence"],
            "bytes": sum(path.stat().st_size for path in own.glob("*.safetensors")),
            "place": part.name,
        } | ({"group_size": grouped} if (grouped := group_size(own)) else {})
    packages = [PACKAGES[key] for key in MODELS.get(part.name, ())]
    if not packages:
        return {"name": part.name, "licence": "see there"}
    places = [paths.packages_dir() / package.filename for package in packages]
    return {
        "name": part.name,
        "licence": packages[0].licence,
        "bytes": sum(package.size_bytes for package in packages),
        "place": str(places[0]) if all(place.is_file() for place in places) else "fetched on first use",
    }


def _product(shape: list[int]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _as_text(row: dict[str, Any]) -> str:
    """One model as lines for people."""
    kind = "reads the instruction" if row["instruction_aware"] else "does not read the instruction"
    lines = [row["name"], f"  {'folder':<16}{row['folder']}"]
    lines.append(f"  {'Q-Former':<16}{row['queries']} queries, {row['image_size']} px, {kind}")
    for part, found in row["trained"].items():
        size = f"{found['parameters'] / 1e6:.1f} M parameters, {found['bytes'] / 1e6:.1f} MB"
        lines.append(f"  {part:<16}{size}, {found['file']}")
    for role, found in row["frozen"].items():
        lines.append(
            f"  {role:<16}{', '.join(str(found[key]) for key in ('name', 'licence', 'place') if key in found)}"
        )
    return "\n".join(lines)
