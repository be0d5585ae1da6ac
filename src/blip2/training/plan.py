"""What a run will need before anything is fetched or paid: parameters, memory of a processor, operations, days, money.

    recipe + processor -> modules on the meta device -> step_cost -> Plan

A plan is made of the same modules as the run, in shapes alone. What it cannot know is how much of a processor's peak a
run reaches: `utilisation` says so. The paper's own runs reached 12 % (stage 1) and 19 % (stage 2) of A100s.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from blip2.errors import BadRecipe
from blip2.training import accelerators, step_cost
from blip2.training.accelerators import GIB, Accelerator
from blip2.training.qformer_cost import FLOAT32, Arithmetic
from blip2.training.recipe import Recipe
from blip2.training.step_cost import Parameters, StepSettings, Work

DAY_SECONDS = 86_400
MOMENTS = 2  # AdamW keeps two numbers a trained weight
CUDA_BYTES = 0.9 * GIB  # the context, its kernels, cuBLAS's and NCCL's room
LOST_SHARE = {"gpu": 0.05, "cpu": 0.3}  # of what a step allocates, lost between blocks; benchmarks/plan_memory.py


@dataclass(frozen=True)
class Options:
    """What a run is planned for; None leaves the recipe's own.

    Attributes:
        gpu: a name in `accelerators.NAMES`.
        gpus: how many.
        utilisation: share of the peak that the run reaches, communication and waiting in it.
        price: of one processor for an hour, in any currency.
        strategy: "ddp" or "fsdp".
        activation_checkpointing: compute each layer again instead of keeping what it made.
        text_tokens: longest text of a batch; None: data.max_text_length.
    """

    gpu: str = "a100-80g"
    gpus: int = 1
    utilisation: float = 0.4
    price: float | None = None
    strategy: Literal["ddp", "fsdp"] | None = None
    activation_checkpointing: bool | None = None
    text_tokens: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes of one processor, by what they are for."""

    name: str
    bytes: float


@dataclass(frozen=True)
class Plan:
    """What a run will need.

    Attributes:
        recipe: its name.
        stage: of the recipe.
        accelerator, gpus, strategy, precision, activation_checkpointing: where and how it runs.
        samples: of a step; micro_batch: of one processor at once; accumulation: parts of a step.
        parameters: by part.
        memory: of one processor, at the worst moment of a step.
        work: operations of one sample, by part.
        utilisation, samples_per_second, days: of all processors.
        price: of the whole run; None without a rate.
        notes: what is not in the figures, or happens before the first step.
        advice: settings with which it fits, each with the memory it then needs; empty where it fits.
    """

    recipe: str
    stage: str
    accelerator: Accelerator
    gpus: int
    strategy: str
    precision: str
    activation_checkpointing: bool
    samples: int
    steps: int
    micro_batch: int
    accumulation: int
    parameters: tuple[Parameters, ...]
    memory: tuple[Memory, ...]
    work: tuple[Work, ...]
    utilisation: float
    samples_per_second: float
    days: float
    price: float | None
    notes: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def memory_bytes(self) -> float:
        """Of one processor, in all."""
        return sum(part.bytes for part in self.memory)

    @property
    def fits(self) -> bool:
        """Whether one processor has that much."""
        return self.memory_bytes <= self.accelerator.memory_bytes

    @property
    def flops_per_sample(self) -> float:
        """Operations of one sample, both ways."""
        return sum(part.total for part in self.work)


def make_plan(recipe: Recipe, options: Options) -> Plan:
    """The plan of a recipe.

    Raises:
        BadRecipe: a processor that is not known, or a batch that cannot be split over so many.
        UnknownModel: a frozen part whose shape is not known here; nothing is fetched.
    """
    return _Planner(recipe, options).plan()


