"""What one step of a recipe is made of: the modules without memory, their parameters, operations, and kept bytes.

Only the parts of a step are told here, of one sample; training/plan.py puts them on processors.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from blip2.errors import BadRecipe
from blip2.model.config import QFormerConfig
from blip2.model.language import LanguageModel
from blip2.model.stage1 import Blip2Stage1
from blip2.model.stage2 import Blip2Stage2
from blip2.model.vision import HuggingFaceVision, ImageEncoder
from blip2.training import shapes
from blip2.training.frozen_cost import ImageFeatures, PartCost, encoder_cost, image_features, language_cost
from blip2.training.lora import add_adapters
from blip2.training.qformer_cost import (
    BACKWARD,
    FLOAT32,
    Arithmetic,
    Pass,
    image_bytes,
    image_flops,
    pass_bytes,
    pass_flops,
    uncopied_weights,
    vocabulary_bytes,
    vocabulary_flops,
)
from blip2.training.recipe import Recipe

ITM_ROWS = 3  # (image, text), (negative image, text), (image, negative text)
LOGITS_BYTES = 12  # an element of the vocabulary's logits at their worst: log-softmax, its gradient, that of the logits
# Which part of the model a parameter counts as, by the beginning of its name.
PART_OF = {
    "vision_layernorm": "Q-Former",
    "embeddings": "Q-Former",
    "qformer": "Q-Former",
    "query_tokens": "Q-Former",
    "language_projection": "language projection",
    "language_model": "language model",
}


@dataclass(frozen=True)
class StepSettings:
    """What of a recipe a plan may be asked to change.

    Attributes:
        strategy: how a run lies on several processors: a copy on each, or in shards.
        activation_checkpointing: compute each layer again in the backward pass instead of keeping what it made.
        cache_features: image features come from a cache; else the encoder runs in every step.
        train_vision: the image encoder learns too.
        image_size: side of the pictures; None: as the encoder was trained.
        text_tokens: longest text of a batch; None: data.max_text_length.
        has_average: an exponential moving average of the trained weights is kept.
        itc_chunk: rows of ITC's similarities that are there at once; 0: all.
        compiles: the LLM's layers are compiled.
    """

    strategy: Literal["ddp", "fsdp"] = "ddp"
    activation_checkpointing: bool = False
    cache_features: bool = True
    train_vision: bool = False
    image_size: int | None = None
    text_tokens: int | None = None
    has_average: bool = False
    itc_chunk: int = 0
    compiles: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> "StepSettings":
        """A recipe's own."""
        model, training = recipe.model, recipe.training
        return cls(
            strategy=training.strategy,
            activation_checkpointing=training.activation_checkpointing,
            cache_features=recipe.data.cache_features,
            train_vision=model.train_vision,
            image_size=model.image_size,
            has_average=training.ema_decay > 0,
            itc_chunk=training.itc_chunk,
            compiles=training.compile,
        )


@dataclass(frozen=True)
class Lengths:
    """Tokens of a batch's longest texts: what the Q-Former reads; the LLM's prompt and target."""

    text: int
    prompt: int = 0
    target: int = 0


@dataclass(frozen=True)
class StepParts:
    """The modules of a step, on the meta device.

    Attributes:
        encoder: of images, in the dtype of its weights.
        image: the features that a step sees of a picture.
        image_size: side of the pictures.
        config: of the Q-Former.
        model: what is trained, without the encoder.
        language: the LLM within it.
        yardstick: parameters of the frozen copy that `training.sentence_weight` needs.
        classifier: parameters of the classifier of listed answers.
    """

    encoder: ImageEncoder
    image: ImageFeatures
    image_size: int
    config: QFormerConfig
    model: Blip2Stage1 | Blip2Stage2
    language: LanguageModel | None
    yardstick: int = 0
    classifier: int = 0


@dataclass(frozen=True)
class Parameters:
    """Of a part: how many stay as they are, how many learn."""

    name: str
    frozen: int
    trained: int


