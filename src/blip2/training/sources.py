"""A recipe's data -> sources that batches are drawn from: texts in memory, images from cached features or from files.

data.folder + split      our own shards                 blip2 data build, blip2 data shard
source (+ split ...)     data where and as it lies      docs/how-to/data.md
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from blip2 import paths
from blip2.data.faults import Fault, FaultLog, fault_of
from blip2.data.features import CacheKey, FeatureCache, note_fault, num_done, open_or_build, read_faults
from blip2.data.layouts import open_source
from blip2.data.neighbours import Neighbours
from blip2.data.sample import Question, Sample
from blip2.data.shards import open_split, pictures_sha256, read_manifest
from blip2.data.source import Source as DataSource
from blip2.distributed import first_goes_first
from blip2.errors import BadImage, BadRecipe, BadSample, MissingFile
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.preprocessing.images import ImageTransform, load_image
from blip2.preprocessing.vary import VIEWS, vary
from blip2.training.batches import Source, as_text, group_name
from blip2.training.devices import place_and_threads
from blip2.training.images import CachedImages, Images, OnlineImages
from blip2.training.parts import FrozenParts
from blip2.training.sections import DataItem, MixtureItem, Recipe

ENCODE_TEXTS = 128  # texts at once
ENCODE = 8  # pictures at once: convolutions stay in the processor's cache (77 images/s against 37 at 64, 2 cores)
ENCODE_ON_GPU = 128


@dataclass(frozen=True)
class Opened:
    """Data that was opened.

    Attributes:
        name: what messages call it.
        samples: in order; a sample's picture is read when it is asked for.
        texts: the same without pictures.
        pictures: what names the pictures to the cache of features.
        faults: what the reader could not read.
    """

    name: str
    samples: DataSource
    texts: Sequence[Sample]
    pictures: str
    faults: Sequence[Fault] = ()


def open_item(recipe: Recipe, item: DataItem) -> Opened:
    """The samples of an item of the mixture, or of one to judge by.

    Raises:
        MissingFile, BadData: they are not there, or not what they should be.
    """
    if item.source is None:
        assert item.split is not None, "the recipe was checked"
        folder = data_folder(recipe.data.folder)
        split = open_split(folder, item.split)
        return Opened(item.name, split, list(split.described()), pictures_sha256(folder, item.split))
    found = open_source(item.source, images=item.images, split=item.split, columns=item.columns or None)
    return Opened(item.name, found, list(found.described()), found.pictures_sha256(), found.faults)


def open_validation(recipe: Recipe, entry: str | DataItem) -> Opened:
    """The samples of an entry of data.validation: a split of data.folder, or a source of its own.

    Raises:
        BadRecipe: nothing is said or asked there that a run could be judged by.
        MissingFile, BadData: see `open_item`.
    """
    if isinstance(entry, str):
        try:
            is_split = entry in read_manifest(data_folder(recipe.data.folder))["splits"]
        except MissingFile:
            is_split = False
        entry = DataItem(split=entry) if is_split else DataItem(source=entry)
    opened = open_item(recipe, entry)
    if not _rows_to_judge_by(recipe, opened):
        needed = "captions" if recipe.stage == "stage1" else "captions, and no questions with answers"
        raise BadRecipe(f"data.validation: {opened.name} has no {needed}.")
    return opened


def _rows_to_judge_by(recipe: Recipe, opened: Opened) -> list[int]:
    """Samples of which something is said or, but for stage 1, which answers nothing, asked and answered."""
    asks = recipe.stage != "stage1"
    return [
        row
        for row, sample in enumerate(opened.texts)
        if sample.captions or (asks and any(question.answer for question in sample.questions))
    ]


def data_folder(name: str) -> Path:
    """The folder of a data set: a path, or a name under the data folder.

    Raises:
        MissingFile: there is none.
    """
    for folder in (Path(name), paths.data_dir() / name):
        if (folder / "manifest.json").is_file():
            return folder
    raise MissingFile(f"There is no data set {name}. Make the open one with: blip2 data build.")


def make_source(recipe: Recipe, item: MixtureItem, parts: FrozenParts, faults: FaultLog) -> Source:
    """A source of training samples, its images ready to be read.

    Raises:
        BadRecipe: it has no texts for the task.
    """
    opened = open_item(recipe, item)
    _count_texts_of(opened, faults)
    questions = _questions(opened, item) if item.task == "question" else None
    rows = _with_captions(opened, faults) if questions is None else None
    neighbours = None
    if recipe.data.neighbour_share and questions is None:
        texts = opened.texts if rows is None else [opened.texts[row] for row in rows]
        neighbours = _neighbours([group_name(sample) for sample in texts], parts)
    images = _images(recipe, item, opened, parts, faults)
    return Source(opened.texts, images, item.weight, rows, questions, neighbours)


def _with_captions(opened: Opened, faults: FaultLog) -> Sequence[int] | None:
    """The samples that have captions, where not all have; the others are listed."""
    rows = [row for row, sample in enumerate(opened.texts) if sample.captions]
    if not rows:
        raise BadRecipe(f"data.mixture: {opened.name} has no captions; give it the task question.")
    lacking = {row for row in range(len(opened.texts))} - set(rows)
    told = {fault.sample for fault in opened.faults}  # such as a text that is not UTF-8
    lost = [opened.texts[row].id for row in sorted(lacking)]
    _list([Fault(name, opened.name, "has no caption") for name in lost if name not in told], faults)
    return rows if lacking else None


def _count_texts_of(opened: Opened, faults: FaultLog) -> None:
    """Counts the texts of a source, and lists what its reader left out."""
    faults.seen(len(opened.texts) + len(opened.faults))
    _list(opened.faults, faults)


def _list(found: Sequence[Fault], faults: FaultLog) -> None:
    """Counts what is wrong with a source as a whole, where many faults in a row say nothing yet."""
    for fault in found:
        faults.record(fault)
        faults.seen(0)


def _images(recipe: Recipe, item: MixtureItem, opened: Opened, parts: FrozenParts, faults: FaultLog) -> Images:
    if recipe.data.cache_features:
        features = image_features(opened, parts, faults, num_views=item.num_views, flip=item.flip)
        return CachedImages(features, item.num_views, recipe.data.image_token_share, opened.name)
    return OnlineImages(opened.samples, _transform(parts), is_varied=recipe.data.augment, flip=item.flip)


def _questions(opened: Opened, item: MixtureItem) -> Sequence[tuple[int, Question]]:
    asked = [(i, question) for i, sample in enumerate(opened.texts) for question in sample.questions]
    found = [(i, question) for i, question in asked if question.answer]  # test sets keep their answers to themselves
    if not found:
        raise BadRecipe(f"data.mixture: {opened.name} has no questions; give it the task caption.")
    questions = [(i, question) for i, question in found if not item.kinds or question.kind in item.kinds]
    if not questions:
        there = ", ".join(sorted({question.kind for _, question in found}))
        raise BadRecipe(f"data.mixture: no question of {opened.name} is of a kind in kinds. It has: {there}.")
    return questions


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


# Image features


@dataclass(frozen=True)
class HeldOut:
    """Samples to judge a run by, and their images.

    Attributes:
        name: of the split or source.
        samples: those whose pictures could be read.
        images: of all pictures, the readable ones at `rows`.
        rows: one for each sample.
    """

    name: str
    samples: Sequence[Sample]
    images: Images
    rows: Sequence[int]

    def read(self, numbers: Sequence[int]) -> Tensor:
        """Image features (B, N, Dv), or pixel values (B, 3, H, W) where the encoder is trained, of numbered samples."""
        plain = np.random.default_rng(0)  # there is one view: no chance in it
        return torch.stack([self.images.read(self.rows[number], plain) for number in numbers])


def held_out(recipe: Recipe, opened: Opened, parts: FrozenParts, faults: FaultLog) -> HeldOut:
    """What `open_validation` gave, its pictures as they are; those that cannot be read are left out, and so is of what
    nothing is said or asked.

    Raises:
        BadRecipe: nothing is left.
    """
    _count_texts_of(opened, faults)
    if recipe.model.train_vision:
        images: Images = OnlineImages(opened.samples, _transform(parts), is_varied=False)
    else:
        images = CachedImages(image_features(opened, parts, faults), name=opened.name)
    rows = [row for row in _rows_to_judge_by(recipe, opened) if _is_readable(images, row)]
    if not rows:
        raise BadRecipe(f"data.validation: no picture of {opened.name} can be read.")
    return HeldOut(opened.name, [opened.texts[row] for row in rows], images, rows)


def _is_readable(images: Images, row: int) -> bool:
    try:
        images.read(row, np.random.default_rng(0))
    except BadSample:
        return False
    return True


def image_features(
    opened: Opened, parts: FrozenParts, faults: FaultLog, *, num_views: int = 1, flip: bool = False
) -> FeatureCache:
    """Image features of all views, from the cache or made now; a picture that cannot be read has rows of NaN.

    Such a picture is counted once, whether it is found now or was when the cache was made. Of several ranks the first
    one makes them.
    """
    vision, transform = parts.vision, _transform(parts)
    at_once = ENCODE_ON_GPU if parts.device.type == "cuda" else ENCODE

    def pixels(row: int) -> Tensor | None:
        index, view = divmod(row, num_views)
        name = opened.texts[index].id
        try:
            image = load_image(opened.samples.picture(index), name=name)
        except (BadSample, BadImage) as error:
            if view == 0:
                fault = fault_of(error, sample_id=name, where=opened.samples.where(index))
                note_fault(folder, index, fault)
                faults.record(fault)
            return None
        if view == 0:
            return transform(image)
        generator = torch.Generator().manual_seed(row)
        return transform.augment(vary(image, generator, flip=flip), generator)

    @torch.inference_mode()
    def encode(rows: range) -> np.ndarray:
        encoded = []
        with ThreadPoolExecutor(2) as pool:
            for first in range(rows.start, rows.stop, at_once):
                some = range(first, min(first + at_once, rows.stop))
                views = list(pool.map(pixels, some))
                faults.seen(sum(row % num_views == 0 for row in some))
                encoded.append(_encoded(vision, views, parts))
        return torch.cat(encoded).numpy()

    size = vision.image_size
    views = f"{num_views} views, flip {flip}, {VIEWS}" if num_views > 1 else f"plain, {size} px"
    key = CacheKey(
        encoder=parts.vision_sha256,
        pictures=opened.pictures,
        views=f"{views}, {place_and_threads(parts.device)}" if vision.is_exact else views,
        num_rows=len(opened.samples) * num_views,
        shape=_feature_shape(parts),
        dtype="float32" if vision.is_exact else "float16",
    )
    chunk = max(64, at_once)
    folder = paths.home() / "features" / key.name
    with first_goes_first():
        done = num_done(folder)
        faults.seen(-(-done // num_views))
        _list([fault for index, fault in read_faults(folder).items() if index * num_views < done], faults)
        progress = _progress(f"image features of {opened.name}")
        return open_or_build(folder.parent, key, encode, chunk=chunk, progress=progress)


def _encoded(vision: nn.Module, views: Sequence[Tensor | None], parts: FrozenParts) -> Tensor:
    """Features (B, N, Dv) on the CPU, float16 or what is exact; NaN where there is no view."""
    whole = [view for view in views if view is not None]
    dtype = torch.float32 if parts.vision.is_exact else torch.float16
    features = torch.full((len(views), *_feature_shape(parts)), float("nan"), dtype=dtype)
    if whole:
        made = vision(torch.stack(whole).to(parts.device)).to(dtype).cpu()
        features[[place for place, view in enumerate(views) if view is not None]] = made
    return features


@torch.inference_mode()
def _feature_shape(parts: FrozenParts) -> tuple[int, int]:
    """(N, Dv) of the encoder's features at its picture size."""
    side = parts.vision.image_size
    probe = parts.vision(torch.zeros(1, 3, side, side, device=parts.device))
    return probe.shape[1], probe.shape[2]


def _transform(parts: FrozenParts) -> ImageTransform:
    return ImageTransform(parts.vision.image_size, parts.vision.image_mean, parts.vision.image_std)


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


def texts_sha256(samples: Iterable[Sample]) -> str:
    """One hash of all names, captions and questions in their order."""
    hashed = hashlib.sha256()
    for sample in samples:
        hashed.update(repr((sample.id, sample.captions, sample.questions)).encode("utf-8", "surrogatepass"))
    return hashed.hexdigest()


def count_texts(sources: Sequence[Source]) -> Iterator[str]:
    """What the LLM is to say for each sample: its captions, or its answer."""
    for source in sources:
        if source.questions is None:
            yield from (caption for sample in source.samples for caption in sample.captions)
        else:
            yield from (question.answer for _, question in source.questions)