class _Planner:
    """A recipe's parts, put on processors in one way or another."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        _check(options)
        self.recipe, self.options = recipe, options
        self.accelerator = accelerators.find(options.gpu)
        self.precision = self.accelerator.precision(recipe.training.precision)
        self.arithmetic = Arithmetic.of(self.precision, is_gpu=self.accelerator.is_gpu)
        own = StepSettings.of(recipe)
        self.settings = replace(
            own,
            strategy=options.strategy or own.strategy,
            activation_checkpointing=(
                own.activation_checkpointing
                if options.activation_checkpointing is None
                else options.activation_checkpointing
            ),
            text_tokens=options.text_tokens,
        )
        self.parts = step_cost.step_parts(recipe, self.settings, self.precision)
        self.length = step_cost.lengths(recipe, self.settings, self.parts.language)
        self.found = step_cost.part_costs(self.parts, self.length, self.settings)
        self.parameters = step_cost.parameters(self.parts, self.settings)

    def plan(self) -> Plan:
        recipe, options, training = self.recipe, self.options, self.recipe.training
        world = training.batch_size // training.accumulation
        work = step_cost.work(recipe, self.parts, self.length, self.settings, self.found, world // options.gpus, world)
        peak = self.accelerator.flops(self.precision) * options.gpus * options.utilisation
        rate = peak / sum(part.total for part in work)
        days = training.steps * training.batch_size / rate / DAY_SECONDS
        memory = self.memory(self.settings, training.accumulation)
        return Plan(
            recipe=recipe.name,
            stage=recipe.stage,
            accelerator=self.accelerator,
            gpus=options.gpus,
            strategy=self.settings.strategy,
            precision=self.precision,
            activation_checkpointing=self.settings.activation_checkpointing,
            samples=training.batch_size,
            steps=training.steps,
            micro_batch=self._micro_batch(training.accumulation),
            accumulation=training.accumulation,
            parameters=tuple(self.parameters),
            memory=tuple(memory),
            work=tuple(work),
            utilisation=options.utilisation,
            samples_per_second=rate,
            days=days,
            price=None if options.price is None else days * 24 * options.gpus * options.price,
            notes=tuple(self._notes()),
            advice=() if _total(memory) <= self.accelerator.memory_bytes else tuple(self._advice()),
        )

    # Memory

    def memory(self, settings: StepSettings, accumulation: int) -> list[Memory]:
        """By what it is for, with other settings than the recipe's perhaps."""
        options, parts, arithmetic = self.options, self.parts, self.arithmetic
        own = self._micro_batch(accumulation)
        world = own * options.gpus
        shards = options.gpus if settings.strategy == "fsdp" else 1
        trained = sum(part.trained for part in self.parameters) * FLOAT32
        frozen = sum(
            part.frozen * (FLOAT32 if part.name in ("Q-Former", "frozen sentence encoder") else arithmetic.product)
            for part in self.parameters
        )
        kept = step_cost.kept(self.recipe, parts, self.length, settings, self.found, arithmetic, own=own, world=world)
        itc = 0.0
        if self.recipe.stage == "stage1":
            itc = step_cost.itc_bytes(parts.config, own, world, settings.itc_chunk)
        step = own * (kept.activations + kept.logits) + kept.weight_copies / shards + itc
        encoding = 0.0 if settings.cache_features else own * self.found.encoder.working_bytes
        found = [
            Memory("frozen weights", frozen / shards),
            Memory("trained weights", trained / shards),
            Memory("gradients", trained / shards),
            Memory("AdamW's moments", MOMENTS * trained / shards),
            Memory("moving average", trained / shards if settings.has_average else 0.0),
            Memory("activations", own * kept.activations),
            Memory("logits and their gradients", own * kept.logits),
            Memory("bfloat16 copies of weights", kept.weight_copies / shards),
            Memory("features and similarities of ITC", itc),
            Memory("one layer gathered from all", self._gathered_layer() if shards > 1 else 0.0),
            Memory("more, while pictures are encoded", max(0.0, encoding - step)),
            Memory("batches ahead", 0.0 if self.accelerator.is_gpu else self._batch_bytes(own, settings)),
            Memory(
                "gaps between blocks", LOST_SHARE["gpu" if self.accelerator.is_gpu else "cpu"] * max(step, encoding)
            ),
            Memory("CUDA", CUDA_BYTES if self.accelerator.is_gpu else 0.0),
        ]
        return [part for part in found if part.bytes]

    def _batch_bytes(self, own: int, settings: StepSettings) -> float:
        """Of the features of a batch, where they come from a cache."""
        image, training = self.parts.image, self.recipe.training
        features = image.num_tokens * image.width * FLOAT32 if settings.cache_features else 0
        return own * (1 + training.answer_samples / training.batch_size) * features

    def _gathered_layer(self) -> float:
        """The largest part's mean layer, and the next one, which is gathered ahead."""
        found = self.found
        by_part = {part.name: part.frozen + part.trained for part in self.parameters}
        sizes = [
            by_part["image encoder"] / found.encoder.num_layers,
            by_part["Q-Former"] / self.parts.config.num_hidden_layers,
        ]
        if found.language is not None:
            sizes.append(by_part["language model"] / found.language.num_layers)
        return 2 * max(sizes) * self.arithmetic.product

    def _micro_batch(self, accumulation: int) -> int:
        """Samples of one processor at once."""
        batch, gpus = self.recipe.training.batch_size, self.options.gpus
        if batch % (accumulation * gpus):
            raise BadRecipe(
                f"training.batch_size {batch} cannot be split over {gpus} processors in {accumulation} equal parts. "
                f"Near it: {max(1, round(batch / accumulation / gpus)) * accumulation * gpus}."
            )
        return batch // (accumulation * gpus)

    # What to say

    def _advice(self) -> Iterator[str]:
        """Changes with which it fits; one that needs as many parts of a batch as a simpler one does is left out."""
        own = self.recipe.training.accumulation
        parts_of: dict[tuple[str, ...], int] = {}
        for names, way in self._ways():
            fitting = (
                parts
                for parts in self._accumulations()
                if _total(self.memory(way, parts)) <= self.accelerator.memory_bytes
            )
            parts = next(fitting, None)
            simpler = [parts_of[other] for other in parts_of if set(other) < set(names)]
            if parts is None or any(parts >= other for other in simpler):
                continue
            parts_of[names] = parts
            changes = [*names, *([f"training.accumulation={parts}"] if parts != own else [])]
            loss = "; each part then has its own, fewer negatives" if self.recipe.stage == "stage1" else ""
            needed = _total(self.memory(way, parts)) / GIB
            yield f"--set {' --set '.join(changes)}: {needed:.1f} GiB{loss if parts > own else ''}"
        if not parts_of:
            yield from self._larger()

    def _ways(self) -> Iterator[tuple[tuple[str, ...], StepSettings]]:
        """What can be changed besides the parts of a batch, one thing and then two."""
        recomputing, sharding = "training.activation_checkpointing=true", "training.strategy=fsdp"
        can_recompute = not self.settings.activation_checkpointing
        can_shard = self.options.gpus > 1 and self.settings.strategy != "fsdp"
        yield (), self.settings
        if can_recompute:
            yield (recomputing,), replace(self.settings, activation_checkpointing=True)
        if can_shard:
            yield (sharding,), replace(self.settings, strategy="fsdp")
        if can_recompute and can_shard:
            both = replace(self.settings, activation_checkpointing=True, strategy="fsdp")
            yield (recomputing, sharding), both

    def _larger(self) -> Iterator[str]:
        """Processors on which the run fits as it is, or a plain no."""
        needed = _total(self.memory(self.settings, self.recipe.training.accumulation))
        names = [name for name, gpu in accelerators.GPUS.items() if gpu.memory_bytes >= needed]
        if names:
            yield f"no setting makes it fit here; it fits on: {', '.join(names)}"
        else:
            yield "no setting makes it fit here; take a smaller language model, or more processors with fsdp"

    def _accumulations(self) -> list[int]:
        """Numbers of parts into which a step's batch can be split, from the recipe's own on."""
        training = self.recipe.training
        most = training.batch_size // self.options.gpus
        return [
            parts
            for parts in range(training.accumulation, most + 1)
            if training.batch_size % (parts * self.options.gpus) == 0
        ]

    def _notes(self) -> Iterator[str]:
        recipe, parts, encoder = self.recipe, self.parts, self.found.encoder
        if self.settings.cache_features:
            image = parts.image
            views = max(item.num_views for item in recipe.data.mixture)
            bytes_each = 4 if recipe.data.exact_features else 2
            kept = round(image.num_tokens / recipe.data.image_token_share) * image.width * bytes_each
            yield (
                f"Image features are cached: {kept / 1000:,.0f} kB and {encoder.forward_flops / 1e9:,.1f} GFLOP a view "
                f"of a picture, up to {views} {'views' if views > 1 else 'view'} each, once before the first step"
            )
        yield (
            f"Texts are taken to be {self.length.text} tokens long, the limit; --text-tokens says how long a batch's "
            "longest is"
        )
        if self.settings.compiles:
            yield "training.compile keeps less than is counted here"
        if self.precision == "bfloat16" and self.accelerator.bfloat16_flops is None:
            yield f"{self.accelerator.title} has no units for bfloat16: training.precision=float32 is as fast"


def _check(options: Options) -> None:
    if options.gpus < 1:
        raise BadRecipe(f"--gpus {options.gpus}: at least one is needed.")
    if not 0 < options.utilisation <= 1:
        raise BadRecipe(f"--utilisation {options.utilisation}: a share above 0 and up to 1, such as 0.4.")
    if options.gpu == "cpu" and options.gpus > 1:
        raise BadRecipe("--gpu cpu plans for this computer alone: leave --gpus out.")


def _total(memory: list[Memory]) -> float:
    return sum(part.bytes for part in memory)