@dataclass(frozen=True)
class Work:
    """Operations of one sample in a part of the step."""

    name: str
    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Both ways."""
        return self.forward + self.backward


def step_parts(recipe: Recipe, settings: StepSettings, precision: str) -> StepParts:
    """The modules that a recipe names, without memory.

    Raises:
        BadRecipe: an encoder that cannot be trained.
        UnknownModel: a part whose shape is not known.
    """
    section = recipe.model
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    encoder = shapes.image_encoder(section.vision)
    if settings.train_vision and not isinstance(encoder, HuggingFaceVision):
        raise BadRecipe(f"model.train_vision: {section.vision} is no transformer, and only those can be trained.")
    encoder = encoder if settings.train_vision else encoder.to(dtype)
    image_size = settings.image_size or encoder.image_size
    seen = image_features(encoder, image_size)
    bert = shapes.text_init_config(section.text_init)
    config = QFormerConfig(
        vocab_size=bert.vocab_size + 1,
        hidden_size=bert.hidden_size,
        num_hidden_layers=bert.num_hidden_layers,
        num_attention_heads=bert.num_attention_heads,
        intermediate_size=bert.intermediate_size,
        max_position_embeddings=bert.max_position_embeddings,
        encoder_hidden_size=seen.width,
        num_query_tokens=section.num_query_tokens,
        embed_dim=section.embed_dim,
        text_pooling=section.text_pooling,
        query_pooling=section.query_pooling,
        hidden_dropout_prob=section.dropout,
        attention_probs_dropout_prob=section.attention_dropout,
    )
    kept = max(1, round(seen.num_tokens * recipe.data.image_token_share))
    shared = {"encoder": encoder, "image": ImageFeatures(kept, seen.width), "image_size": image_size, "config": config}
    if recipe.stage == "stage1":
        with torch.device("meta"):
            first = Blip2Stage1(None, config)
        yardstick = _count(first) if recipe.training.sentence_weight else 0
        if section.freeze_word_embeddings:
            first.embeddings.word_embeddings.requires_grad_(False)
        return StepParts(**shared, model=first, language=None, yardstick=yardstick)
    assert section.language is not None
    language = shapes.language_model(section.language, dtype)
    with torch.device("meta"):
        if section.lora_rank:
            add_adapters(language.model, section.lora_rank)
        second = Blip2Stage2(None, config, language, instruction_aware=section.instruction_aware)
    if section.instruction_aware and section.freeze_word_embeddings:
        second.embeddings.word_embeddings.requires_grad_(False)
    inputs = config.num_query_tokens * config.hidden_size
    classifier = (inputs + 1) * recipe.training.num_answers if recipe.training.answer_samples else 0
    return StepParts(**shared, model=second, language=language, classifier=classifier)


def lengths(recipe: Recipe, settings: StepSettings, language: LanguageModel | None) -> Lengths:
    """Longest texts of a batch: batches are padded to theirs, and in a batch of hundreds some text meets its limit."""
    text = settings.text_tokens or recipe.data.max_text_length
    if language is None:
        return Lengths(text)
    if recipe.splits_captions(is_encoder_decoder=language.is_encoder_decoder):
        return Lengths(text, prompt=math.ceil(text / 2), target=text)  # a caption's first half at most is its prefix
    kinds = []
    for item in recipe.data.mixture:
        if item.task == "caption":
            kinds.append((len(recipe.prompts.before_caption.split()) + 1, text))
        else:
            kinds.append((text + len(recipe.prompts.question.split()), min(text, recipe.data.max_answer_length)))
    target = max(answer for _, answer in kinds)
    if language.is_encoder_decoder:
        return Lengths(text, prompt=max(prompt for prompt, _ in kinds), target=target)
    return Lengths(text, prompt=max(sum(kind) for kind in kinds) - target, target=target)


# Parameters


def parameters(parts: StepParts, settings: StepSettings) -> list[Parameters]:
    """By part, in the order in which a picture meets them."""
    encoder = _count(parts.encoder)
    counted: dict[str, list[int]] = {
        "image encoder": [0, encoder] if settings.train_vision else [encoder, 0],
        "Q-Former": [0, 0],
    }
    for name, parameter in parts.model.named_parameters():
        part = PART_OF.get(name.partition(".")[0], "heads of ITC, ITM and ITG")
        counted.setdefault(part, [0, 0])[parameter.requires_grad] += parameter.numel()
    if parts.yardstick:
        counted["frozen sentence encoder"] = [parts.yardstick, 0]
    if parts.classifier:
        counted["classifier of answers"] = [0, parts.classifier]
    return [Parameters(name, *numbers) for name, numbers in counted.items()]


# Passes of the Q-Former


def passes(recipe: Recipe, parts: StepParts, length: Lengths) -> list[Pass]:
    """The Q-Former's passes for a sample, those with gradient."""
    queries, training = parts.config.num_query_tokens, recipe.training
    if recipe.stage == "stage1":
        wanted = [Pass("queries (ITC, ITG)", 1, queries=queries), Pass("texts (ITC)", 1, text=length.text)]
        if training.itm_weight:
            rows = ITM_ROWS * training.matched_share
            pairs = Pass("pairs (ITM)", rows, queries=queries, text=length.text, shares_images=True, ends_early=True)
            wanted.append(pairs)
        if training.itg_weight:
            wanted.append(Pass("captions (ITG)", 1, text=length.text, past=queries))
        return wanted
    text = length.text if recipe.model.instruction_aware else 0
    wanted = [Pass("queries with instruction" if text else "queries", 1, queries=queries, text=text)]
    if training.answer_samples:
        rows = training.answer_samples / training.batch_size
        wanted.append(Pass("classified answers", rows, queries=queries, text=length.text))
    return wanted


