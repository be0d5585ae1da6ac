"""A bridge with its frozen parts -> a folder in Hugging Face's layout, which transformers loads, processor and all.

The layout has one image encoder, BLIP-2's own (EVA's ViT as `Blip2VisionModel`), and neither ITC's temperature nor
ITG's head. These two, and the prompts, are kept in blip2/extras.safetensors, which `checkpoints.huggingface` reads and
everybody else leaves alone.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
)

from blip2.checkpoints import frozen, placing
from blip2.checkpoints.huggingface import CONFIG_FILE, EXTRA_SETTINGS, EXTRAS, QFORMER_TOKENIZER
from blip2.checkpoints.names import Names, check_pooling, unnamed
from blip2.checkpoints.native import ModelSettings
from blip2.errors import BadData, UnknownModel
from blip2.model.vision import ImageEncoder
from blip2.preprocessing.text import DEC_TOKEN

VISION_TOWERS = ("Blip2VisionModel", "InstructBlipVisionModel")
TOWER, POSITIONS = "vision_model.", "vision_model.embeddings.position_embedding"
SHARD = "4GB"
OWN_SUFFIXES = (".json", ".safetensors", ".txt", ".model", ".jinja")  # of files that such a folder may hold
OWN_FOLDERS = (str(EXTRAS.parent), QFORMER_TOKENIZER)


class _Language(NamedTuple):
    network: Any
    tokenizer: Any


def write(
    folder: Path,
    settings: ModelSettings,
    part: str,
    weights: Mapping[str, Tensor],
    *,
    qformer_tokenizer: Path | None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes the folder beside its place and renames it.

    Args:
        folder: where. Such a folder that is there is replaced; what it holds besides is kept.
        settings: of the bridge; its frozen parts are loaded by their names and stored with it.
        part: "stage1" or "generation".
        weights: the bridge's, by our names; stored as they are.
        qformer_tokenizer: folder of the Q-Former's tokenizer; None where it reads no text.
        dtype: of the frozen parts.

    Raises:
        UnknownModel: an image encoder or a way to compare that the layout has no place for; or a frozen part that is
            not to be had.
        UserError: something else than such a folder is there.
    """
    place = placing.checked_place(folder, CONFIG_FILE)
    if part == "stage1":
        check_pooling(settings.qformer, "Hugging Face's class knows max and cls only, and would give other numbers.")
    vision = frozen.load_vision(settings.vision.name, dtype, image_size=settings.image_size)
    if type(vision.network).__name__ not in VISION_TOWERS:
        raise UnknownModel(
            f"The bridge looks through {vision.name}, and Hugging Face's BLIP-2 holds one kind of image encoder only, "
            f"EVA's ({VISION_TOWERS[0]}). Such a bridge is used with blip2 itself: keep its model folder."
        )
    language = None
    if part == "generation":
        assert settings.language is not None, "a generating part names its language model"
        language = _Language(*frozen.load_language(settings.language.name, dtype))
    processor = _processor(settings, _bert_tokenizer(settings, part, qformer_tokenizer), language)
    with torch.device("meta"):
        model = _empty_model(settings, vision, language, processor)
    _fill(model, settings, vision, language, weights)
    if language is not None:
        _say_where_texts_end(model, settings, language)
    beside = placing.beside(place)
    try:
        model.save_pretrained(beside, max_shard_size=SHARD)
        processor.save_pretrained(beside)
        _write_extras(beside, settings, weights)
        placing.put(beside, place, lambda name: name.endswith(OWN_SUFFIXES) or name in OWN_FOLDERS)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _bert_tokenizer(settings: ModelSettings, part: str, folder: Path | None) -> Any:
    if part == "generation" and not settings.instruction_aware:
        return None
    if folder is None:
        raise BadData(f"The model {settings.name!r} names no text_init, so its Q-Former has no tokenizer.")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.bos_token != DEC_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DEC_TOKEN})
    return tokenizer


def _processor(settings: ModelSettings, bert: Any, language: _Language | None) -> Any:
    side = settings.image_size
    pictures = BlipImageProcessorPil(
        size={"height": side, "width": side}, image_mean=list(settings.image_mean), image_std=list(settings.image_std)
    )
    queries = settings.qformer.num_query_tokens
    if language is None:
        return Blip2Processor(pictures, bert)
    if settings.instruction_aware:
        return InstructBlipProcessor(pictures, language.tokenizer, bert, num_query_tokens=queries)
    return Blip2Processor(pictures, language.tokenizer, num_query_tokens=queries)


