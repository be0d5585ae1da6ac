"""A source: the samples of one data set or one split of it, whatever its layout on disk."""

from collections.abc import Iterator, Sequence
from typing import overload

from blip2.data.faults import Fault
from blip2.data.pictures import Pictures
from blip2.data.records import Records
from blip2.data.sample import Sample
from blip2.errors import BadSample


class Source(Sequence[Sample]):
    """Samples by number. Their texts are in memory (data/records.py); `source[i]` reads the picture from where it is.

    Attributes:
        name: what it was opened as.
        faults: what the reader met and left out: a line that cannot be read, the damaged end of an archive.
    """

    def __init__(self, name: str, records: Records, pictures: Pictures, faults: Sequence[Fault] = ()) -> None:
        self.name = name
        self.faults = tuple(faults)
        self._records = records
        self._pictures = pictures

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        """A sample with its picture.

        Raises:
            BadSample: nothing is said or asked of it, or its picture is missing, empty or no picture.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        where, sample = self._records[self._number(index)]
        if not sample.captions and not sample.questions:
            raise BadSample(sample.id, self._pictures.name(where), "has no caption, and nothing is asked of it")
        return _with_image(sample, self._pictures.read(where, sample.id))

    def picture(self, index: int) -> bytes:
        """A sample's picture, whether or not anything is said of it.

        Raises:
            BadSample: it is missing, empty or no picture.
        """
        where, sample = self._records[self._number(index)]
        return self._pictures.read(where, sample.id)

    def described(self) -> Iterator[Sample]:
        """All samples without their pictures (`image` is empty), which costs no reading.

        Those of which nothing is said are among them, so that the i-th here is `self[i]`.
        """
        return (sample for _, sample in self._records)

    def where(self, index: int) -> str:
        """The file that holds a sample's picture."""
        return self._pictures.name(self._records[self._number(index)][0])

    def pictures_sha256(self) -> str:
        """A hash of all pictures for caches made from them, without reading all of them: of names, sizes and times,
        or what the data set's manifest tells. Texts may change and leave it as it is."""
        return self._pictures.sha256(where for where, _ in self._records)

    def _number(self, index: int) -> int:
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(index)
        return number


def _with_image(sample: Sample, image: bytes) -> Sample:
    return Sample(**{**vars(sample), "image": image})