# Operations


def work(
    recipe: Recipe, parts: StepParts, length: Lengths, settings: StepSettings, found: "PartCosts", own: int, world: int
) -> list[Work]:
    """Operations of one sample.

    Args:
        recipe, parts, length, settings: what is trained.
        found: costs of the frozen parts.
        own: B, pairs of one processor.
        world: W, pairs that ITC compares.
    """
    config, image_tokens = parts.config, parts.image.num_tokens
    again = 1 if settings.activation_checkpointing else 0
    told = []
    if not settings.cache_features:
        encoder = found.encoder
        told.append(Work("image encoder", encoder.forward_flops, encoder.backward_flops + again * _learns(encoder)))
    classified = recipe.training.answer_samples / recipe.training.batch_size
    images = 1 + classified + _fetched_images(recipe, own, world)
    projected = images * image_flops(config, image_tokens)
    backward = BACKWARD * projected if settings.train_vision else projected  # a frozen encoder takes no gradient
    told.append(Work("keys and values of images", projected, backward))
    told += [_learning(one.name, pass_flops(one, config, image_tokens), again) for one in passes(recipe, parts, length)]
    if recipe.stage == "stage1":
        told += _stage1_heads(recipe, config, length, world)
    if found.language is not None:
        told.append(_learning("language projection", 2 * config.num_query_tokens * config.hidden_size * _width(parts)))
        language = found.language
        told.append(
            Work("language model", language.forward_flops, language.backward_flops + again * language.forward_flops)
        )
    if parts.classifier:
        told.append(_learning("classifier of answers", 2 * parts.classifier * classified))
    return told


def _fetched_images(recipe: Recipe, own: int, world: int) -> float:
    """Images of ITM's negatives that a processor of several is sent and projects, for each of its samples."""
    has_negatives = recipe.stage == "stage1" and recipe.training.itm_weight > 0 and world > own
    return recipe.training.matched_share if has_negatives else 0.0


def _learns(cost: PartCost) -> float:
    return cost.forward_flops if cost.backward_flops else 0


def _learning(name: str, forward: float, again: int = 0) -> Work:
    return Work(name, forward, (BACKWARD + again) * forward)


