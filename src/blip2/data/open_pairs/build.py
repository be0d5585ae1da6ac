"""Builds the open training set: packages -> pictures -> splits -> shards, aside and then renamed.

train_pairs         stamps, clip art and three styles of emoji; no held-out concept
train_styles        four more styles of emoji, of concepts that train_pairs has
held_out_concepts   the same sources, the tenth of the concepts that training never sees
held_out_style      Twemoji, all concepts that some training style has
train_scenes, new_scenes, new_noun_pairs     composed of train_pairs' cut-outs
easy_vqa_train, easy_vqa_test                its official split
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from PIL import Image

from blip2 import registry
from blip2.data.open_pairs.clipart import read_clipart
from blip2.data.open_pairs.easy_vqa import read_easy_vqa
from blip2.data.open_pairs.emoji import HELD_OUT_STYLE, MORE_STYLES, TRAINING_STYLES, read_emoji, read_labels
from blip2.data.open_pairs.picture import Picture, as_sample, is_held_out
from blip2.data.open_pairs.scenes import SEVERAL_COLOURS, CutOut, measured_colour, scene_sample
from blip2.data.open_pairs.stamps import read_stamps
from blip2.data.open_pairs.vocabulary import SCENE_NOUNS
from blip2.data.sample import Sample
from blip2.data.shards import Shard, write_manifest, write_split
from blip2.errors import UserError

SCENES = {"new_scenes": 1500, "new_noun_pairs": 1500}
CUTOUT_SIDE = 200  # pixels; no thing in a scene is larger
Say = Callable[[str], None]


def build_open_pairs(
    folder: Path,
    *,
    seed: int = 0,
    num_scenes: int = 24_000,
    language: str = "en",
    force: bool = False,
    say: Say = print,
) -> None:
    """Builds the whole set into `folder`; in other languages than English, stamps and emoji alone.

    Args:
        seed: decides the scenes.
        num_scenes: scenes to train on.
        language: of the captions, such as zh.
        force: replace a set that is there.
        say: told what is being done.

    Raises:
        UserError: `folder` is there and `force` is not given, or it is no data set.
        DownloadFailed: a package cannot be had.
    """
    if folder.exists() and not force:
        raise UserError(f"{folder} is there already. Give --force to build it again, or --out for another place.")
    if folder.exists() and not (folder / "manifest.json").is_file():
        raise UserError(f"{folder} is no data set, so --force does not replace it. Give --out for another place.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if language == "en":
            _write_all(aside, seed, num_scenes, say)
        else:
            _write_translated(aside, language, say)
        aside.chmod(0o755)
        _put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Renames `aside` to `folder`; a set that was there is moved away whole before it is deleted."""
    if not folder.exists():
        os.rename(aside, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old)
    os.rename(aside, folder)
    shutil.rmtree(old)


def _write_translated(folder: Path, language: str, say: Say) -> None:
    """The four splits of pairs, of the same pictures as in English, with captions in another language."""
    labels = read_labels(language)  # says so at once where there are none
    say(f"{len(labels):,} labels in {language}")
    splits = {}
    for split, pictures in _pairs([*_told("stamps", read_stamps(language), say)], language, say).items():
        say(f"{split}: {len(pictures):,} pictures")
        splits[split] = write_split(folder, split, _numbered(pictures))
    write_manifest(folder, f"open-pairs-{language}", splits, language=language, sources=_sources("stamps", "emojibase"))


def _pairs(training: list[Picture], language: str, say: Say) -> dict[str, list[Picture]]:
    """What stamps (and clip art) and the styles of emoji are dealt to: training and held-out splits, by concept."""
    for style in TRAINING_STYLES:
        training += _told(style, read_emoji(style, language), say)
    known = {picture.concept for picture in training}
    twemoji = [p for p in _told(HELD_OUT_STYLE, read_emoji(HELD_OUT_STYLE, language), say) if p.concept in known]
    shown = [picture for picture in training if not is_held_out(picture.concept)]
    hidden = [picture for picture in training if is_held_out(picture.concept)]
    concepts = {picture.concept for picture in shown}
    styles = [
        p for style in MORE_STYLES for p in _told(style, read_emoji(style, language), say) if p.concept in concepts
    ]
    return {
        "train_pairs": shown,
        "train_styles": styles,
        "held_out_concepts": hidden,
        "held_out_style": twemoji,
    }


def _sources(*keys: str) -> dict[str, dict[str, str]]:
    return {
        key: {"sha256": registry.PACKAGES[key].sha256, "licence": registry.PACKAGES[key].licence}
        for key in keys or registry.TRAINING_DATA
    }


def _write_all(folder: Path, seed: int, num_scenes: int, say: Say) -> None:
    training = [*_told("stamps", read_stamps(), say), *_told("clip art", read_clipart(), say)]
    pairs = _pairs(training, "en", say)
    shown = pairs["train_pairs"]
    splits: dict[str, list[Shard]] = {}
    for split, pictures in pairs.items():
        say(f"{split}: {len(pictures):,} pictures")
        splits[split] = write_split(folder, split, _numbered(pictures))
    cutouts = scene_cutouts(shown)
    say(f"scenes are composed of {sum(map(len, cutouts.values()))} cut-outs of {len(cutouts)} nouns")
    for split, count in {"train_scenes": num_scenes, **SCENES}.items():
        splits[split] = write_split(folder, split, _scenes(split, count, seed, cutouts))
        say(f"{split}: {count:,} scenes")
    for part in ("train", "test"):
        splits[f"easy_vqa_{part}"] = write_split(folder, f"easy_vqa_{part}", read_easy_vqa(part))
    write_manifest(folder, "open-pairs", splits, seed=seed, sources=_sources(), scene_nouns=sorted(cutouts))


def scene_cutouts(pictures: Sequence[Picture]) -> dict[str, list[CutOut]]:
    """Cut-outs of each noun of the vocabulary that the pictures show, at most CUTOUT_SIDE pixels."""
    found: dict[str, list[CutOut]] = {}
    wanted = set(SCENE_NOUNS)
    for picture in pictures:
        if picture.concept not in wanted or picture.source == "clipart":
            continue
        image = picture.cutout.copy()
        if min(image.getchannel("A").tobytes()) > 250:  # no transparency: a rectangle, not a thing
            continue
        image.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE), Image.Resampling.LANCZOS)
        colour = None if picture.concept in SEVERAL_COLOURS else measured_colour(image)
        found.setdefault(picture.concept, []).append(CutOut(image, colour, picture.style))
    return found


def _told(name: str, pictures: Iterator[Picture], say: Say) -> list[Picture]:
    read = list(pictures)
    say(f"{name}: {len(read):,} pictures read")
    return read


def _numbered(pictures: Sequence[Picture]) -> Iterator[Sample]:
    return (as_sample(picture, number) for number, picture in enumerate(pictures))


_worker: dict = {}  # a pool's worker keeps its cut-outs here, instead of receiving them with every scene


def _start_worker(cutouts: dict[str, list[CutOut]]) -> None:
    _worker["cutouts"] = cutouts


def _one_scene(task: tuple[str, int, int]) -> Sample:
    return scene_sample(*task, _worker["cutouts"])


def _scenes(split: str, count: int, seed: int, cutouts: dict[str, list[CutOut]]) -> Iterator[Sample]:
    tasks = [(split, number, seed) for number in range(count)]
    with ProcessPoolExecutor(os.cpu_count(), initializer=_start_worker, initargs=(cutouts,)) as pool:
        yield from pool.map(_one_scene, tasks, chunksize=64)
