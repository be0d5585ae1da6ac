"""Recipe -> job: the only file that sees the model, the data, the frozen parts and the objectives at once."""

import copy
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blip2 import paths
from blip2.checkpoints import frozen, huggingface, lavis, native
from blip2.data.features import CacheKey, FeatureCache, open_or_build
from blip2.data.neighbours import Neighbours
from blip2.data.sample import Sample
from blip2.data.shards import open_split, pictures_sha256
from blip2.errors import BadRecipe, MissingFile
from blip2.inference.loading import wrap_language_model
from blip2.model.config import QFormerConfig
from blip2.model.language import LanguageModel
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.model.stage2 import Blip2Stage2
from blip2.model.vision import ImageEncoder
from blip2.preprocessing.images import ImageTransform, load_image
from blip2.preprocessing.prompts import CAPTION_INSTRUCTION, CAPTION_PROMPT, QUESTION_PROMPT
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer
from blip2.preprocessing.vary import VIEWS, vary
from blip2.training import state
from blip2.training.batches import (
    InstructBatches,
    ItemReader,
    PromptTexts,
    Source,
    Stage1Batches,
    Stage2Batches,
    as_text,
    group_name,
)
from blip2.training.compiled import compile_layers
from blip2.training.instruct import InstructStep, list_answers
from blip2.training.loop import Job, resolve_precision
from blip2.training.memory import keep_freed_memory
from blip2.training.recipe import MixtureItem, Recipe, TrainingSection
from blip2.training.stage1 import Sentences, Stage1Step
from blip2.training.stage2 import Stage2Step
from blip2.training.validation import answers_right, retrieval_found

PROMPTS = PromptTexts(caption=CAPTION_PROMPT, caption_instruction=CAPTION_INSTRUCTION, question=QUESTION_PROMPT)
VALIDATION_QUESTIONS = 256
LISTED_SEED = 1_000_003  # added to a run's seed, so that classified samples are others than those the LLM answers
ENCODE_TEXTS = 128  # texts at once
ENCODE = 8  # pictures at once: convolutions stay in the processor's cache (77 images/s against 37 at 64, 2 cores)


def build(recipe: Recipe, run_dir: Path) -> Job:
    """Everything a run needs, ready for `loop.train`.

    Args:
        recipe: the settings.
        run_dir: the run's folder; what the bridge started from is noted there.

    Raises:
        BadRecipe: settings that contradict each other.
        BadData, MissingFile, UnknownModel, DownloadFailed: something named in the recipe cannot be had.
    """
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    parts = _frozen_parts(recipe)
    sources = [_source(recipe, item, parts) for item in recipe.data.mixture]
    reader = ItemReader(sources, recipe.data, recipe.seed)
    return _stage1_job(recipe, parts, reader) if recipe.stage == "stage1" else _stage2_job(recipe, parts, reader)


# Frozen parts


@dataclass(frozen=True)
class FrozenParts:
    """What a run takes ready and leaves unchanged."""

    vision: ImageEncoder
    vision_sha256: str
    text_init: frozen.TextInit
    qformer_tokenizer: QFormerTokenizer
    config: QFormerConfig


def _frozen_parts(recipe: Recipe) -> FrozenParts:
    vision = frozen.load_vision(recipe.model.vision, frozen_dtype(recipe))
    text_init = frozen.load_text_init(recipe.model.text_init)
    tokenizer = QFormerTokenizer(text_init.tokenizer_file)
    return FrozenParts(
        vision=vision,
        vision_sha256=frozen.fingerprint(vision),
        text_init=text_init,
        qformer_tokenizer=tokenizer,
        config=qformer_config(recipe, text_init, vision.width, tokenizer.vocab_size),
    )


def frozen_dtype(recipe: Recipe) -> torch.dtype:
    """Of the frozen parts: that of the matrix products."""
    precision = resolve_precision(recipe.training.precision, torch.device("cpu"))
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


# Data