def _stage1_heads(recipe: Recipe, config: QFormerConfig, length: Lengths, world: int) -> list[Work]:
    queries, width, embed = config.num_query_tokens, config.hidden_size, config.embed_dim
    compared = queries if config.query_pooling == "max" else 1
    told = [_learning("projections (ITC)", 2 * (queries + 1) * width * embed)]
    once = 2 * world * compared * embed
    told.append(Work("similarities (ITC)", 3 * once, 2 * BACKWARD * once))  # each way, and how often they are right
    training, section = recipe.training, recipe.model
    if training.itm_weight:
        told.append(_learning("head (ITM)", ITM_ROWS * training.matched_share * queries * 2 * 2 * width))
    if training.itg_weight:
        forward = vocabulary_flops(config, length.text)
        frozen = 2 * (length.text - 1) * config.hidden_size * config.vocab_size if section.freeze_word_embeddings else 0
        told.append(Work("head (ITG)", forward, BACKWARD * forward - frozen))  # the words are ITG's last map
    if training.sentence_weight:
        frozen = pass_flops(Pass("sentences", 1, text=length.text), config, 0) + 2 * width * embed
        told.append(Work("frozen sentence encoder", frozen, 0))
    return told


# Kept bytes


@dataclass(frozen=True)
class PartCosts:
    """Of the encoder and of the LLM."""

    encoder: PartCost
    language: PartCost | None


def part_costs(parts: StepParts, length: Lengths, settings: StepSettings) -> PartCosts:
    """Runs the encoder and the LLM once on the meta device."""
    encoder = encoder_cost(parts.encoder, parts.image_size, is_trained=settings.train_vision)
    if parts.language is None:
        return PartCosts(encoder, None)
    visual = parts.config.num_query_tokens
    return PartCosts(encoder, language_cost(parts.language, visual=visual, prompt=length.prompt, target=length.target))


@dataclass(frozen=True)
class Kept:
    """Bytes at the beginning of the backward pass, where a step needs most.

    Attributes:
        activations: what autograd keeps, of one sample.
        logits: the vocabulary's logits and their gradients, of one sample.
        weight_copies: of the trained weights in bfloat16, of a step.
    """

    activations: float
    logits: float
    weight_copies: float


def kept(
    recipe: Recipe,
    parts: StepParts,
    length: Lengths,
    settings: StepSettings,
    found: PartCosts,
    arithmetic: Arithmetic,
    *,
    own: int,
    world: int,
) -> Kept:
    """What a step keeps of one sample, of `own` on each processor and `world` on all; `itc_bytes` is not in it."""
    config, image_tokens = parts.config, parts.image.num_tokens
    checkpointed = settings.activation_checkpointing
    classified = recipe.training.answer_samples / recipe.training.batch_size
    images = 1 + classified + _fetched_images(recipe, own, world)
    activations = images * image_bytes(config, image_tokens, arithmetic, is_trained=settings.train_vision)
    for one in passes(recipe, parts, length):
        activations += pass_bytes(one, config, image_tokens, arithmetic, checkpointed=checkpointed)
    logits = 0.0
    if recipe.stage == "stage1" and recipe.training.itg_weight:
        activations += vocabulary_bytes(config, length.text, arithmetic)
        logits = (length.text - 1) * config.vocab_size * LOGITS_BYTES
    if found.language is not None and parts.language is not None:
        language = found.language
        activations += language.checkpointed_bytes() if checkpointed else language.kept_bytes
        logits = length.target * parts.language.model.config.get_text_config().vocab_size * LOGITS_BYTES
    if settings.train_vision:
        activations += found.encoder.checkpointed_bytes() if checkpointed else found.encoder.kept_bytes
    copied = 0
    if arithmetic.casts:
        has_text = recipe.stage == "stage1" or recipe.model.instruction_aware
        copied = sum(part.trained for part in parameters(parts, settings))
        copied -= uncopied_weights(config, arithmetic, has_text=has_text, trains_vision=settings.train_vision)
    return Kept(activations, logits, copied * arithmetic.product)


def itc_bytes(config: QFormerConfig, own: int, world: int, chunk: int) -> float:
    """Of ITC: the features of all pairs, and how alike each query is with each text, both ways.

    Args:
        config: of the Q-Former.
        own: B, pairs of one processor.
        world: W, pairs of all.
        chunk: rows at once; 0: all.
    """
    compared = config.num_query_tokens if config.query_pooling == "max" else 1
    rows = min(own, chunk) if chunk else own
    return FLOAT32 * (2 * rows * world * compared + world * (compared + 1) * config.embed_dim)


def _width(parts: StepParts) -> int:
    return parts.language.width if parts.language is not None else 0


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
