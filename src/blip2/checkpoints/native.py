"""Our model folder: what was trained, and the names and hashes of what was not.

    blip2.json               settings, written last: it holds the sha256 of every part
    stage1.safetensors       the retrieval part (ITC, ITM, ITG), float16
    generation.safetensors   the part that speaks through the language model, float16
    qformer_tokenizer/       where no text initialisation is named, the Q-Former's tokenizer

The frozen image encoder and language model are named, not copied. Nor are the Q-Former's word embeddings stored where
training left them as its text initialisation had them: `from_text_init` lists what is taken from there.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from blip2.checkpoints import placing
from blip2.errors import BadData, MissingPart, UnknownModel, Untrusted
from blip2.model.config import QFormerConfig

FORMAT = 1
SETTINGS_FILE = "blip2.json"
PARTS = {"stage1": "the retrieval part", "generation": "the generating part"}
OWN_FOLDERS = ("vision", "language", "qformer_tokenizer")  # that a model folder may hold
WITHIN = "./"  # begins the name of a frozen part that lies in the model folder itself
FROZEN = ("vision_model.", "language_model.")


@dataclass(frozen=True)
class FrozenPart:
    """A part that is named, not copied.

    Attributes:
        name: as `checkpoints.frozen` knows it; after ./ a folder within the model's.
        sha256: of its package, or of its weights where it comes from a folder; None = not checked.
    """

    name: str
    sha256: str | None = None

    def place(self, folder: Path) -> str:
        """The name, or the path within the model's folder that it stands for."""
        return str(folder / self.name) if self.name.startswith(WITHIN) else self.name


@dataclass(frozen=True)
class Prompts:
    """What the model was trained to answer to.

    Attributes:
        caption: what the language model continues with a caption.
        caption_instruction: what an instruction-aware Q-Former is told for a caption.
        question: what the language model continues with an answer; {} stands for the question.
    """

    caption: str
    caption_instruction: str
    question: str


@dataclass(frozen=True)
class PartFile:
    """Where a trained part lies in the folder, and its hash."""

    file: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """All of blip2.json.

    Attributes:
        name: what the model is called.
        vision, language, text_init: the frozen parts; a retrieval model has no language model.
        qformer: the Q-Former's shape, common to the parts.
        image_size, image_mean, image_std: how pictures were fed in training.
        instruction_aware: whether the generating part's Q-Former reads the instruction.
        max_text_tokens: how many tokens of a text the Q-Former reads.
        prompts: see Prompts.
        stop: a text that ends what is said, besides the language model's own end; "" for none.
        caption_best_of: how many captions are made, of which the retrieval part chooses one; 1 = no choice.
        match_weight: weight of ITM's log-odds beside ITC's similarity / temperature where both order candidates;
            below 1 for a matching head that is surer than it is right.
        generation: how words are drawn where the caller says nothing, by the names of `DecodingOptions`.
        from_text_init: parameters that are taken from the text initialisation and not stored.
        parts: filled when the folder is written.
        notes: free: data, recipes, seeds, figures, licence.
    """

    name: str
    vision: FrozenPart
    qformer: QFormerConfig
    image_size: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    prompts: Prompts
    text_init: FrozenPart | None = None
    language: FrozenPart | None = None
    instruction_aware: bool = False
    max_text_tokens: int = 32
    stop: str = ""
    caption_best_of: int = 1
    match_weight: float = 1.0
    generation: dict[str, Any] = field(default_factory=dict)
    from_text_init: tuple[str, ...] = ()
    parts: dict[str, PartFile] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to blip2.json."""
        return {"format": FORMAT} | asdict(self)


def save_model_folder(
    folder: Path | str,
    settings: ModelSettings,
    parts: dict[str, dict[str, Tensor]],
    *,
    halve: bool = True,
    folders: Mapping[str, Path] | None = None,
) -> ModelSettings:
    """Writes the folder beside its place and renames it, so that a reader finds the old one or the new one, whole.

    What an earlier model folder holds besides (a model card, say) is kept.

    Args:
        folder: where; its parents are made.
        settings: all but `parts`, which is filled here.
        parts: state dict of each part, by the names in PARTS; see `trained_state`.
        halve: store as float16; off, every weight keeps its dtype.
        folders: name -> a folder to copy into this one under that name, such as the Q-Former's tokenizer.

    Returns:
        The settings as written.

    Raises:
        BadData: a weight is not finite in float16.
        UserError: something else than a model is there.
    """
    place = placing.checked_place(folder, SETTINGS_FILE)
    unknown = parts.keys() - PARTS.keys()
    assert not unknown, f"no such parts: {unknown}"
    beside = placing.beside(place)
    try:
        written = {name: _write_part(beside, name, state, halve=halve) for name, state in parts.items()}
        settings = replace(settings, parts=written)
        for name, source in (folders or {}).items():
            shutil.copytree(source, beside / name)
        text = json.dumps(settings.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (beside / SETTINGS_FILE).write_text(text, encoding="utf-8")
        placing.put(beside, place, _is_ours)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return settings


def trained_state(module: nn.Module, from_text_init: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """What of a Blip2Stage1 or Blip2Stage2 belongs in its part: no frozen part, nothing that the text start holds."""
    return {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not name.startswith(FROZEN) and name not in from_text_init
    }


def _write_part(folder: Path, name: str, state: dict[str, Tensor], *, halve: bool) -> PartFile:
    file = f"{name}.safetensors"
    stored = {key: _on_disk(key, tensor) if halve else tensor.contiguous() for key, tensor in state.items()}
    data = safetensors.torch.save(stored, metadata={"format": "pt"})
    (folder / file).write_bytes(data)
    return PartFile(file=file, sha256=hashlib.sha256(data).hexdigest())


def _on_disk(name: str, tensor: Tensor) -> Tensor:
    """Float16; scalars such as the temperature stay float32, they cost nothing."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32 if tensor.ndim == 0 else torch.float16)
        if not bool(tensor.isfinite().all()):
            raise BadData(f"{name} holds values that are not finite in float16. The training run diverged.")
    return tensor.contiguous()


