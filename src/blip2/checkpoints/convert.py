"""A bridge from one format to another: LAVIS's .pth, our model folder, Hugging Face's layout; no weight changes a bit.

Every way goes through `Bridge`, what a format holds by our names. What a format has no place for is lost on the way
there, but for Hugging Face's, where we keep it aside (`checkpoints.huggingface_writer`).
"""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from blip2.checkpoints import eva, frozen, huggingface, huggingface_writer, lavis, native, quantized
from blip2.checkpoints.native import WITHIN, FrozenPart, ModelSettings
from blip2.errors import MissingPart, UserError
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.model.vision import CLIP_MEAN, CLIP_STD

BERT = "bert-base-uncased"
OWN_VISION = "vision"  # folder of an image encoder that was trained with the bridge


@dataclass(frozen=True)
class FrozenNames:
    """What a .pth does not say: names or folders of the frozen parts, as `checkpoints.frozen` takes them.

    Attributes:
        vision: the image encoder; None where the .pth holds a fine-tuned one.
        language: the LLM; None for a model of stage 1.
        text_init: whose tokenizer the Q-Former has.
        image_size: side of the pictures (224 in pre-training, 364 in LAVIS's fine-tuned models).
    """

    vision: str | None = None
    language: str | None = None
    text_init: str = BERT
    image_size: int = 224


@dataclass(frozen=True)
class Bridge:
    """One part of a model, of whatever format.

    Attributes:
        settings: all but the parts' files.
        part: "stage1" or "generation".
        weights: whole, by our names, each in the dtype it was stored in.
        folders: what else belongs to it, name -> folder: the Q-Former's tokenizer, a fine-tuned image encoder.
        vision: a fine-tuned image encoder's weights as `Blip2VisionModel` names them; empty where it stayed frozen.
    """

    settings: ModelSettings
    part: str
    weights: dict[str, Tensor]
    folders: dict[str, Path] = field(default_factory=dict)
    vision: dict[str, Tensor] = field(default_factory=dict)

    @property
    def qformer_tokenizer(self) -> Path | None:
        """Folder of the Q-Former's tokenizer; None where it reads no text."""
        if not _reads_text(self.settings, self.part):
            return None
        if self.settings.text_init is not None:
            return frozen.text_init_folder(self.settings.text_init.name)
        return self.folders.get(huggingface.QFORMER_TOKENIZER)


def read(source: Path, name: str, parts: FrozenNames, part: str | None = None) -> Bridge:
    """A bridge of any format.

    Args:
        source: a .pth of LAVIS, or a model folder, ours or Hugging Face's.
        name: how a Hugging Face checkpoint is to be named as a frozen part: its folder or its hub name.
        parts: for a .pth.
        part: which one to take of a model folder that has two.

    Raises:
        UserError: a .pth whose frozen parts are not named; a quantised model.
        MissingPart: there are two parts and none is named, or the part is not there.
        MissingFile, BadData, UnknownModel, Untrusted: what is there cannot be read, or not safely.
    """
    if not source.is_dir():
        return _from_lavis(source, parts)
    if huggingface.is_checkpoint(source):
        return _from_hugging_face(source, name)
    return _from_folder(source, part)


def write_folder(bridge: Bridge, folder: Path) -> None:
    """Writes our model folder."""
    settings, folders = replace(bridge.settings, name=folder.name, from_text_init=()), dict(bridge.folders)
    if not bridge.vision:
        native.save_model_folder(folder, settings, {bridge.part: bridge.weights}, halve=False, folders=folders)
        return
    with eva.as_folder(bridge.vision, settings.image_size) as vision:
        folders[OWN_VISION] = vision
        native.save_model_folder(folder, settings, {bridge.part: bridge.weights}, halve=False, folders=folders)


def write_lavis(bridge: Bridge, target: Path) -> None:
    """Writes a .pth as LAVIS saves it. An image encoder that was fine-tuned goes into it too.

    Raises:
        UnknownModel: what the format cannot tell, so that it would be read as another model.
    """
    lavis.check_can_hold(bridge.settings)
    vision = bridge.vision
    if OWN_VISION in bridge.folders:
        network = frozen.load_vision(str(bridge.folders[OWN_VISION])).network
        vision = dict(network.state_dict())
    lavis.write(target, bridge.weights, projection=_projection(bridge.settings), vision=eva.to_lavis(vision))


