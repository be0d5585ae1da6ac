"""A run's settings: what a recipe file may say, with every default and its reason.

A recipe is one flat YAML file of what differs from the defaults of sections.py; nothing is inherited, interpolated or
imported by name. The resolved recipe is kept in every checkpoint and can be run again as it stands.

    read_recipe("mini/stage1")  ->  apply_overrides(recipe, ["optimizer.weight_decay=0.1"])  ->  to_yaml(recipe)
"""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from blip2.errors import BadRecipe, MissingFile
from blip2.training.recipe_faults import explain, hint, hint_at_setting, setting_paths
from blip2.training.sections import Recipe

_RECIPE = TypeAdapter(Recipe)
_SETTINGS = tuple(setting_paths(Recipe))


# Reading


def read_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe of a built-in name ("mini/stage1") or of a YAML file.

    Args:
        name_or_path: a name as `shipped_recipes()` lists them, or a path that ends in .yaml or .yml.

    Raises:
        MissingFile: a path that leads nowhere.
        BadRecipe: a name that no recipe has, or a file with a wrong or unknown setting.
    """
    name = str(name_or_path)
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise MissingFile(f"There is no recipe file {path}. Built-in recipes: {', '.join(shipped_recipes())}.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise BadRecipe(f"{path} is not UTF-8. Save it so.") from None
        return parse_recipe(text, str(path))
    if name not in shipped_recipes():
        raise BadRecipe(
            f"There is no built-in recipe {name!r}{hint(name, shipped_recipes())} "
            f"Built-in recipes: {', '.join(shipped_recipes())}. A file of your own ends in .yaml."
        )
    return parse_recipe(resources.files("blip2").joinpath(f"recipes/{name}.yaml").read_text(encoding="utf-8"), name)


def shipped_recipes() -> list[str]:
    """Names of the built-in recipes, such as mini/stage1."""
    folder = resources.files("blip2").joinpath("recipes")
    families = sorted((f for f in folder.iterdir() if f.is_dir()), key=lambda f: f.name)
    return [
        f"{family.name}/{file.name.removesuffix('.yaml')}"
        for family in families
        for file in sorted(family.iterdir(), key=lambda f: f.name)
        if file.name.endswith(".yaml")
    ]


def parse_recipe(text: str, source: str) -> Recipe:
    """The recipe written in YAML.

    Args:
        text: the YAML.
        source: where it comes from, for error messages.

    Raises:
        BadRecipe: no YAML, a doubled, wrong or unknown setting.
    """
    try:
        settings = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as fault:
        where = getattr(fault, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise BadRecipe(f"{source}{line}: {getattr(fault, 'problem', None) or 'is not YAML'}.") from None
    if not isinstance(settings, dict):
        raise BadRecipe(f"{source} holds no settings: a recipe is a YAML mapping such as that of mini/stage1.")
    return recipe_from_settings(settings, source)


def recipe_from_settings(settings: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of nested plain values, checked.

    Raises:
        BadRecipe: naming the path of each wrong setting and, for an unknown one, the nearest right name.
    """
    try:
        return _RECIPE.validate_python(dict(settings))
    except ValidationError as fault:
        found = [error for error in fault.errors() if error["type"] != "too_short" or not error["input"]]
        raise BadRecipe("\n".join(f"{source}: {explain(error, _SETTINGS)}" for error in found)) from None


def apply_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """The recipe with some settings changed, checked again.

    Args:
        recipe: the recipe to start from.
        overrides: such as "optimizer.weight_decay=0.1"; the value is YAML, a number in the path is a place in a list.

    Raises:
        BadRecipe: an override without "=", a wrong value or an unknown name.
    """
    settings = to_settings(recipe)
    for override in overrides:
        path, equals, value = override.partition("=")
        if not equals:
            raise BadRecipe(f"--set {override}: write it as NAME=VALUE, such as optimizer.weight_decay=0.1.")
        try:
            _put(settings, path.strip().split("."), yaml.safe_load(value))
        except (LookupError, TypeError, ValueError):
            raise BadRecipe(f"--set {override}: {path} is no setting{hint_at_setting(path, _SETTINGS)}") from None
        except yaml.YAMLError:
            raise BadRecipe(f"--set {override}: {value!r} is no YAML value.") from None
    return recipe_from_settings(settings, "--set")


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Whether a batch can be dealt to so many processes in equal parts.

    Raises:
        BadRecipe: it cannot.
    """
    training = recipe.training
    for name, count in (("batch_size", training.batch_size), ("answer_samples", training.answer_samples)):
        part = count // training.accumulation
        if part % ranks:
            raise BadRecipe(
                f"training.{name} {count} in {training.accumulation} parts cannot be dealt to {ranks} "
                "processes: choose a multiple of accumulation times processes."
            )


def _put(settings: Any, path: list[str], value: Any) -> None:
    """Sets one value deep inside nested dicts and lists."""
    for name in path[:-1]:
        settings = settings[int(name)] if isinstance(settings, list) else settings[name]
    if isinstance(settings, list):
        settings[int(path[-1])] = value
    else:
        settings[path[-1]] = value


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a setting that is given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


# Writing and comparing


def to_settings(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts, lists and plain values, as YAML and JSON have them."""
    return _RECIPE.dump_python(recipe, mode="json")


def to_yaml(recipe: Recipe, with_help: bool = False) -> str:
    """The resolved recipe as YAML that `read_recipe` takes; with_help puts each setting's help above it."""
    if not with_help:
        return yaml.safe_dump(to_settings(recipe), sort_keys=False, allow_unicode=True, width=math.inf)
    return "".join(_lines_with_help(recipe, ""))


def differences(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Path of each setting that differs -> (old value, new value)."""
    before, after = dict(_flat(to_settings(old))), dict(_flat(to_settings(new)))
    return {path: (before[path], after[path]) for path in before if before[path] != after[path]}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _lines_with_help(section: Any, indent: str) -> Iterator[str]:
    for name, field in type(section).__pydantic_fields__.items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield f"{indent}# {type(value).__doc__}\n{indent}{name}:\n"
            yield from _lines_with_help(value, indent + "  ")
            continue
        yield from (f"{indent}# {line}\n" for line in textwrap.wrap(field.description or "", 100))
        if get_args(field.annotation) and isinstance(get_args(field.annotation)[0], str):
            yield f"{indent}# one of: {', '.join(map(str, get_args(field.annotation)))}\n"
        plain = TypeAdapter(type(value)).dump_python(value, mode="json")
        if isinstance(plain, tuple | list):
            plain = [TypeAdapter(type(item)).dump_python(item, mode="json") for item in value]
        yield textwrap.indent(
            yaml.safe_dump({name: plain}, sort_keys=False, allow_unicode=True, width=math.inf), indent
        )
