"""A run's settings: what a recipe file may say, with every default and its reason.

A recipe is one flat YAML file of what differs from the defaults below; nothing is inherited, interpolated or
imported by name. The resolved recipe is kept in every checkpoint and can be run again as it stands.

    read_recipe("mini/stage1")  ->  apply_overrides(recipe, ["optimizer.weight_decay=0.1"])  ->  to_yaml(recipe)
"""

import dataclasses
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from blip2.errors import BadRecipe, MissingFile
from blip2.training.recipe_faults import explain, hint, hint_at_setting, setting_paths

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _not_a_claim(value: Any) -> Any:
    """Refuses true and false where a number belongs: Python would count them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


Positive = Annotated[int, Field(gt=0), BeforeValidator(_not_a_claim)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_not_a_claim)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

SMALLEST_SHARE = 0.002  # data/order.py deals sources in blocks of 1,000: a smaller share could get no place


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSection:
    """Which frozen parts are bridged, and the shape of the bridge."""

    vision: str = "efficientnet-lite2"
    """Frozen image encoder: a package's name, a Hugging Face name or a folder."""
    language: str | None = "smollm2-135m-instruct"
    """Frozen language model for stage 2 and instruct; null for none."""
    text_init: str = "minilm-l6-v2"
    """BERT-like weights and word pieces the Q-Former starts from."""
    num_query_tokens: Positive = 32
    """Learned queries, and so visual tokens that the language model sees."""
    embed_dim: Positive = 256
    """Width of the space in which images and texts are compared."""
    query_pooling: Literal["max", "mean", "concat"] = "max"
    """How an image's queries stand for it in ITC: each alone, the best one counting (the paper), as their mean, or side
    by side through one wide projection, so that each may hold a part."""
    text_pooling: Literal["cls", "mean"] = "cls"
    """How a text becomes one vector: its first token (the paper) or the mean of its tokens."""
    freeze_word_embeddings: bool = False
    """Keep the word embeddings of text_init as they are."""
    dropout: Share = 0.1
    """Dropout after the Q-Former's dense layers and embeddings."""
    attention_dropout: Share = 0.1
    """Dropout on the Q-Former's attention weights; 0 keeps the fast attention kernels in use."""
    init_from: str | None = None
    """What the bridge's weights start from: a run (by name or folder), a checkpoint, a model folder of ours or Hugging
    Face's, a .pth of LAVIS."""
    instruction_aware: bool = False
    """Show the instruction to the Q-Former too, as InstructBLIP does."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureItem:
    """One source of training samples."""

    split: str
    """A split of the data set folder."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, relative to the other items."""
    task: Literal["caption", "question"] = "caption"
    """Train on the pictures' captions, or on their questions and answers."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions to take, such as left or count; none for all. A split may stand in several items, so that
    some kinds get a greater share."""
    num_views: Positive = 1
    """Views of each picture whose image features are cached: the plain picture and varied ones."""
    flip: bool = False
    """Mirror half of the varied views; wrong where texts speak of left and right."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSection:
    """What the run reads."""

    folder: str = "open-pairs"
    """A data set by name (under the data folder) or by path."""
    mixture: Annotated[tuple[MixtureItem, ...], Field(min_length=1)]
    """The sources and their weights."""
    validation: tuple[str, ...] = ()
    """Splits that evaluations during the run look at."""
    question_share: Share = 0.0
    """Share of the samples with questions whose caption loss (ITG) reads a question and its answer (stage 1)."""
    neighbour_share: Share = 0.0
    """Share of the samples of caption sources that are taken among the nearest neighbours, by text_init, of the caption
    before them: a batch then holds negatives that are hard to tell apart (stage 1, not in the paper)."""
    tag_share: Share = 0.0
    """Share of the captions that are followed by the picture's tags, where it has tags (stage 1)."""
    image_token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the image tokens shown in a step, drawn anew for each picture: a regulariser that also saves time."""
    max_text_length: Positive = 32
    """Longest caption or question in tokens; longer ones are cut."""
    max_answer_length: Positive = 16
    """Longest answer in tokens; longer ones are cut."""

    @model_validator(mode="after")
    def _every_source_gets_a_share(self) -> "DataSection":
        total = sum(item.weight for item in self.mixture)
        for item in self.mixture:
            if item.weight / total < SMALLEST_SHARE:
                raise ValueError(
                    f"{item.split} has a share below {SMALLEST_SHARE:.1%}: raise its weight or leave it out"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSection:
    """AdamW and its schedule: linear warm-up, then a cosine."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: Rate = 1e-5
    """Learning rate at the last step."""
    warmup_learning_rate: Rate = 1e-6
    """Learning rate at the first step."""
    warmup_steps: Count = 2000
    """Steps of linear warm-up; 0 for none."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """Decay of AdamW's first and second moments."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay; biases, norms and single vectors have none."""
    max_grad_norm: Rate = 1.0
    """Longer gradients are scaled down to this norm; 0 turns it off."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingSection:
    """How long, in what portions, and what is written down."""

    steps: Positive
    """Optimiser steps of the whole run."""
    batch_size: Positive
    """Samples that one optimiser step sees."""
    accumulation: Positive = 1
    """Equal parts in which a batch is computed, to save memory; each part has its own negatives."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the matrix products; auto is bfloat16 where the processor has units for it, else float32."""
    label_smoothing: Share = 0.1
    """Label smoothing of the losses that have it."""
    negatives: Literal["paper", "lavis-2023-02"] = "paper"
    """How hard negatives of ITM are drawn."""
    itc_weight: Rate = 1.0
    """Weight of the contrastive loss (stage 1)."""
    itm_weight: Rate = 1.0
    """Weight of the matching loss (stage 1)."""
    sentence_weight: Rate = 0.0
    """Weight of keeping the image features of ITC near the sentence embeddings of text_init: what is learnt of the
    training concepts then carries over to texts never seen (stage 1, not in the paper)."""
    sentence_text_weight: Rate | None = None
    """Weight of keeping the text features there; null: sentence_weight. Needs a sentence_weight."""
    min_temperature: Rate = 0.0
    """Lowest temperature of ITC; 0 leaves it free, as the original code does. A model that may grow ever surer of few
    training pairs does so (stage 1)."""
    matched_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a batch's pairs that ITM matches; their negatives come from the whole batch. Saves time (stage 1)."""
    itg_weight: Rate = 1.0
    """Weight of the captioning loss (stage 1)."""
    log_every: Positive = 20
    """Steps between two lines of the log."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    evaluate_every: Count = 500
    """Steps between two evaluations; 0 for one at the end."""
    answer_samples: Count = 0
    """Samples a step besides batch_size whose answer the Q-Former alone tells, out of a list: on a CPU they cost a
    quarter of those that the LLM answers (instruct, not in the paper)."""
    answer_weight: Rate = 1.0
    """Weight of the loss on them."""
    num_answers: Positive = 5000
    """Length of that list, the most frequent answers of the mixture; samples with another answer do not count."""
    compile: bool = False
    """Fuse the LLM's layers (stage 2, instruction tuning): 1.4 times as fast on a CPU, after 20 seconds; needs a C++
    compiler. A resumed run then equals an uninterrupted one but for rounding."""
    threads: Positive | None = None
    """CPU threads; null leaves the choice to PyTorch. Resuming is bit-exact at one number of threads."""

    @model_validator(mode="after")
    def _parts_are_equal(self) -> "TrainingSection":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into accumulation = {self.accumulation} equal parts"
            )
        if self.answer_samples % self.accumulation:
            raise ValueError(
                f"answer_samples {self.answer_samples} cannot be split into accumulation = {self.accumulation} parts"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """Samples computed at once: the batch's share in one of its `accumulation` parts."""
        return self.batch_size // self.accumulation


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One training run."""

    stage: Literal["stage1", "stage2", "instruct"]
    """stage1: representation (ITC, ITM, ITG); stage2: generation by a frozen LLM; instruct: answers to instructions."""
    name: str
    """Name of the run, and of its folder."""
    seed: Count = 0
    """Decides the order of the samples, dropout and negatives."""
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    training: TrainingSection

    @model_validator(mode="after")
    def _stage_has_its_parts(self) -> "Recipe":
        if self.stage != "stage1" and self.model.language is None:
            raise ValueError(f"{self.stage} trains for a language model: set model.language")
        if self.training.answer_samples and not (self.stage == "instruct" and self.model.instruction_aware):
            raise ValueError("training.answer_samples needs stage: instruct and model.instruction_aware: true")
        return self


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
        return parse_recipe(path.read_text(encoding="utf-8"), str(path))
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
        raise BadRecipe("\n".join(f"{source}: {explain(error, _SETTINGS)}" for error in fault.errors())) from None


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
