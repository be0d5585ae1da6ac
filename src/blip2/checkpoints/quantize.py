"""A model with few bits a weight: the frozen parts rounded and written into its own folder, the bridge as it was."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip2.checkpoints import convert, frozen, huggingface, native, quantized
from blip2.checkpoints.native import WITHIN, FrozenPart, ModelSettings
from blip2.errors import UserError
from blip2.model.quantized import GROUP_SIZE, Bits, quantize
from blip2.model.vision import HuggingFaceConvNext, HuggingFaceVision, encoder_layers

LANGUAGE, VISION = "language", convert.OWN_VISION


def write(source: Path, name: str, target: Path, bits: Bits, *, group_size: int = GROUP_SIZE) -> None:
    """Writes `source` once more with a quantised language model and image encoder, as one of our model folders.

    The image encoder gets int8 in any case; one that has no linear layers (EfficientNet) stays as it is and is named.

    Args:
        source: a model folder, ours or Hugging Face's.
        name: what the model was called by its user, for messages and notes.
        target: the folder to write; it then needs no other file for these parts.
        bits: of the language model's weights.
        group_size: weights that share a scale in int4; 32, 64, 128 or 256.

    Raises:
        UserError: the model is quantised already, or has nothing that could be.
        MissingFile, BadData, UnknownModel, Untrusted: what is there cannot be read, or not safely.
    """
    is_hugging_face = huggingface.is_checkpoint(source)
    settings = huggingface.read_settings(source) if is_hugging_face else native.read_settings(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
        made, folders = _parts(source, settings, bits, group_size, Path(beside), name)
        rounded = {"bits": bits, "from": name, "parts": {}}
        for part, was in ((VISION, settings.vision), (LANGUAGE, settings.language)):
            if part in folders and was is not None:
                rounded["parts"][part] = {"name": was.name, "bits": "int8" if part == VISION else bits}
        made = replace(made, notes=made.notes | {"quantized": rounded})
        if is_hugging_face:
            bridge = convert.read(source, name, convert.FrozenNames())
            made = replace(bridge.settings, vision=made.vision, language=made.language, notes=made.notes)
            convert.write_folder(replace(bridge, settings=made, folders=bridge.folders | folders), target)
            return
        kept = (huggingface.QFORMER_TOKENIZER, VISION, LANGUAGE)
        folders = {name: source / name for name in kept if (source / name).is_dir()} | folders
        parts = {part: native.load_part(source, settings, part, dtype=None) for part in settings.parts}
        native.save_model_folder(target, replace(made, name=target.name), parts, halve=False, folders=folders)


def _parts(
    source: Path, settings: ModelSettings, bits: Bits, group_size: int, beside: Path, name: str
) -> tuple[ModelSettings, dict[str, Path]]:
    """The settings that name what was quantised, and the folders it lies in."""
    folders = {}
    vision = frozen.load_vision(settings.vision.place(source), dtype="auto", image_size=settings.image_size)
    if isinstance(vision, HuggingFaceVision | HuggingFaceConvNext) and quantize(
        vision.network, "int8", rounds_inputs=True
    ):
        _name_layers(vision.network)
        folders[VISION] = beside / VISION
        quantized.save(vision.network, "int8", folders[VISION])
        settings = replace(settings, vision=FrozenPart(f"{WITHIN}{VISION}"))
    del vision
    if settings.language is not None:
        network, tokenizer = frozen.load_language(settings.language.place(source), dtype="auto")
        quantize(network, bits, group_size=group_size)
        folders[LANGUAGE] = beside / LANGUAGE
        quantized.save(network, bits, folders[LANGUAGE], group_size=group_size if bits == "int4" else None)
        tokenizer.save_pretrained(folders[LANGUAGE])
        settings = replace(settings, language=FrozenPart(f"{WITHIN}{LANGUAGE}"))
    if not folders:
        raise UserError(f"{name!r} has nothing to quantise: no language model, and an encoder without linear layers.")
    return settings, folders


def _name_layers(network: Any) -> None:
    """The configuration counts the layers that are left, one fewer where the last was dropped."""
    if network.config.model_type not in frozen.CONVOLUTIONAL:
        network.config.num_hidden_layers = len(encoder_layers(network))