def _is_ours(name: str) -> bool:
    return name in {SETTINGS_FILE, *OWN_FOLDERS, *(f"{part}.safetensors" for part in PARTS)}


def read_settings(folder: Path | str) -> ModelSettings:
    """The settings of a model folder.

    Raises:
        UnknownModel: no model folder, or one of a newer format.
        BadData: blip2.json is broken.
    """
    path = Path(folder) / SETTINGS_FILE
    if not path.is_file():
        raise UnknownModel(f"{folder} is no model folder: it has no {SETTINGS_FILE}.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT:
            raise UnknownModel(f"{path} has a format that this version does not know. Update blip2.")
        return _settings(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadData(f"{path} is broken ({error}). Fetch or write the model folder again.") from None


def _settings(values: dict[str, Any]) -> ModelSettings:
    """ModelSettings of the plain values in blip2.json; fields that are not known are refused."""
    known = {item.name for item in fields(ModelSettings)}
    if unknown := values.keys() - known:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    made: dict[str, Any] = dict(values)
    for name in ("vision", "language", "text_init"):
        made[name] = FrozenPart(**values[name]) if values.get(name) else None
    if made["vision"] is None:
        raise ValueError("no vision model is named")
    made["qformer"] = QFormerConfig(**values["qformer"])
    made["prompts"] = Prompts(**values["prompts"])
    made["parts"] = {name: PartFile(**part) for name, part in values["parts"].items()}
    for name in ("image_mean", "image_std", "from_text_init"):
        made[name] = tuple(values.get(name, ()))
    return ModelSettings(**made)


def load_part(
    folder: Path | str, settings: ModelSettings, name: str, dtype: torch.dtype | None = torch.float32
) -> dict[str, Tensor]:
    """State dict of a part, checked against its sha256; dtype None leaves the weights in their own.

    Raises:
        MissingPart: the model lacks it.
        Untrusted: the file is not the one that blip2.json tells of.
    """
    if name not in settings.parts:
        has = " and ".join(PARTS[part] for part in settings.parts if part in PARTS)
        raise MissingPart(f"The model {settings.name!r} lacks {PARTS[name]}; it has {has or 'no part at all'}.")
    part = settings.parts[name]
    if Path(part.file).name != part.file:
        raise Untrusted(f"{folder}: the part {part.file!r} would lie outside the model folder.")
    path = Path(folder) / part.file
    if not path.is_file():
        raise BadData(f"{path} is missing. Fetch or write the model folder again.")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != part.sha256:
        raise Untrusted(f"{path} is not the file that {SETTINGS_FILE} tells of (its sha256 differs). Fetch it again.")
    try:
        state = safetensors.torch.load_file(path)  # mapped
    except SafetensorError:
        raise Untrusted(f"{path} is no safetensors file. Fetch or write the model folder again.") from None
    return {key: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for key, tensor in state.items()}
