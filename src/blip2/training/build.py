"""Recipe -> job: the only file that sees the model, the data, the frozen parts and the objectives at once."""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from blip2.data.faults import FaultLog
from blip2.distributed import first_goes_first, rank, world_size
from blip2.errors import BadRecipe
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.model.stage2 import Blip2Stage2
from blip2.training.batches import InstructBatches, ItemReader, Stage1Batches, Stage2Batches
from blip2.training.compiled import compile_layers
from blip2.training.devices import use_threads
from blip2.training.instruct import InstructStep, list_answers
from blip2.training.job import Job
from blip2.training.lora import add_adapters
from blip2.training.memory import keep_freed_memory
from blip2.training.parts import FrozenParts, frozen_dtype, load_language_model, load_parts
from blip2.training.recipe import check_ranks
from blip2.training.sections import Recipe, TrainingSection
from blip2.training.sharding import compute_activations_again, shard_frozen_parts
from blip2.training.sources import Opened, count_texts, held_out, make_source, open_validation, texts_sha256
from blip2.training.stage1 import Sentences, Stage1Step
from blip2.training.stage2 import Stage2Step
from blip2.training.starting import found_start, start_from
from blip2.training.validation import MEASURES, Answers, Retrieval

VALIDATION_QUESTIONS = 256
LISTED_SEED = 1_000_003  # added to a run's seed, so that classified samples are others than those the LLM answers


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
    use_threads(recipe.training.threads)
    torch.manual_seed(recipe.seed)
    check_ranks(recipe, world_size())
    if recipe.stage == "stage1" and recipe.training.micro_batch_size < 2:
        raise BadRecipe(
            "stage1 tells a pair apart from the others that are computed with it: training.batch_size must be at least "
            "twice training.accumulation."
        )
    with first_goes_first():  # it fetches what is not there yet
        parts = load_parts(recipe)
        if recipe.model.init_from is not None:
            found_start(recipe.model.init_from)
    longest = parts.config.max_position_embeddings
    if recipe.data.max_text_length > longest:
        raise BadRecipe(
            f"data.max_text_length is {recipe.data.max_text_length}, and the Q-Former reads {longest} tokens at most."
        )
    faults = FaultLog(
        run_dir / (f"faults-{rank()}.jsonl" if rank() else "faults.jsonl"), stop_share=recipe.data.stop_share
    )
    judged = [open_validation(recipe, entry) for entry in recipe.data.validation]
    _check_best_metric(recipe, [f"{one.name}/{measure}" for one in judged for measure in MEASURES[recipe.stage]])
    sources = [make_source(recipe, item, parts, faults) for item in recipe.data.mixture]
    reader = ItemReader(sources, recipe.data, recipe.seed)
    torch.manual_seed(recipe.seed)  # what data draws must not decide the bridge's start
    job = _stage1_job if recipe.stage == "stage1" else _stage2_job
    made = job(recipe, parts, reader, faults, judged)
    named = zip(recipe.data.mixture, sources, strict=True)
    made.texts = {item.name: texts_sha256(source.samples) for item, source in named}
    _check_best_metric(recipe, [name for _, evaluator in made.evaluators for name in getattr(evaluator, "gives", ())])
    return made


def _check_best_metric(recipe: Recipe, given: Sequence[str]) -> None:
    """Raises BadRecipe where no evaluation gives what the best checkpoint is to be chosen by."""
    wanted = recipe.training.best_metric
    if wanted is not None and wanted not in given:
        there = ", ".join(given) or "nothing, for data.validation is empty"
        raise BadRecipe(f"training.best_metric: evaluations give no {wanted}; they give {there}.")


# Stage 1