def data_folder(name: str) -> Path:
    """The folder of a data set: a path, or a name under the data folder.

    Raises:
        MissingFile: there is none.
    """
    for folder in (Path(name), paths.data_dir() / name):
        if (folder / "manifest.json").is_file():
            return folder
    raise MissingFile(f"There is no data set {name}. Make the open one with: blip2 data build.")


def _source(recipe: Recipe, item: MixtureItem, parts: FrozenParts) -> Source:
    folder = data_folder(recipe.data.folder)
    samples = open_split(folder, item.split)
    texts = list(samples.described())
    questions = None
    if item.task == "question":
        found = [(i, question) for i, sample in enumerate(texts) for question in sample.questions]
        if not found:
            raise BadRecipe(f"data.mixture: the split {item.split} has no questions; give it the task caption.")
        questions = [(i, question) for i, question in found if not item.kinds or question.kind in item.kinds]
        if not questions:
            there = ", ".join(sorted({question.kind for _, question in found}))
            raise BadRecipe(f"data.mixture: no question of {item.split} is of a kind in kinds. It has: {there}.")
    features = split_features(folder, item.split, samples, parts, num_views=item.num_views, flip=item.flip)
    neighbours = None
    if recipe.data.neighbour_share and questions is None:
        neighbours = _neighbours([group_name(sample) for sample in texts], parts)
    return Source(texts, features, item.num_views, item.weight, questions, neighbours)


@torch.inference_mode()
def _neighbours(names: Sequence[str], parts: FrozenParts) -> Neighbours:
    """Whose texts are near each other for the text model that the Q-Former starts from."""
    text_model = Blip2Stage1(None, parts.config).eval()
    load_text_weights(text_model, parts.text_init.state_dict)
    distinct = sorted(set(names))
    pooled = [
        text_model.pool_texts(as_text(parts.qformer_tokenizer.encode(distinct[i : i + ENCODE_TEXTS])))
        for i in range(0, len(distinct), ENCODE_TEXTS)
    ]
    return Neighbours(names, distinct, nn.functional.normalize(torch.cat(pooled).float(), dim=-1).numpy())


def split_features(
    folder: Path, split: str, samples: Sequence[Sample], parts: FrozenParts, *, num_views: int = 1, flip: bool = False
) -> FeatureCache:
    """Image features of all views of a split, from the cache or made now."""
    vision = parts.vision
    transform = ImageTransform(vision.image_size, vision.image_mean, vision.image_std)

    def pixels(row: int) -> Tensor:
        index, view = divmod(row, num_views)
        image = load_image(samples[index].image, name=samples[index].id)
        if view == 0:
            return transform(image)
        generator = torch.Generator().manual_seed(row)
        return transform.augment(vary(image, generator, flip=flip), generator)

    def encode(rows: range) -> np.ndarray:
        pieces = [range(first, min(first + ENCODE, rows.stop)) for first in range(rows.start, rows.stop, ENCODE)]
        encoded = [vision(torch.stack([pixels(row) for row in piece])).to(torch.float16) for piece in pieces]
        return torch.cat(encoded).numpy()

    probe = vision(transform(load_image(samples[0].image))[None])
    key = CacheKey(
        encoder=parts.vision_sha256,
        pictures=pictures_sha256(folder, split),
        views=f"{num_views} views, flip {flip}, {VIEWS}" if num_views > 1 else f"plain, {vision.image_size} px",
        num_rows=len(samples) * num_views,
        shape=(probe.shape[1], probe.shape[2]),
    )
    return open_or_build(paths.home() / "features", key, encode, progress=_progress(f"image features of {split}"))


def _progress(what: str) -> Callable[[int, int], None]:
    begin = time.perf_counter()
    last = begin

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 10 or done == total:
            last = now
            print(f"{what}: {done:,} of {total:,}, {now - begin:.0f} s", file=sys.stderr)

    return report


# Stage 1