def _empty_model(settings: ModelSettings, vision: ImageEncoder, language: _Language | None, processor: Any) -> Any:
    """The transformers model without weights; built on the meta device."""
    network: Any = vision.network
    shape = settings.qformer
    asked = {
        name: getattr(shape, name)
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "encoder_hidden_size",
            "cross_attention_frequency",
            "max_position_embeddings",
            "layer_norm_eps",
            "hidden_dropout_prob",
            "attention_probs_dropout_prob",
            "initializer_range",
        )
    }
    tower = network.config.to_dict() | {"image_size": settings.image_size}
    if language is None:
        config = Blip2Config(
            vision_config=tower,
            qformer_config=Blip2QFormerConfig(**asked, use_qformer_text_input=True).to_dict(),
            num_query_tokens=shape.num_query_tokens,
            image_text_hidden_size=shape.embed_dim,
        )
        return Blip2ForImageTextRetrieval(config)
    text = language.network.config.to_dict()
    image_token = processor.tokenizer.convert_tokens_to_ids("<image>")
    text["vocab_size"] = max(text["vocab_size"], image_token + 1)
    shared = {"num_query_tokens": shape.num_query_tokens, "image_token_index": image_token}
    if settings.instruction_aware:
        qformer = InstructBlipQFormerConfig(**asked).to_dict()
        return InstructBlipForConditionalGeneration(
            InstructBlipConfig(vision_config=tower, qformer_config=qformer, text_config=text, **shared)
        )
    qformer = Blip2QFormerConfig(**asked, use_qformer_text_input=False).to_dict()
    return Blip2ForConditionalGeneration(
        Blip2Config(vision_config=tower, qformer_config=qformer, text_config=text, **shared)
    )


def _fill(
    model: Any,
    settings: ModelSettings,
    vision: ImageEncoder,
    language: _Language | None,
    weights: Mapping[str, Tensor],
) -> None:
    """Gives the model its weights: those of the tower and the LLM as they are, and the bridge's under their names."""
    state: dict[str, Tensor] = {f"{TOWER}{name}": tensor for name, tensor in vision.network.state_dict().items()}
    network: Any = vision.network
    if settings.image_size != network.config.image_size:  # positions for these pictures, once and for all
        positions = state[POSITIONS]
        side = settings.image_size
        state[POSITIONS] = network.embeddings.interpolate_pos_encoding(positions, side, side).contiguous()
    if language is not None:
        state |= {f"language_model.{name}": tensor for name, tensor in language.network.state_dict().items()}
    state |= Names("blip2", "hf-instruct" if settings.instruction_aware else "hf").rename(weights)
    longer: dict[int, Tensor] = {}  # by address: tied weights stay one
    for name, parameter in model.state_dict().items():
        if name in state and state[name].ndim and state[name].shape[0] < parameter.shape[0]:
            address = state[name].data_ptr()
            if address not in longer:
                longer[address] = _with_image_token(state[name], parameter.shape[0])
            state[name] = longer[address]
    # What is tied stays so through its memory; transformers' tie_weights would tie FlanT5's head too, which is its own.
    model.load_state_dict(state, strict=True, assign=True)


def _with_image_token(embeddings: Tensor, size: int) -> Tensor:
    """A vocabulary's rows and zeros for <image>, which the processor adds and no model ever reads."""
    return torch.cat([embeddings, embeddings.new_zeros(size - embeddings.shape[0], *embeddings.shape[1:])])


def _say_where_texts_end(model: Any, settings: ModelSettings, language: _Language) -> None:
    """What ends a text, as `wrap_language_model` has it; and <image> is never said."""
    model.generation_config = language.network.generation_config
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stops = {token for token in ends if token is not None} | {language.tokenizer.eos_token_id}
    if settings.stop:
        stops.add(language.tokenizer.encode(settings.stop, add_special_tokens=False)[-1])
    config.eos_token_id = sorted(stops) if len(stops) > 1 else stops.pop()
    config.suppress_tokens = [model.config.image_token_index]


def _write_extras(folder: Path, settings: ModelSettings, weights: Mapping[str, Tensor]) -> None:
    """What the layout has no place for."""
    names = unnamed(weights, "blip2", "hf-instruct" if settings.instruction_aware else "hf")
    told = {name: settings.to_dict()[name] for name in EXTRA_SETTINGS}
    path = folder / EXTRAS
    path.parent.mkdir()
    save_file({name: weights[name].contiguous() for name in names}, path, metadata={"settings": json.dumps(told)})
