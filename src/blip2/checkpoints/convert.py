"""A bridge from one format to another: LAVIS's .pth <-> our model folder, bit for bit both ways."""

from dataclasses import dataclass
from pathlib import Path

from blip2.checkpoints import frozen, lavis, native
from blip2.checkpoints.native import FrozenPart, ModelSettings
from blip2.errors import MissingPart, UserError
from blip2.model.vision import CLIP_MEAN, CLIP_STD

BERT = "bert-base-uncased"


@dataclass(frozen=True)
class FrozenNames:
    """What a .pth does not say: names or folders of the frozen parts, as `checkpoints.frozen` takes them.

    Attributes:
        vision: the image encoder.
        language: the LLM; None for a model of stage 1.
        text_init: whose tokenizer the Q-Former has.
        image_size: side of the pictures (224 in pre-training, 364 in LAVIS's fine-tuned models).
    """

    vision: str
    language: str | None = None
    text_init: str = BERT
    image_size: int = 224


def from_lavis(source: Path, folder: Path, parts: FrozenNames) -> ModelSettings:
    """Writes the model folder of a .pth, weights in their own dtype.

    Raises:
        UserError: a generating checkpoint without the name of its LLM.
        MissingFile, BadData, Untrusted: see `lavis.read`.
    """
    bridge = lavis.read(source)
    speaks = bridge.part == "generation"
    if speaks and parts.language is None:
        raise UserError(f"{source} speaks through a language model, which it does not name. Add it: --llm NAME.")
    settings = ModelSettings(
        name=folder.name,
        vision=FrozenPart(parts.vision),
        language=FrozenPart(parts.language) if speaks and parts.language else None,
        text_init=FrozenPart(parts.text_init),
        qformer=bridge.config,
        image_size=parts.image_size,
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        instruction_aware=bridge.instruction_aware,
        max_text_tokens=128 if bridge.instruction_aware else 32,
        prompts=bridge.prompts,
        stop=bridge.stop,
        notes={"converted_from": source.name},
    )
    return native.save_model_folder(folder, settings, {bridge.part: bridge.weights}, halve=False)


def to_lavis(folder: Path, target: Path, part: str | None = None) -> None:
    """Writes one part of a model folder as a .pth.

    Args:
        folder: ours.
        target: the .pth.
        part: "stage1" or "generation"; None: the only one there is.

    Raises:
        MissingPart: there are two and none is named, or the part is not there.
        UserError: weights are left out of the folder, so that the .pth would lack them.
    """
    settings = native.read_settings(folder)
    if part is None:
        if len(settings.parts) != 1:
            raise MissingPart(f"{folder} has {' and '.join(settings.parts)}, and a .pth holds one. Add --part NAME.")
        (part,) = settings.parts
    if settings.from_text_init:
        raise UserError(
            f"{folder} does not store {', '.join(settings.from_text_init)}, which is that of "
            f"{settings.text_init.name if settings.text_init else 'its text start'}; LAVIS would lack it."
        )
    lavis.write(target, native.load_part(folder, settings, part, dtype=None), projection=_projection(settings))


def _projection(settings: ModelSettings) -> str:
    """What LAVIS calls the linear map to this LLM; for a model of stage 1, which has none, any name."""
    if settings.language is None:
        return lavis.PROJECTIONS[0]
    config = frozen.language_config(settings.language.name)
    if config.is_encoder_decoder:
        return "t5_proj"
    return "opt_proj" if config.model_type == "opt" else "llm_proj"
