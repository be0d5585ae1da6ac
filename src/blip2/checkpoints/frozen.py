"""Loads the frozen parts by name: image encoders, language models, and the BERT weights a Q-Former starts from.

A name is one of ours (in VISION, LANGUAGE or TEXT_INIT of `checkpoints.packaged`: no hub needed), a Hugging Face
folder, or a model's name on the hub. Weights are read from safetensors only and no code of a model's folder is ever
run; what transformers itself does not know is refused. A folder may hold a quantised part (`checkpoints.quantized`).
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from blip2.checkpoints import quantized
from blip2.checkpoints.packaged import LANGUAGE, TEXT_INIT, VISION, quiet
from blip2.checkpoints.trust import check_configuration
from blip2.errors import BadData, MissingFile, UnknownModel, Untrusted
from blip2.model.vision import HuggingFaceConvNext, HuggingFaceVision, ImageEncoder, encoder_layers

# A config's model_type -> the tower in it; a whole CLIP, SigLIP or BLIP-2 gives its vision half.
VISION_CLASSES = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "blip-2": "Blip2VisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
    "instructblip": "InstructBlipVisionModel",
    "instructblip_vision_model": "InstructBlipVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
    "convnext": "ConvNextModel",
    "convnextv2": "ConvNextV2Model",
}
CONVOLUTIONAL = ("convnext", "convnextv2")
BLIP2_TYPES = ("blip-2", "instructblip")  # hold an LLM within
# What from_pretrained must be told besides.
_OF_VISION, _OF_LANGUAGE = {r"^vision_model\.": ""}, {r"^language_model\.": ""}
LOADING_ARGUMENTS = {
    "blip-2": {"key_mapping": _OF_VISION},  # transformers finds the vision half of CLIP and SigLIP unasked
    "instructblip": {"key_mapping": _OF_VISION},
    "vit": {"add_pooling_layer": False},  # few checkpoints hold ViT's pooler, and we use none
}
# What is fetched of a hub model: never a pickle, never a script.
HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


class TextInit(NamedTuple):
    """What a Q-Former takes over from a BERT.

    Attributes:
        state_dict: float32, by BERT's names without the "bert." in front; a masked-LM head is kept under "cls.".
        tokenizer_file: tokenizer.json, or vocab.txt where there is none.
        config: its sizes.
    """

    state_dict: dict[str, Tensor]
    tokenizer_file: Path
    config: BertConfig


def load_vision(
    name_or_path: str,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    image_size: int | None = None,
    drop_last_layer: bool | None = None,
) -> ImageEncoder:
    """The frozen image encoder of that name.

    Args:
        name_or_path: a name in VISION, a Hugging Face folder or a hub name (CLIP, BLIP-2's EVA, SigLIP, DINOv2,
            ViT, ConvNeXt).
        dtype: of its weights and its features; "auto": as they are stored.
        image_size: side of the pictures it will be given; None: as it was trained (EfficientNet-Lite2: 256).
        drop_last_layer: of a Hugging Face tower; None: as the paper does.

    Raises:
        UnknownModel: neither a known name, nor a folder, nor to be had from the hub; or no vision tower we can read.
        Untrusted: its weights are pickles.
    """
    if name_or_path not in VISION:
        return _hugging_face_vision(name_or_path, dtype, image_size=image_size, drop_last_layer=drop_last_layer)
    if drop_last_layer is not None:
        raise UnknownModel(f"{name_or_path} has no transformer layer to drop. Leave drop_last_layer out.")
    return VISION[name_or_path](torch.float32 if dtype == "auto" else dtype, image_size)


def load_language(
    name_or_path: str,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    *,
    device_map: str | dict[str, int | str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen language model of that name and its tokenizer.

    Args:
        name_or_path: a name in LANGUAGE, a Hugging Face folder or a hub name, of a decoder or an encoder-decoder; of
            BLIP-2 or InstructBLIP it is the language model within.
        dtype: of its weights; "auto": as they are stored.
        device_map: spreads it over several places, as accelerate does.

    Returns:
        The model, in evaluation mode and without gradient to its weights, and its tokenizer.

    Raises:
        UnknownModel: neither a known name, nor a folder, nor to be had from the hub.
        Untrusted: its weights are pickles, or it needs code of its own.
    """
    folder = _language_folder(name_or_path)
    config = read_config(folder, name_or_path)
    arguments: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if config.model_type in BLIP2_TYPES:  # the language model within it
        config = config.text_config
        arguments |= {"config": config, "key_mapping": _OF_LANGUAGE}
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if quantized.is_quantized(folder):
        model = quantized.load(lambda: auto_class.from_config(config), folder, dtype)
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    else:
        model = _from_pretrained(auto_class, folder, dtype, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return model, tokenizer


def language_config(name_or_path: str) -> Any:
    """The configuration of a language model; arguments and errors as in `load_language`."""
    config = read_config(_language_folder(name_or_path), name_or_path)
    return config.text_config if config.model_type in BLIP2_TYPES else config


def language_width(name_or_path: str) -> int:
    """Dl, the width of a language model's embeddings; its weights are not read."""
    config = language_config(name_or_path)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return auto_class.from_config(config).get_input_embeddings().embedding_dim


def _language_folder(name_or_path: str) -> Path:
    return LANGUAGE[name_or_path]() if name_or_path in LANGUAGE else _local_folder(name_or_path, LANGUAGE)


def save_tower(vision: HuggingFaceVision | HuggingFaceConvNext, folder: Path) -> None:
    """Writes an image encoder that was trained, as a folder that `load_vision` reads; a dropped layer stays dropped."""
    config: Any = vision.network.config
    if isinstance(vision, HuggingFaceVision):
        config.num_hidden_layers = len(encoder_layers(vision.network))
        config.blip2_last_layer_is_dropped = True
    tower: Any = vision.network
    tower.save_pretrained(folder)
    normalisation = {"image_mean": list(vision.image_mean), "image_std": list(vision.image_std)}
    (folder / "preprocessor_config.json").write_text(json.dumps(normalisation) + "\n", encoding="utf-8")


def load_text_init(name_or_path: str) -> TextInit:
    """The BERT weights a Q-Former starts from, with tokenizer and sizes.

    Args:
        name_or_path: a name in TEXT_INIT, a Hugging Face folder or a hub name of a BERT ("bert-base-uncased").

    Raises:
        UnknownModel: neither a known name, nor a folder, nor to be had from the hub; or no BERT.
        Untrusted: its weights are pickles.
    """
    folder = text_init_folder(name_or_path)
    config = read_config(folder, name_or_path)
    if not isinstance(config, BertConfig):
        raise UnknownModel(f"{name_or_path} is a {config.model_type}, and a Q-Former can start from a BERT only.")
    require_safetensors(folder)
    weights = load_file(folder / "model.safetensors")
    state_dict = {_bert_name(name): tensor.float() for name, tensor in weights.items() if "position_ids" not in name}
    tokenizer_files = [folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]
    if not tokenizer_files:
        raise MissingFile(f"{folder} has neither tokenizer.json nor vocab.txt. Add the one that belongs to the model.")
    return TextInit(state_dict, tokenizer_files[0], config)


def text_init_folder(name_or_path: str) -> Path:
    """The folder of a text initialisation, in Hugging Face's layout; arguments and errors as in `load_text_init`."""
    return TEXT_INIT[name_or_path]() if name_or_path in TEXT_INIT else _local_folder(name_or_path, TEXT_INIT)


def fingerprint(module: nn.Module) -> str:
    """sha256 (hex) of a module's weights and buffers: of their names, dtypes, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _hugging_face_vision(
    name: str, dtype: torch.dtype | Literal["auto"], *, image_size: int | None, drop_last_layer: bool | None
) -> ImageEncoder:
    folder = _local_folder(name, VISION)
    config = read_config(folder, name)
    model_type = config.model_type
    if model_type not in VISION_CLASSES:
        raise UnknownModel(f"{name} is a {model_type}, no vision tower we can read: {', '.join(VISION_CLASSES)}.")
    tower_class = getattr(transformers, VISION_CLASSES[model_type])
    if quantized.is_quantized(folder):  # without the layer that is dropped
        made = {name: value for name, value in LOADING_ARGUMENTS.get(model_type, {}).items() if name != "key_mapping"}
        tower = quantized.load(lambda: tower_class(config, **made), folder, dtype, is_vision=True)
        drop_last_layer = None if model_type in CONVOLUTIONAL else False
    else:
        if getattr(config, "blip2_last_layer_is_dropped", False):  # as `save_tower` wrote it
            drop_last_layer = False
        tower = _from_pretrained(tower_class, folder, dtype, **LOADING_ARGUMENTS.get(model_type, {}))
    preprocessor = folder / "preprocessor_config.json"
    normalisation = json.loads(preprocessor.read_text()) if preprocessor.is_file() else {}
    found: dict[str, Any] = {
        "image_size": image_size,
        "image_mean": tuple(normalisation.get("image_mean") or ()) or None,
        "image_std": tuple(normalisation.get("image_std") or ()) or None,
    }
    if model_type not in CONVOLUTIONAL:
        return HuggingFaceVision(tower, name=name, drop_last_layer=drop_last_layer, **found)
    if drop_last_layer is not None:
        raise UnknownModel(f"{name} has no transformer layer to drop. Leave drop_last_layer out.")
    return HuggingFaceConvNext(tower, name=name, **found)


def _local_folder(name: str, known: dict[str, Any]) -> Path:
    """The folder itself, or the hub's model of that name brought into its cache."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    unknown = f"{name!r} is neither one of {', '.join(known)}, nor a folder"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UnknownModel(f"{unknown}. Check the spelling of the name or path.")
    if "/" not in name and (meant := difflib.get_close_matches(name, known, n=1, cutoff=0.7)):
        raise UnknownModel(f"{unknown}. Did you mean {meant[0]}?")  # before half a minute of trying an absent network
    return hub_folder(name, unknown)


def hub_folder(name: str, unknown: str) -> Path:
    """A model of the Hugging Face hub in the hub's own cache, fetched if it is not there; offline, from the cache.

    Args:
        name: "owner/model", or a model's name alone for the old ones.
        unknown: what the name is not, as the beginning of the error.

    Raises:
        UnknownModel: the hub has no such model, or was not to be reached.
    """
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UnknownModel(
            f"{unknown}, nor a model that the Hugging Face hub gave ({type(error).__name__}). Check the name and the "
            "network; a model downloaded elsewhere can be given as a folder."
        ) from error


def read_config(folder: Path, name: str) -> Any:
    """The configuration in a Hugging Face folder.

    Raises:
        UnknownModel: there is none, or transformers does not know the model.
        Untrusted: it needs code of its own.
    """
    path = folder / "config.json"
    check_configuration(folder, refuse_own_code=False)
    if not path.is_file():
        raise UnknownModel(f"{folder} has no config.json, so it is no Hugging Face model. Check the path of {name!r}.")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "auto_map" in json.loads(path.read_text()):
            raise Untrusted(
                f"{name} needs Python code from its own folder, which is never run. Use a model that transformers "
                f"{transformers.__version__} knows by itself."
            ) from error
        raise UnknownModel(f"transformers {transformers.__version__} does not know the model in {folder}.") from error


def require_safetensors(folder: Path) -> None:
    """Whether a folder's weights are whole safetensors files.

    Raises:
        Untrusted: they are pickles only, or the header of a file does not fit what follows it.
        MissingFile: there are none.
    """
    found = sorted(folder.glob("*.safetensors"))
    for path in found:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise Untrusted(f"{path} is no whole safetensors file ({error}). Fetch it again.") from None
    if found:
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise Untrusted(
            f"{folder} has its weights as pickles only, which can run code when read. Save them as safetensors where "
            "you trust them: model.save_pretrained(folder)."
        )
    raise MissingFile(f"{folder} has no weights: no .safetensors file is in it. Download the whole model.")


def _from_pretrained(model_class: Any, folder: Path, dtype: torch.dtype | Literal["auto"], **arguments: Any) -> Any:
    """The model with every weight from the folder, frozen; one that would be left random is an error."""
    require_safetensors(folder)
    with quiet():
        try:
            model, info = model_class.from_pretrained(
                folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **arguments
            )
        except RuntimeError as error:  # a weight of another shape than the configuration's
            raise BadData(f"{folder} does not fit its own config.json: {str(error).splitlines()[-1].strip()}") from None
    if missing := sorted(info["missing_keys"]):
        raise BadData(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, the first is {missing[0]}.")
    return model.requires_grad_(False).eval()


def _bert_name(name: str) -> str:
    # Old checkpoints, bert-base-uncased among them, name the norms' weights as TensorFlow did.
    name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
    return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name).removeprefix("bert.")
