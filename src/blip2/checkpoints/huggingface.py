"""Checkpoints in Hugging Face's layout: BLIP-2 with an LLM, BLIP-2 for retrieval, InstructBLIP.

    config.json              vision_config, qformer_config, text_config
    *.safetensors            vision_model.*, the bridge, language_model.* (shards are read one by one)
    processor_config.json or preprocessor_config.json    size and normalisation of the pictures
    tokenizer files          of the LLM; for retrieval BERT's. InstructBLIP has BERT's in qformer_tokenizer/
    blip2/extras.safetensors what the layout has no place for, where `huggingface_writer` wrote the folder

The frozen parts of such a folder are loaded by `checkpoints.frozen`, which takes the folder for a name.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blip2.checkpoints.frozen import BLIP2_TYPES, read_config, require_safetensors
from blip2.checkpoints.lavis import original_prompts
from blip2.checkpoints.names import Format, Names
from blip2.checkpoints.native import FrozenPart, ModelSettings, PartFile, Prompts
from blip2.checkpoints.trust import check_configuration
from blip2.errors import BadData, UnknownModel, Untrusted
from blip2.model.config import QFormerConfig
from blip2.model.qformer import initialise
from blip2.model.stage1 import INITIAL_TEMPERATURE, Blip2Stage1
from blip2.model.vision import CLIP_MEAN, CLIP_STD

QFORMER_TOKENIZER = "qformer_tokenizer"
CONFIG_FILE = "config.json"
EXTRAS = Path("blip2") / "extras.safetensors"
GENERATION_NAMES = {
    "num_beams": "num_beams",
    "do_sample": "sample",
    "top_p": "top_p",
    "temperature": "temperature",
    "max_new_tokens": "max_new_tokens",
    "min_new_tokens": "min_new_tokens",
    "repetition_penalty": "repetition_penalty",
    "length_penalty": "length_penalty",
}
EXTRA_SETTINGS = ("prompts", "max_text_tokens", "stop")  # kept with them


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a model in this layout."""
    try:
        return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")).get("model_type") in BLIP2_TYPES
    except (OSError, ValueError, AttributeError):
        return False


def read_settings(folder: Path) -> ModelSettings:
    """What our own blip2.json would say of the checkpoint.

    Raises:
        BadData, UnknownModel, Untrusted: a configuration that is broken, not known, or needs code of its own.
    """
    check_configuration(folder, refuse_own_code=True)
    config = read_config(folder, str(folder))
    part = _part(config, folder)
    pictures = _image_settings(folder)
    is_instruct = config.model_type == "instructblip"
    size = pictures.get("size") or {}
    settings = ModelSettings(
        name=folder.name,
        vision=FrozenPart(str(folder)),
        language=FrozenPart(str(folder)) if part == "generation" else None,
        qformer=_qformer_config(config),
        image_size=size.get("height") or size.get("shortest_edge") or config.vision_config.image_size,
        image_mean=_three(pictures.get("image_mean") or CLIP_MEAN),
        image_std=_three(pictures.get("image_std") or CLIP_STD),
        instruction_aware=is_instruct,
        max_text_tokens=config.qformer_config.max_position_embeddings,
        prompts=original_prompts(is_instruct=is_instruct, is_encoder_decoder=config.text_config.is_encoder_decoder),
        generation=_generation(folder),
        parts={part: PartFile(file=CONFIG_FILE, sha256="")},
    )
    return replace(settings, **_extra_settings(folder))