def _stage1_job(
    recipe: Recipe, parts: FrozenParts, reader: ItemReader, faults: FaultLog, judged: Sequence[Opened]
) -> Job:
    model = Blip2Stage1(_vision(recipe, parts), parts.config)
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
        itc_chunk=training.itc_chunk,
    )
    batches = Stage1Batches(reader, parts.qformer_tokenizer, recipe.data, training.micro_batch_size)
    held = [held_out(recipe, one, parts, faults) for one in judged]
    evaluators = [(training.evaluate_every, Retrieval(model, parts.qformer_tokenizer, each)) for each in held]
    return Job(
        module=_placed(recipe, step, parts),
        batches=batches,
        evaluators=evaluators,
        faults=faults,
        take_faults=reader.take_faults,
        workers=None if recipe.data.cache_features else recipe.data.num_workers,
        leaves_some_out=not (training.itm_weight and training.itg_weight),
        is_sharded=_is_sharded(recipe),
    )


def _vision(recipe: Recipe, parts: FrozenParts) -> nn.Module | None:
    """The encoder as a part of the step, where pictures are encoded there."""
    return None if recipe.data.cache_features else parts.vision


def _placed(recipe: Recipe, step: nn.Module, parts: FrozenParts) -> nn.Module:
    """The step's module on the run's device; its frozen layers dealt out to the ranks where the recipe says so."""
    if _is_sharded(recipe):
        shard_frozen_parts(step, parts.device)
    return step.to(parts.device)


def _is_sharded(recipe: Recipe) -> bool:
    return recipe.training.strategy == "fsdp" and world_size() > 1


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


# Stage 2 and instruction tuning


def _stage2_job(
    recipe: Recipe, parts: FrozenParts, reader: ItemReader, faults: FaultLog, judged: Sequence[Opened]
) -> Job:
    assert recipe.model.language is not None
    language_model, language_tokenizer = load_language_model(recipe.model.language, frozen_dtype(recipe))
    if hasattr(language_model.model, "set_attn_implementation"):
        language_model.model.set_attn_implementation("eager")  # the fused backward is 1.5 times slower on CPUs
    if recipe.model.lora_rank:
        add_adapters(language_model.model, recipe.model.lora_rank)
    if recipe.training.compile:
        compile_layers(language_model.model)
    if recipe.training.activation_checkpointing:
        compute_activations_again(language_model.model)
    is_aware = recipe.model.instruction_aware
    model = Blip2Stage2(_vision(recipe, parts), parts.config, language_model, instruction_aware=is_aware)
    load_text_weights(model, parts.text_init.state_dict)
    start_from(model, recipe)
    if is_aware and recipe.model.freeze_word_embeddings:
        model.embeddings.word_embeddings.requires_grad_(False)
    batches = Stage2Batches(
        reader,
        language_tokenizer,
        recipe.data,
        recipe.training.micro_batch_size,
        recipe.prompts,
        instruction_tokenizer=parts.qformer_tokenizer if is_aware else None,
        splits_captions=recipe.splits_captions(is_encoder_decoder=language_model.is_encoder_decoder),
    )
    every = recipe.training.evaluate_every
    held = [held_out(recipe, one, parts, faults) for one in judged]
    evaluators = [(every, Answers(model, batches, each, VALIDATION_QUESTIONS)) for each in held]
    if recipe.training.answer_samples:
        step, all_batches = _with_answers(recipe, model, batches)
    else:
        step, all_batches = Stage2Step(model), batches
    return Job(
        module=_placed(recipe, step, parts),
        batches=all_batches,
        evaluators=evaluators,
        faults=faults,
        take_faults=reader.take_faults,
        workers=None if recipe.data.cache_features else recipe.data.num_workers,
        is_sharded=_is_sharded(recipe),
    )


def _with_answers(recipe: Recipe, model: Blip2Stage2, batches: Stage2Batches) -> tuple[InstructStep, InstructBatches]:
    """The step and the batches that also classify answers."""
    training = recipe.training
    sources = batches.reader.sources
    answers = list_answers(Counter(count_texts(sources)), training.num_answers)
    step = InstructStep(
        model, len(answers), answer_weight=training.answer_weight, label_smoothing=training.label_smoothing
    )
    reader = ItemReader(sources, recipe.data, recipe.seed + LISTED_SEED)
    return step, InstructBatches(batches, reader, training.answer_samples // training.accumulation, answers)
