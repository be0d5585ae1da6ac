"""The frozen parts that recipes name, in their published shapes and without weights: nothing is fetched for them.

    name, folder -> configuration -> module on the "meta" device, which has shapes and dtypes but no memory

A name that is neither listed here, nor a folder, nor in the hub's cache is refused: its shape is not known.
"""

import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    Blip2VisionConfig,
    CLIPVisionConfig,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    T5Config,
)

from blip2.checkpoints import frozen
from blip2.errors import UnknownModel
from blip2.model.efficientnet import EfficientNetLite, EfficientNetTokens
from blip2.model.language import DecoderLM, EncoderDecoderLM, LanguageModel
from blip2.model.marian_ssru import MarianSsruConfig
from blip2.model.vision import HuggingFaceConvNext, HuggingFaceVision, ImageEncoder

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
EVA = "Salesforce/blip2-opt-2.7b"  # the name under which recipes ask for EVA-CLIP's ViT-g/14

# EVA-CLIP's ViT-g/14 as BLIP-2's checkpoints hold it: 39 of its 40 layers.
_VIT_G: dict[str, Any] = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "qkv_bias": True,
}
_VIT_L: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
}
_OPT_2_7B: dict[str, Any] = {
    "hidden_size": 2560,
    "word_embed_proj_dim": 2560,
    "ffn_dim": 10_240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50_272,
}
_OPT_6_7B = _OPT_2_7B | {"hidden_size": 4096, "word_embed_proj_dim": 4096, "ffn_dim": 16_384}
_FLAN_T5_XL: dict[str, Any] = {
    "d_model": 2048,
    "d_kv": 64,
    "num_heads": 32,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 32_128,
    "decoder_start_token_id": 0,
}
_FLAN_T5_XXL = _FLAN_T5_XL | {"d_model": 4096, "num_heads": 64, "d_ff": 10_240}
_VICUNA_7B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49_152,
    "tie_word_embeddings": True,
}
_GEMMA_3_270M: dict[str, Any] = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262_144,
    "tie_word_embeddings": True,
}

VISION: dict[str, tuple[Any, dict[str, Any]]] = {
    "openai/clip-vit-large-patch14": (CLIPVisionConfig, _VIT_L),
    "openai/clip-vit-large-patch14-336": (CLIPVisionConfig, _VIT_L | {"image_size": 336}),
    EVA: (Blip2VisionConfig, _VIT_G),
    "Salesforce/blip2-opt-6.7b": (Blip2VisionConfig, _VIT_G),
    "Salesforce/blip2-flan-t5-xl": (Blip2VisionConfig, _VIT_G),
    "Salesforce/blip2-flan-t5-xxl": (Blip2VisionConfig, _VIT_G),
    "Salesforce/blip2-itm-vit-g": (Blip2VisionConfig, _VIT_G),
    "Salesforce/blip2-opt-2.7b-coco": (Blip2VisionConfig, _VIT_G | {"image_size": 364}),
    "Salesforce/blip2-itm-vit-g-coco": (Blip2VisionConfig, _VIT_G | {"image_size": 364}),
}
LANGUAGE: dict[str, tuple[Any, dict[str, Any]]] = {
    "facebook/opt-2.7b": (OPTConfig, _OPT_2_7B),
    "facebook/opt-6.7b": (OPTConfig, _OPT_6_7B),
    "google/flan-t5-xl": (T5Config, _FLAN_T5_XL),
    "google/flan-t5-xxl": (T5Config, _FLAN_T5_XXL),
    "Salesforce/blip2-opt-2.7b": (OPTConfig, _OPT_2_7B),
    "Salesforce/blip2-opt-6.7b": (OPTConfig, _OPT_6_7B),
    "Salesforce/blip2-flan-t5-xl": (T5Config, _FLAN_T5_XL),
    "Salesforce/blip2-flan-t5-xxl": (T5Config, _FLAN_T5_XXL),
    "lmsys/vicuna-7b-v1.1": (LlamaConfig, _VICUNA_7B),
    "lmsys/vicuna-7b-v1.5": (LlamaConfig, _VICUNA_7B),
    "lmsys/vicuna-13b-v1.1": (LlamaConfig, _VICUNA_13B),
    "lmsys/vicuna-13b-v1.5": (LlamaConfig, _VICUNA_13B),
    "smollm2-135m-instruct": (LlamaConfig, _SMOLLM2),
    "gemma-3-270m": (Gemma3TextConfig, _GEMMA_3_270M),
    "marian-tiny-pt-en": (MarianSsruConfig, {}),
    "marian-tiny-en-pt": (MarianSsruConfig, {}),
}
TEXT_INIT: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert-base-uncased": (BertConfig, {}),
    "minilm-l6-v2": (BertConfig, {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
}


def image_encoder(name: str) -> ImageEncoder:
    """The frozen image encoder of that name on the meta device, in float32, less the layer the paper drops.

    Raises:
        UnknownModel: the shape is not known, or it is no vision tower we can read.
    """
    with torch.device("meta"):
        if name == "efficientnet-lite2":
            network = EfficientNetLite(2)
            network.fold_batch_norms()
            return EfficientNetTokens(network, name=name)
        config = _configuration(name, VISION, also=("efficientnet-lite2",))
        model_type = config.model_type
        if model_type not in frozen.VISION_CLASSES:
            known = ", ".join(frozen.VISION_CLASSES)
            raise UnknownModel(f"{name} is a {model_type}, no vision tower we can read: {known}.")
        half = getattr(config, "vision_config", config)  # of a whole CLIP, SigLIP or BLIP-2
        loading = frozen.LOADING_ARGUMENTS.get(model_type, {})
        arguments = {key: value for key, value in loading.items() if key != "key_mapping"}
        tower: nn.Module = getattr(transformers, frozen.VISION_CLASSES[model_type])(half, **arguments)
        wrap = HuggingFaceConvNext if model_type in frozen.CONVOLUTIONAL else HuggingFaceVision
        return wrap(tower, name=name)


def language_model(name: str, dtype: torch.dtype) -> LanguageModel:
    """The frozen LLM of that name on the meta device, behind the common interface, with eager attention as in training.

    Raises:
        UnknownModel: the shape is not known.
    """
    config = _configuration(name, LANGUAGE)
    config = config.text_config if config.model_type in frozen.BLIP2_TYPES else config
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        network: Any = auto_class.from_config(config).to(dtype)
    if getattr(config, "scale_decoder_outputs", True) is False:
        # T5 1.1 and FlanT5 have a matrix of their own before the logits: transformers 5 learns that from the weights
        network.lm_head.weight = nn.Parameter(torch.empty_like(network.lm_head.weight), requires_grad=False)
    if hasattr(network, "set_attn_implementation"):
        network.set_attn_implementation("eager")
    wrap = EncoderDecoderLM if config.is_encoder_decoder else DecoderLM
    return wrap(network, stop_ids=[], pad_id=0)


def text_init_config(name: str) -> BertConfig:
    """The sizes of the BERT that a Q-Former starts from.

    Raises:
        UnknownModel: the shape is not known, or it is no BERT.
    """
    config = _configuration(name, TEXT_INIT)
    if not isinstance(config, BertConfig):
        raise UnknownModel(f"{name} is a {config.model_type}, and a Q-Former can start from a BERT only.")
    return config


def _configuration(name: str, known: dict[str, tuple[Any, dict[str, Any]]], also: tuple[str, ...] = ()) -> Any:
    """Published, in a folder, or in the hub's cache; never fetched."""
    if name in known:
        config_class, sizes = known[name]
        return config_class(**sizes)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return frozen.read_config(folder, name)
    is_on_hub = HUB_NAME.fullmatch(name) is not None
    cached = try_to_load_from_cache(name, "config.json") if is_on_hub else None
    if isinstance(cached, str):
        return frozen.read_config(Path(cached).parent, name)
    raise UnknownModel(
        f"A plan fetches nothing, and the shape of {name!r} is not known here. Known: "
        f"{', '.join(sorted([*known, *also]))}. Any other can be given as a folder with its config.json."
    )