def _generation(folder: Path) -> dict[str, Any]:
    """What generation_config.json says of how words are drawn, by our names; empty where it says nothing."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        found = {ours: told[theirs] for theirs, ours in GENERATION_NAMES.items() if told.get(theirs) is not None}
    except (ValueError, AttributeError) as error:
        raise BadData(f"{path} is broken ({error}). Fetch it again.") from None
    if not found.get("sample"):
        found = {name: value for name, value in found.items() if name not in ("sample", "top_p", "temperature")}
    if found.get("num_beams", 1) == 1:
        found.pop("length_penalty", None)
    return found


def _extra_settings(folder: Path) -> dict[str, Any]:
    if not (folder / EXTRAS).is_file():
        return {}
    with _open(folder / EXTRAS) as file:
        try:
            told = json.loads((file.metadata() or {})["settings"])
            made = {name: told[name] for name in EXTRA_SETTINGS}
            return made | {"prompts": Prompts(**made["prompts"])}
        except (ValueError, KeyError, TypeError) as error:
            raise BadData(f"{folder / EXTRAS} is broken ({error!r}). Write the folder again.") from None


def read_part(folder: Path, settings: ModelSettings, dtype: torch.dtype | None = torch.float32) -> dict[str, Tensor]:
    """The bridge's weights by our names; what the folder does not hold is not there.

    Args:
        folder: in Hugging Face's layout.
        settings: as `read_settings` gave them.
        dtype: of the weights; None: each as it is stored.

    Raises:
        Untrusted: weights as pickles, or a safetensors file whose header lies.
        MissingFile: no weights.
    """
    way, weights = Names(_format(settings), "blip2"), {}
    for name, read in _stored(folder):
        ours = way.translate(name)
        if ours is not None:
            weights[ours] = read(name)
    if (folder / EXTRAS).is_file():
        with _open(folder / EXTRAS) as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    return weights if dtype is None else {name: tensor.to(dtype) for name, tensor in weights.items()}


def stored_sizes(folder: Path, settings: ModelSettings) -> tuple[int, int]:
    """Parameters and bytes of the bridge as stored; the files are mapped, not read."""
    way = Names(_format(settings), "blip2")
    tensors = [read(name) for name, read in _stored(folder) if way.translate(name) is not None]
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def _format(settings: ModelSettings) -> Format:
    return "hf-instruct" if settings.instruction_aware else "hf"


def lacks(model: nn.Module, state: Mapping[str, Tensor]) -> set[str]:
    """Names of a model's weights that a checkpoint from Hugging Face never has: ITC's temperature and ITG's head.

    Empty for a model of stage 2, and where `state` has any of them.
    """
    if not isinstance(model, Blip2Stage1):
        return set()
    names = {"temperature", *(f"lm_head.{name}" for name, _ in model.lm_head.named_parameters())}
    return set() if names & state.keys() else names


def start_untrained(model: nn.Module, names: Collection[str]) -> None:
    """Gives the weights that `lacks` names, if they are among `names`, the values training starts from."""
    if not isinstance(model, Blip2Stage1) or "temperature" not in names:
        return
    with torch.no_grad():
        model.temperature.fill_(INITIAL_TEMPERATURE)
        model.lm_head.bias.zero_()
        model.lm_head.LayerNorm.reset_parameters()
    initialise(model.lm_head, model.config)


def tokenizer_folder(folder: Path) -> Path:
    """Where the Q-Former's tokenizer lies."""
    own = folder / QFORMER_TOKENIZER
    return own if own.is_dir() else folder


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise Untrusted(f"{path} is no whole safetensors file ({error}). Write the folder again.") from None


def _stored(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names of all weights, each with what reads it; a file is mapped, not copied."""
    require_safetensors(folder)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                yield name, file.get_tensor


def _part(config: Any, folder: Path) -> str:
    """Which of our parts the architecture has."""
    named = (config.architectures or [""])[0]
    if named in ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration", "Blip2Model"):
        return "generation"
    if named == "Blip2ForImageTextRetrieval":
        return "stage1"
    known = "Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, InstructBlipForConditionalGeneration"
    raise UnknownModel(f"{folder} is a {named or 'model of no named architecture'}. These are read: {known}.")


def _qformer_config(config: Any) -> QFormerConfig:
    qformer = config.qformer_config
    if qformer.hidden_act != "gelu":
        raise UnknownModel(f"A Q-Former with {qformer.hidden_act} is not known; all published ones have gelu.")
    return QFormerConfig(
        vocab_size=qformer.vocab_size,
        hidden_size=qformer.hidden_size,
        num_hidden_layers=qformer.num_hidden_layers,
        num_attention_heads=qformer.num_attention_heads,
        intermediate_size=qformer.intermediate_size,
        encoder_hidden_size=config.vision_config.hidden_size,
        encoder_layer_norm_eps=config.vision_config.layer_norm_eps,
        cross_attention_frequency=qformer.cross_attention_frequency,
        num_query_tokens=config.num_query_tokens,
        max_position_embeddings=qformer.max_position_embeddings,
        layer_norm_eps=qformer.layer_norm_eps,
        hidden_dropout_prob=qformer.hidden_dropout_prob,
        attention_probs_dropout_prob=qformer.attention_probs_dropout_prob,
        initializer_range=qformer.initializer_range,
        embed_dim=getattr(config, "image_text_hidden_size", 256),
    )


def _image_settings(folder: Path) -> dict[str, Any]:
    """Size and normalisation: in a file of their own, or, since transformers 5, within the processor's."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                return values.get("image_processor", values)
            except (ValueError, AttributeError) as error:
                raise BadData(f"{path} is broken ({error}). Fetch it again.") from None
    return {}


def _three(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue
