"""The sections of a recipe: every setting a run has, with its default, its bounds and its reason.

What a section says of a field is what `blip2 train NAME --show` prints above it.
"""

from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic.dataclasses import dataclass

from blip2.preprocessing.prompts import CAPTION_INSTRUCTION, CAPTION_PROMPT, QUESTION_PROMPT

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _not_a_claim(value: Any) -> Any:
    """Refuses true and false where a number belongs: Python would count them as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


Positive = Annotated[int, Field(gt=0), BeforeValidator(_not_a_claim)]
Count = Annotated[int, Field(ge=0), BeforeValidator(_not_a_claim)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_not_a_claim)]
Threads = Annotated[int, Field(gt=0, le=1024), BeforeValidator(_not_a_claim)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

SMALLEST_SHARE = 0.002  # data/order.py deals sources in blocks of 1,000: a smaller share could get no place


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSection:
    """Which frozen parts are bridged, and the shape of the bridge."""

    vision: str = "efficientnet-lite2"
    """Frozen image encoder: a package's name, a Hugging Face name or a folder."""
    language: str | None = "smollm2-135m-instruct"
    """Frozen language model for stage 2 and instruct; null for none."""
    text_init: str = "minilm-l6-v2"
    """BERT-like weights and word pieces the Q-Former starts from."""
    num_query_tokens: Annotated[Positive, Field(le=1024)] = 32
    """Learned queries, and so visual tokens that the language model sees."""
    embed_dim: Annotated[Positive, Field(le=8192)] = 256
    """Width of the space in which images and texts are compared."""
    query_pooling: Literal["max", "mean", "concat"] = "max"
    """How an image's queries stand for it in ITC: each alone, the best one counting (the paper), as their mean, or side
    by side through one wide projection, so that each may hold a part."""
    text_pooling: Literal["cls", "mean"] = "cls"
    """How a text becomes one vector: its first token (the paper) or the mean of its tokens."""
    freeze_word_embeddings: bool = False
    """Keep the word embeddings of text_init as they are."""
    dropout: Share = 0.1
    """Dropout after the Q-Former's dense layers and embeddings."""
    attention_dropout: Share = 0.1
    """Dropout on the Q-Former's attention weights; 0 keeps the fast attention kernels in use."""
    init_from: str | None = None
    """What the bridge's weights start from: a run (by name or folder), a checkpoint, a model folder of ours or Hugging
    Face's or its hub's name, a .pth of LAVIS."""
    instruction_aware: bool = False
    """Show the instruction to the Q-Former too, as InstructBLIP does."""
    train_vision: bool = False
    """Train the image encoder too, as the paper does when it fine-tunes; needs data.cache_features: false."""
    image_size: Positive | None = None
    """Side of the pictures in pixels, such as 364 for fine-tuning; null for what the encoder was made for."""
    lora_rank: Count = 0
    """Rank of LoRA adapters trained in the language model's attention, beside the bridge; 0 for none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataItem:
    """Where samples come from."""

    split: str | None = None
    """A split of the data set folder, or of the source where that has several."""
    source: str | None = None
    """Data of your own, where it lies: a folder, a table, coco:captions.json ... (docs/how-to/data.md); null for the
    split of data.folder."""
    images: str | None = None
    """Folder of the source's pictures, where that is another."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Columns of a table whose names are not the usual ones, such as {image: file, caption: alt}."""

    @model_validator(mode="after")
    def _says_where_from(self) -> "DataItem":
        if self.split is None and self.source is None:
            raise ValueError("give a split of data.folder, or a source of your own")
        return self

    @property
    def name(self) -> str:
        """What messages and metrics call it."""
        return ":".join(part for part in (self.source, self.split) if part)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MixtureItem(DataItem):
    """One source of training samples."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, relative to the other items."""
    task: Literal["caption", "question"] = "caption"
    """Train on the pictures' captions, or on their questions and answers."""
    kinds: tuple[str, ...] = ()
    """Kinds of questions to take, such as left or count; none for all. A split may stand in several items, so that
    some kinds get a greater share."""
    num_views: Positive = 1
    """Views of each picture whose image features are cached: the plain picture and varied ones."""
    flip: bool = False
    """Mirror half of the varied views; wrong where texts speak of left and right."""


