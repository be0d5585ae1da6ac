"""Any source -> our shards: pictures checked, upright, scaled down where asked, packed with an index.

Work goes shard by shard. What is finished is noted in SPLIT.progress.json, so a packing that was broken off goes on at
the next shard when started again; the manifest, which makes the folder a data set, is written at the very end.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from blip2.data.faults import Fault, FaultLog
from blip2.data.loader import OrderedLoader
from blip2.data.sample import Sample
from blip2.data.shards import SAMPLES_PER_SHARD, Shard, read_manifest, write_manifest, write_shard
from blip2.data.source import Source
from blip2.errors import BadImage, BadSample, UserError

FORMATS = ("keep", "jpeg", "webp")
AHEAD = 64  # pictures
_ORIENTATION_TAG = 0x0112
_KEPT_FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "WEBP": "WEBP"}  # the others, scaled, become PNG

Decode = Callable[..., Image.Image]  # (bytes, name=..., at_least=...) -> RGB and upright; raises BadImage


@dataclass(frozen=True)
class Packing:
    """How pictures are packed.

    Attributes:
        size: the shorter side of larger pictures becomes this many pixels; none is scaled up. None leaves all.
        quality: of JPEG and WebP, 1 to 100.
        format: keep the file's own, or write all as JPEG or WebP. What need not change is kept to the byte.
    """

    size: int | None = None
    quality: int = 90
    format: str = "keep"

    def __call__(self, data: bytes, name: str, decode: Decode) -> bytes:
        """The picture's file as it goes into the shard.

        Raises:
            BadImage: it cannot be decoded.
        """
        image = decode(data, name=name, at_least=2 * self.size if self.size else None)
        form, is_turned, full = _header(data)
        wanted = {"jpeg": "JPEG", "webp": "WEBP"}.get(self.format) or _KEPT_FORMATS.get(form, "PNG")
        is_large = self.size is not None and min(full) > self.size
        if not is_turned and not is_large and (self.format == "keep" or wanted == form):
            return data
        if is_large and self.size is not None:
            image = image.resize(_scaled(image.size, self.size), Image.Resampling.BICUBIC, reducing_gap=3.0)
        buffer = io.BytesIO()
        image.save(buffer, wanted, **({"quality": self.quality} if wanted != "PNG" else {"optimize": False}))
        return buffer.getvalue()


@dataclass(frozen=True)
class Packed:
    """What was packed: samples, and a line about those left out."""

    count: int
    summary: str


def pack(
    source: Source,
    folder: Path,
    split: str,
    packing: Packing,
    *,
    decode: Decode,
    workers: int = 0,
    stop_share: float = 0.1,
    per_shard: int = SAMPLES_PER_SHARD,
    progress: Callable[[int, int], None] | None = None,
) -> Packed:
    """Writes a source as one split of the data set in `folder`, beside splits that are there.

    Args:
        decode: gives a picture of bytes, RGB and upright; `at_least` lets it decode at a reduced scale.
        workers: processes that read, decode and encode.
        stop_share: more bad samples than this share end it.
        progress: called with (samples done, samples in all) after each shard.

    Raises:
        UserError: the split is there already, or an unfinished one of other pictures or settings is.
        BadData: too many bad samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = read_manifest(folder) if (folder / "manifest.json").exists() else {"splits": {}}
    if split in manifest["splits"]:
        raise UserError(f"{folder} has a split {split!r} already. Choose another name with --as, or another folder.")
    key = {"source": source.name, "pictures": source.pictures_sha256(), "packing": asdict(packing), "shard": per_shard}
    work = _Progress.read(folder / f"{split}.progress.json", json.loads(json.dumps(key)))
    if not work.shards:
        (folder / f"{split}-faults.jsonl").unlink(missing_ok=True)  # of a packing that was given up

    def read(position: int) -> Sample | Fault:
        try:
            sample = source[position]
        except BadSample as error:
            return Fault(error.sample_id, error.where, error.reason)
        try:
            return replace(sample, image=packing(sample.image, sample.id, decode))
        except BadImage as error:
            return Fault(sample.id, source.where(position), str(error).removeprefix(sample.id).strip(" ."))

    with FaultLog(folder / f"{split}-faults.jsonl", stop_share=stop_share) as log:
        if work.counts:
            log.load_state_dict(work.counts)
        else:
            for fault in source.faults:
                log.record(fault)
                log.seen(1)
        with OrderedLoader(read, workers=workers, ahead=AHEAD) as loader:
            position = work.next
            good = _Good(loader.stream(position, len(source)), log)
            while (shard := write_shard(folder, split, len(work.shards), islice(good, per_shard))) is not None:
                work.note(shard, position + good.num_taken, log.state_dict())
                if progress:
                    progress(work.next, len(source))
        summary = log.summary()
    shards = [Shard(**shard) for shard in work.shards]
    if not shards:
        raise UserError(f"{source.name} has no sample that can be packed: {summary}.")
    splits = {name: [Shard(**one) for one in told["shards"]] for name, told in manifest["splits"].items()}
    notes = {name: value for name, value in manifest.items() if name not in ("name", "version", "splits")}
    notes["packed"] = {**notes.get("packed", {}), split: {"from": source.name, **asdict(packing), "faults": summary}}
    write_manifest(folder, manifest.get("name", folder.name), {**splits, split: shards}, **notes)
    work.path.unlink(missing_ok=True)
    return Packed(sum(shard.count for shard in shards), summary)


class _Good(Iterator[Sample]):
    """The good samples of a stream; the bad ones go into the log. Counts both."""

    def __init__(self, stream: Iterator[Sample | Fault], log: FaultLog) -> None:
        self._stream, self._log, self.num_taken = stream, log, 0

    def __next__(self) -> Sample:
        while True:
            item = next(self._stream)
            self.num_taken += 1
            if isinstance(item, Sample):
                self._log.seen(1)
                return item
            self._log.record(item)
            self._log.seen(1)


@dataclass
class _Progress:
    """What is finished of a split: shards, the next sample, what was bad until there."""

    path: Path
    key: dict[str, Any]
    shards: list[dict[str, Any]]
    next: int
    counts: dict[str, Any] | None

    @classmethod
    def read(cls, path: Path, key: dict[str, Any]) -> "_Progress":
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            work = cls(path, kept["key"], kept["shards"], kept["next"], kept["counts"])
        except FileNotFoundError:
            return cls(path, key, [], 0, None)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{path} cannot be read. Delete it to pack the split anew.") from None
        if work.key != key:
            raise UserError(
                f"{path.parent} holds an unfinished split of other pictures or settings. Finish that one with the "
                f"command that began it, or delete {path.name} to begin anew."
            )
        return work

    def note(self, shard: Shard, position: int, counts: dict[str, Any]) -> None:
        self.shards.append(asdict(shard))
        self.next, self.counts = position, counts
        partial = self.path.with_suffix(".partial")
        partial.write_text(
            json.dumps({"key": self.key, "shards": self.shards, "next": self.next, "counts": counts}), encoding="utf-8"
        )
        os.replace(partial, self.path)


def _header(data: bytes) -> tuple[str, bool, tuple[int, int]]:
    """Format, whether EXIF asks for a turn, and size; of bytes that were decoded before, so nothing here can fail."""
    with Image.open(io.BytesIO(data)) as image:
        try:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        except Exception:  # a broken EXIF block, which turns nothing
            orientation = 1
        return image.format or "", orientation in range(2, 9), image.size


def _scaled(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """The size with the same shape whose shorter side is this."""
    factor = shorter / min(size)
    return max(shorter, round(size[0] * factor)), max(shorter, round(size[1] * factor))
