"""What a run takes ready: the image encoder, the text model that the Q-Former starts from, and the LLM."""

from dataclasses import dataclass

import torch

from blip2.checkpoints import frozen
from blip2.errors import BadRecipe
from blip2.inference.loading import wrap_language_model
from blip2.model.config import QFormerConfig
from blip2.model.language import LanguageModel
from blip2.model.vision import HuggingFaceConvNext, HuggingFaceVision, ImageEncoder
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer
from blip2.training.devices import resolve_precision, run_device
from blip2.training.sections import Recipe


@dataclass(frozen=True)
class FrozenParts:
    """What a run takes ready and leaves unchanged, but for an encoder that it fine-tunes."""

    vision: ImageEncoder
    vision_sha256: str
    text_init: frozen.TextInit
    qformer_tokenizer: QFormerTokenizer
    config: QFormerConfig
    device: torch.device


def load_parts(recipe: Recipe) -> FrozenParts:
    """The parts that a recipe names but the LLM, the encoder on the device of the run.

    Raises:
        UnknownModel, Untrusted, DownloadFailed: a part that is not to be had.
        BadRecipe: a device that is not there.
    """
    device, section = run_device(recipe.training.device), recipe.model
    vision = frozen.load_vision(section.vision, frozen_dtype(recipe), image_size=section.image_size)
    text_init = frozen.load_text_init(section.text_init)
    tokenizer = QFormerTokenizer(text_init.tokenizer_file)
    sha256 = frozen.fingerprint(vision)
    vision.is_exact = recipe.data.exact_features
    if section.train_vision:
        if not isinstance(vision, HuggingFaceVision | HuggingFaceConvNext):
            raise BadRecipe(f"model.train_vision: {section.vision} cannot be trained; Hugging Face's towers can.")
        vision = vision.float()
        vision.unfreeze()
    return FrozenParts(
        vision=vision.to(device),
        vision_sha256=sha256,
        text_init=text_init,
        qformer_tokenizer=tokenizer,
        config=qformer_config(recipe, text_init, vision.width, tokenizer.vocab_size),
        device=device,
    )


def frozen_dtype(recipe: Recipe) -> torch.dtype:
    """Of the frozen parts: that of the matrix products."""
    precision = resolve_precision(recipe.training.precision, run_device(recipe.training.device))
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def qformer_config(recipe: Recipe, text_init: frozen.TextInit, vision_width: int, vocab_size: int) -> QFormerConfig:
    """The Q-Former's shape: that of the BERT it starts from, with the recipe's queries and heads."""
    section, bert = recipe.model, text_init.config
    return QFormerConfig(
        vocab_size=vocab_size,
        hidden_size=bert.hidden_size,
        num_hidden_layers=bert.num_hidden_layers,
        num_attention_heads=bert.num_attention_heads,
        intermediate_size=bert.intermediate_size,
        max_position_embeddings=bert.max_position_embeddings,
        encoder_hidden_size=vision_width,
        num_query_tokens=section.num_query_tokens,
        embed_dim=section.embed_dim,
        text_pooling=section.text_pooling,
        query_pooling=section.query_pooling,
        hidden_dropout_prob=section.dropout,
        attention_probs_dropout_prob=section.attention_dropout,
    )


def load_language_model(name: str, dtype: torch.dtype) -> tuple[LanguageModel, LanguageTokenizer]:
    """The frozen LLM behind the common interface, with its tokenizer."""
    network, hf_tokenizer = frozen.load_language(name, dtype)
    tokenizer = LanguageTokenizer(hf_tokenizer, prompt_padding="right" if network.config.is_encoder_decoder else "left")
    return wrap_language_model(network, tokenizer), tokenizer