def _stage1_job(recipe: Recipe, parts: FrozenParts, reader: ItemReader) -> Job:
    model = Blip2Stage1(None, parts.config)
    load_text_weights(model, parts.text_init.state_dict)
    training = recipe.training
    sentence_model = _sentence_model(model) if training.sentence_weight else None
    start_from(model, recipe)
    if recipe.model.freeze_word_embeddings:
        model.embeddings.word_embeddings.requires_grad_(False)
    step = Stage1Step(
        model,
        bos_id=parts.qformer_tokenizer.dec_id,
        negatives=training.negatives,
        label_smoothing=training.label_smoothing,
        weights=(training.itc_weight, training.itm_weight, training.itg_weight),
        matched_share=training.matched_share,
        sentences=_sentences(sentence_model, training),
        min_temperature=training.min_temperature,
    )
    batches = Stage1Batches(reader, parts.qformer_tokenizer, recipe.data, training.micro_batch_size)
    folder = data_folder(recipe.data.folder)
    evaluators = []
    for split in recipe.data.validation:
        samples = open_split(folder, split)
        features = split_features(folder, split, samples, parts)
        evaluators.append((training.evaluate_every, _Retrieval(model, split, samples, features, parts)))
    return Job(module=step, batches=batches, evaluators=evaluators)


def _sentences(sentence_model: Blip2Stage1 | None, training: TrainingSection) -> Sentences | None:
    if sentence_model is None:
        return None
    text_weight = training.sentence_text_weight
    return Sentences(
        sentence_model, training.sentence_weight, training.sentence_weight if text_weight is None else text_weight
    )


def _sentence_model(model: Blip2Stage1) -> Blip2Stage1:
    """Lets ITC start in the sentence space of the text model, and keeps a frozen copy of that start.

    Raises:
        BadRecipe: ITC's features have another width than the text model's.
    """
    if model.config.embed_dim != model.config.hidden_size:
        raise BadRecipe(
            f"training.sentence_weight needs model.embed_dim: {model.config.hidden_size}, the width of text_init; "
            f"it is {model.config.embed_dim}."
        )
    with torch.no_grad():
        nn.init.eye_(model.text_projection.weight)
        nn.init.zeros_(model.text_projection.bias)
    return copy.deepcopy(model).requires_grad_(False)


@dataclass(frozen=True)
class _Retrieval:
    model: Blip2Stage1
    split: str
    samples: Sequence[Sample]
    features: FeatureCache
    parts: FrozenParts

    def __call__(self) -> dict[str, float]:
        found = retrieval_found(self.model, self.parts.qformer_tokenizer, self.samples, self.features)
        return {f"{self.split}/{name}": value for name, value in found.items()}


# Stage 2 and instruction tuning


def _stage2_job(recipe: Recipe, parts: FrozenParts, reader: ItemReader) -> Job:
    assert recipe.model.language is not None
    language_model, language_tokenizer = load_language_model(recipe.model.language, frozen_dtype(recipe))
    if hasattr(language_model.model, "set_attn_implementation"):
        language_model.model.set_attn_implementation("eager")  # the fused backward is 1.5 times slower on CPUs
    if recipe.training.compile:
        compile_layers(language_model.model)
    is_aware = recipe.model.instruction_aware
    model = Blip2Stage2(None, parts.config, language_model, instruction_aware=is_aware)
    load_text_weights(model, parts.text_init.state_dict)
    start_from(model, recipe)
    if is_aware and recipe.model.freeze_word_embeddings:
        model.embeddings.word_embeddings.requires_grad_(False)
    batches = Stage2Batches(
        reader,
        language_tokenizer,
        recipe.data,
        recipe.training.micro_batch_size,
        PROMPTS,
        instruction_tokenizer=parts.qformer_tokenizer if is_aware else None,
        splits_captions=recipe.stage == "stage2" and language_model.is_encoder_decoder,
    )
    folder = data_folder(recipe.data.folder)
    evaluators = []
    for split in recipe.data.validation:
        samples = open_split(folder, split)
        features = split_features(folder, split, samples, parts)
        evaluators.append((recipe.training.evaluate_every, _Answers(model, split, samples, features, batches)))
    if not recipe.training.answer_samples:
        return Job(module=Stage2Step(model), batches=batches, evaluators=evaluators)
    return Job(*_with_answers(recipe, model, batches), evaluators=evaluators)


def _with_answers(recipe: Recipe, model: Blip2Stage2, batches: Stage2Batches) -> tuple[InstructStep, InstructBatches]:
    """The step and the batches that also classify answers."""
    training = recipe.training
    sources = batches.reader.sources
    answers = list_answers(_count_answers(sources), training.num_answers)
    step = InstructStep(
        model, len(answers), answer_weight=training.answer_weight, label_smoothing=training.label_smoothing
    )
    reader = ItemReader(sources, recipe.data, recipe.seed + LISTED_SEED)
    return step, InstructBatches(batches, reader, training.answer_samples // training.accumulation, answers)


@dataclass(frozen=True)
class _Answers:
    model: Blip2Stage2
    split: str
    samples: Sequence[Sample]
    features: FeatureCache
    batches: Stage2Batches

    def __call__(self) -> dict[str, float]:
        measured = answers_right(self.model, self.batches, self.samples, self.features, VALIDATION_QUESTIONS)
        return {f"{self.split}/{name}": value for name, value in measured.items()}


def _count_answers(sources: Sequence[Source]) -> Counter[str]:
    counted: Counter[str] = Counter()
    for source in sources:
        if source.questions is None:
            counted.update(caption for sample in source.samples for caption in sample.captions)
        else:
            counted.update(question.answer for _, question in source.questions)
    return counted


# Starting weights


def start_from(model: nn.Module, recipe: Recipe) -> None:
    """Load the bridge named in model.init_from; parts that the two stages do not share keep their start.

    Raises:
        MissingFile: nothing there to start from.
        BadRecipe: weights of another shape.
    """
    if recipe.model.init_from is None:
        return
    weights = bridge_weights(recipe.model.init_from, "stage1" if recipe.stage == "stage1" else "generation")
    own = model.state_dict()
    shared = {name: tensor for name, tensor in weights.items() if name in own}
    for name, tensor in shared.items():
        if own[name].shape != tensor.shape:
            raise BadRecipe(
                f"model.init_from: {name} has shape {tuple(tensor.shape)} there, {tuple(own[name].shape)} here. "
                "Start from a bridge of the same encoder, text_init and queries."
            )
    if not any(name.startswith("qformer.") for name in shared):
        raise BadRecipe(f"model.init_from: {recipe.model.init_from} holds no Q-Former.")
    model.load_state_dict(shared, strict=False)


def bridge_weights(source: str, part: str = "stage1") -> dict[str, Tensor]:
    """Trained tensors, by our names.

    Args:
        source: a run (its newest checkpoint), a checkpoint folder, a safetensors file; a model folder, ours or Hugging
            Face's; a .pth of LAVIS.
        part: which to take of a model folder that has two.

    Raises:
        MissingFile: nothing is there.
        BadData, Untrusted: what is there cannot be read, or not safely.
    """
    path = run_folder(source)
    if path.suffix == ".pth":
        return lavis.read(path).weights
    if huggingface.is_checkpoint(path):
        return huggingface.read_part(path, huggingface.read_settings(path))
    if (path / native.SETTINGS_FILE).is_file():
        settings = native.read_settings(path)
        return native.load_part(path, settings, part if part in settings.parts else next(iter(settings.parts)))
    if not path.is_file():
        path = state.find_checkpoint(path) / state.MODEL
    if not path.is_file():
        raise MissingFile(f"model.init_from: there is no run, checkpoint or weights file {source}.")
    return {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}


def run_folder(source: str) -> Path:
    """The path itself, or the run of that name under the runs folder."""
    named = paths.runs_dir() / source
    return named if not Path(source).exists() and named.exists() else Path(source)