def _kind_of(entry: Any) -> str:
    """Which branch of `Held` an entry is; recipe_faults leaves these marks out of a setting's path."""
    return "<item>" if isinstance(entry, dict | DataItem) else "<name>"


Held = Annotated[
    Annotated[str, Tag("<name>")] | Annotated[DataItem, Tag("<item>")],
    Discriminator(_kind_of),
]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSection:
    """What the run reads."""

    folder: str = "open-pairs"
    """A data set by name (under the data folder) or by path."""
    mixture: Annotated[tuple[MixtureItem, ...], Field(min_length=1)]
    """The sources and their weights."""
    validation: tuple[Held, ...] = ()
    """What evaluations during the run look at: splits of data.folder, sources of your own, or settings such as
    {source: val.csv, images: pictures}, as the mixture has them."""
    cache_features: bool = True
    """Keep the image features of all views on disk, and read pictures only once; false: read, vary and encode pictures
    in every step, as the paper does. The cache takes 724 kB a view with ViT-g."""
    exact_features: bool = False
    """Encode every picture by itself and keep float32, so that a run with cached features equals one without, bit for
    bit, where both see the same views on one kind of device with as many threads; false: in batches, kept as float16,
    in half the space."""
    augment: bool = True
    """Vary pictures that are read in every step by random resized crops (mirrored where the mixture says flip)."""
    num_workers: Count = 2
    """Processes that read pictures ahead where they are read in every step; 0 reads them between the steps. The
    result is the same for any number."""
    stop_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """A run stops when more than this share of its samples cannot be read; fewer are counted, and listed in
    RUN/faults.jsonl."""
    question_share: Share = 0.0
    """Share of the samples with questions whose caption loss (ITG) reads a question and its answer (stage 1)."""
    neighbour_share: Share = 0.0
    """Share of the samples of caption sources that are taken among the nearest neighbours, by text_init, of the caption
    before them: a batch then holds negatives that are hard to tell apart (stage 1, not in the paper)."""
    tag_share: Share = 0.0
    """Share of the captions that are followed by the picture's tags, where it has tags (stage 1)."""
    image_token_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the image tokens shown in a step, drawn anew for each picture: a regulariser that also saves time."""
    max_text_length: Positive = 32
    """Longest caption or question in tokens; longer ones are cut."""
    max_answer_length: Positive = 16
    """Longest answer in tokens; longer ones are cut."""

    @model_validator(mode="after")
    def _every_source_gets_a_share(self) -> "DataSection":
        if self.image_token_share < 1 and not self.cache_features:
            raise ValueError("image_token_share draws among cached features: set cache_features: true")
        names = [entry if isinstance(entry, str) else entry.name for entry in self.validation]
        if len(set(names)) < len(names):
            raise ValueError(f"validation names {max(names, key=names.count)} twice, and its metrics would be mixed up")
        total = sum(item.weight for item in self.mixture)
        for item in self.mixture:
            if item.weight / total < SMALLEST_SHARE:
                raise ValueError(
                    f"{item.name} has a share below {SMALLEST_SHARE:.1%}: raise its weight or leave it out"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptsSection:
    """What stands before the texts that the language model learns to say; an exported model asks with the same."""

    caption: str | None = None
    """What a caption continues, such as "a photo of" (the paper's when it fine-tunes) or "" for nothing; null for "A
    picture of" or, in stage2 of an encoder-decoder, a beginning of the caption itself (prefix language modelling)."""
    caption_instruction: str = CAPTION_INSTRUCTION
    """What an instruction-aware Q-Former reads where a caption is wanted."""
    question: str = QUESTION_PROMPT
    """What an answer continues; {} stands for the question."""

    @model_validator(mode="after")
    def _question_has_a_place(self) -> "PromptsSection":
        if "{}" not in self.question:
            raise ValueError(f"question {self.question!r} has no {{}}, where the question shall stand")
        return self

    @property
    def before_caption(self) -> str:
        """What a caption continues."""
        return CAPTION_PROMPT if self.caption is None else self.caption


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerSection:
    """AdamW and its schedule: linear warm-up, then a cosine."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: Rate = 1e-5
    """Learning rate at the last step."""
    warmup_learning_rate: Rate = 1e-6
    """Learning rate at the first step."""
    warmup_steps: Count = 2000
    """Steps of linear warm-up; 0 for none."""
    betas: tuple[Share, Share] = (0.9, 0.98)
    """Decay of AdamW's first and second moments."""
    weight_decay: Rate = 0.05
    """Decoupled weight decay; biases, norms and single vectors have none."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each layer of a trained image encoder beside that of the layer above it; 1 for the same."""
    max_grad_norm: Rate = 1.0
    """Longer gradients are scaled down to this norm; 0 turns it off."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to AdamW's denominator."""

    @model_validator(mode="after")
    def _falls(self) -> "OptimizerSection":
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"min_learning_rate {self.min_learning_rate:g} is above learning_rate {self.learning_rate:g}: lower it"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainingSection:
    """How long, in what portions, and what is written down."""

    steps: Positive
    """Optimiser steps of the whole run."""
    batch_size: Positive
    """Samples that one optimiser step sees."""
    accumulation: Positive = 1
    """Equal parts in which a batch is computed, to save memory; each part has its own negatives."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the matrix products; auto is bfloat16 where the processor has units for it, else float32."""
    label_smoothing: Share = 0.1
    """Label smoothing of the losses that have it."""
    negatives: Literal["paper", "lavis-2023-02"] = "paper"
    """How hard negatives of ITM are drawn."""
    itc_weight: Rate = 1.0
    """Weight of the contrastive loss (stage 1)."""
    itm_weight: Rate = 1.0
    """Weight of the matching loss (stage 1)."""
    sentence_weight: Rate = 0.0
    """Weight of keeping the image features of ITC near the sentence embeddings of text_init: what is learnt of the
    training concepts then carries over to texts never seen (stage 1, not in the paper)."""
    sentence_text_weight: Rate | None = None
    """Weight of keeping the text features there; null: sentence_weight. Needs a sentence_weight."""
    min_temperature: Rate = 0.0
    """Lowest temperature of ITC; 0 leaves it free, as the original code does. A model that may grow ever surer of few
    training pairs does so (stage 1)."""
    matched_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of a batch's pairs that ITM matches; their negatives come from the whole batch. Saves time (stage 1)."""
    itg_weight: Rate = 1.0
    """Weight of the captioning loss (stage 1)."""
    log_every: Positive = 20
    """Steps between two lines of the log."""
    checkpoint_every: Positive = 200
    """Steps between two checkpoints."""
    keep: Positive = 2
    """Newest checkpoints that are kept."""
    evaluate_every: Count = 500
    """Steps between two evaluations; 0 for one at the end."""
    answer_samples: Count = 0
    """Samples a step besides batch_size whose answer the Q-Former alone tells, out of a list: on a CPU they cost a
    quarter of those that the LLM answers (instruct, not in the paper)."""
    answer_weight: Rate = 1.0
    """Weight of the loss on them."""
    num_answers: Positive = 5000
    """Length of that list, the most frequent answers of the mixture; samples with another answer do not count."""
    compile: bool = False
    """Fuse the LLM's layers (stage 2, instruction tuning): 1.4 times as fast on a CPU, after 20 seconds; needs a C++
    compiler. A resumed run then equals an uninterrupted one but for rounding."""
    itc_chunk: Count = 0
    """Images or texts of the whole batch that ITC compares with at once; 0 for all. Saves memory where batches are of
    many thousands (stage 1)."""
    ema_decay: Share = 0.0
    """Keep a running average of the weights with this decay, which evaluations and exports then use; 0 for none."""
    best_metric: str | None = None
    """Metric of the evaluations, such as held_out/r10, whose best checkpoint is kept besides the newest; the less the
    better if its name holds "loss"."""
    early_stop: Count = 0
    """Evaluations in a row without a better best_metric after which the run ends; 0 for never."""
    skip_spikes: Rate = 0.0
    """Skip steps whose gradient is this many times as long as usual; 0 for none."""
    mirror: str | None = None
    """Another place to which every checkpoint is copied, a folder or what fsspec opens (s3://bucket/run); a run whose
    own folder is gone goes on from there."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto is a GPU where there is one."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """What several processes hold of the frozen parts: ddp all of them, fsdp a share each (FSDP2), for parts that are
    too large for one GPU."""
    activation_checkpointing: bool = False
    """Compute the language model's activations again in the backward pass: less memory, a third more time."""
    hang_seconds: Count = 1800
    """Of several processes, leave when a step takes longer than this, and say which one is to blame; 0 for never."""
    threads: Threads | None = None
    """CPU threads; null leaves the choice to PyTorch. Resuming is bit-exact at one number of threads."""

    @model_validator(mode="after")
    def _parts_are_equal(self) -> "TrainingSection":
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into accumulation = {self.accumulation} equal parts"
            )
        if self.answer_samples % self.accumulation:
            raise ValueError(
                f"answer_samples {self.answer_samples} cannot be split into accumulation = {self.accumulation} parts"
            )
        return self

    @property
    def micro_batch_size(self) -> int:
        """Samples computed at once: the batch's share in one of its `accumulation` parts."""
        return self.batch_size // self.accumulation


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """One training run."""

    stage: Literal["stage1", "stage2", "instruct"]
    """stage1: representation (ITC, ITM, ITG); stage2: generation by a frozen LLM; instruct: answers to instructions."""
    name: str
    """Name of the run, and of its folder."""
    seed: Seed = 0
    """Decides the order of the samples, dropout and negatives."""
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection
    prompts: PromptsSection = Field(default_factory=PromptsSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    training: TrainingSection

    @model_validator(mode="after")
    def _name_is_a_folder(self) -> "Recipe":
        path = PurePath(self.name)
        if not self.name.strip() or not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"name is {self.name!r}: give one that the folder of the run can have")
        return self

    def splits_captions(self, *, is_encoder_decoder: bool) -> bool:
        """Whether a caption's beginning goes to the LLM's encoder, its rest is learnt (prefix language modelling)."""
        return self.stage == "stage2" and is_encoder_decoder and self.prompts.caption is None

    @model_validator(mode="after")
    def _stage_has_its_parts(self) -> "Recipe":
        if self.stage != "stage1" and self.model.language is None:
            raise ValueError(f"{self.stage} trains for a language model: set model.language")
        if self.model.train_vision and self.data.cache_features:
            raise ValueError("model.train_vision changes the image features: set data.cache_features: false")
        if self.model.train_vision and self.data.exact_features:
            raise ValueError(
                "data.exact_features is for a frozen encoder: leave it out where model.train_vision is true"
            )
        if self.model.lora_rank and self.stage == "stage1":
            raise ValueError("model.lora_rank is for stage2 and instruct: stage1 has no language model")
        if self.model.lora_rank and self.training.strategy == "fsdp":
            raise ValueError(
                "model.lora_rank trains weights inside layers that strategy: fsdp keeps in shards; use ddp"
            )
        if self.training.early_stop and not self.training.best_metric:
            raise ValueError("training.early_stop needs training.best_metric: what shall get no better?")
        if self.stage == "stage1" and self.prompts != PromptsSection():
            raise ValueError("prompts are for stage2 and instruct: stage1 has no language model")
        if self.training.answer_samples and not (self.stage == "instruct" and self.model.instruction_aware):
            raise ValueError("training.answer_samples needs stage: instruct and model.instruction_aware: true")
        return self