def write_hugging_face(bridge: Bridge, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes Hugging Face's layout; errors as of `huggingface_writer.write`."""
    settings = bridge.settings
    with ExitStack() as stack:
        tuned = bridge.folders.get(OWN_VISION)
        if bridge.vision:
            tuned = stack.enter_context(eva.as_folder(bridge.vision, settings.image_size))
        if tuned is not None:
            settings = replace(settings, vision=FrozenPart(str(tuned)))
        huggingface_writer.write(
            folder, settings, bridge.part, bridge.weights, qformer_tokenizer=bridge.qformer_tokenizer, dtype=dtype
        )


def _from_lavis(source: Path, parts: FrozenNames) -> Bridge:
    stored = lavis.read(source)
    speaks = stored.part == "generation"
    if speaks and parts.language is None:
        raise UserError(
            f"{source} speaks through a language model, which it does not name. Add it: "
            f"{source.name},llm=NAME as a model, --llm NAME to convert."
        )
    if parts.vision is None and not stored.vision:
        raise UserError(
            f"{source} does not name its image encoder (Salesforce/blip2-opt-2.7b has it). Add it: "
            f"{source.name},vision=NAME as a model, --vision NAME to convert."
        )
    settings = ModelSettings(
        name=source.stem,
        vision=FrozenPart(f"{WITHIN}{OWN_VISION}" if stored.vision else str(parts.vision)),
        language=FrozenPart(parts.language) if speaks and parts.language else None,
        text_init=FrozenPart(parts.text_init),
        qformer=stored.config,
        image_size=eva.image_size(stored.vision) if stored.vision else parts.image_size,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        instruction_aware=stored.instruction_aware,
        max_text_tokens=128 if stored.instruction_aware else 32,
        prompts=stored.prompts,
        stop=stored.stop,
        notes={"converted_from": source.name},
    )
    return Bridge(settings, stored.part, stored.weights, vision=eva.from_lavis(stored.vision))


def _from_hugging_face(source: Path, name: str) -> Bridge:
    settings = huggingface.read_settings(source)
    (part,) = settings.parts
    tokenizer = huggingface.tokenizer_folder(source)
    named = replace(
        settings,
        vision=FrozenPart(name),
        language=FrozenPart(name) if settings.language else None,
        notes={"converted_from": name},
    )
    folders = {huggingface.QFORMER_TOKENIZER: tokenizer} if _reads_text(settings, part) else {}
    return Bridge(named, part, huggingface.read_part(source, settings, dtype=None), folders)


def _from_folder(source: Path, part: str | None) -> Bridge:
    settings = native.read_settings(source)
    if part is None:
        if len(settings.parts) != 1:
            raise MissingPart(f"{source} has {' and '.join(settings.parts)}; one is converted. Add --part NAME.")
        (part,) = settings.parts
    named = [part.place(source) for part in (settings.vision, settings.language) if part is not None]
    if any(quantized.is_quantized(Path(place)) for place in named):
        raise UserError(
            f"{source} has quantised frozen parts, which no other format holds. Convert what it was made of."
        )
    weights = native.load_part(source, settings, part, dtype=None)
    if settings.from_text_init and settings.text_init and _reads_text(settings, part):
        start = Blip2Stage1(None, settings.qformer)
        load_text_weights(start, frozen.load_text_init(settings.text_init.name).state_dict)
        own = start.state_dict()
        weights |= {name: own[name] for name in settings.from_text_init}
    names = (huggingface.QFORMER_TOKENIZER, OWN_VISION)
    folders = {name: source / name for name in names if (source / name).is_dir()}
    return Bridge(settings, part, weights, folders)


def _reads_text(settings: ModelSettings, part: str) -> bool:
    return part == "stage1" or settings.instruction_aware


def _projection(settings: ModelSettings) -> str:
    """What LAVIS calls the linear map to this LLM; for a model of stage 1, which has none, any name."""
    if settings.language is None:
        return lavis.PROJECTIONS[0]
    config = frozen.language_config(settings.language.name)
    if config.is_encoder_decoder:
        return "t5_proj"
    return "opt_proj" if config.model_type == "opt" else "llm_proj"
