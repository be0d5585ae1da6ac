"""Where a batch's images come from: features that were made once, or pictures read, varied and encoded in each step.

CachedImages    row of the feature cache      (N, Dv)        the encoder has seen every view beforehand
OnlineImages    file -> view -> pixel values  (3, H, W)      the step encodes them, and may train the encoder
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from blip2.data.faults import Fault, fault_of
from blip2.data.features import FeatureCache
from blip2.data.source import Source
from blip2.errors import BadImage, BadSample
from blip2.preprocessing.images import ImageTransform, load_image


class Images(Protocol):
    """The images of a source, by number."""

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        """Image features (N, Dv) or pixel values (3, H, W) of a view that `rng` chooses.

        Raises:
            BadSample: the picture cannot be read.
        """
        ...


@dataclass(frozen=True)
class CachedImages:
    """Views whose features are on disk.

    Attributes:
        features: row `index * num_views + view`.
        num_views: cached views of a picture.
        token_share: share of a view's tokens that a step is shown, drawn anew each time.
        name: of the source, for messages.
    """

    features: FeatureCache
    num_views: int = 1
    token_share: float = 1.0
    name: str = ""

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        """(N, Dv) float32."""
        view = int(rng.integers(self.num_views))
        features = self.features.read(index * self.num_views + view)  # (N, Dv)
        if np.isnan(features[0, 0]):
            fault = self.features.faults.get(index) or Fault(
                str(index), self.name, "has no features, for its picture could not be read when they were made"
            )
            raise BadSample(fault.sample, fault.where, fault.reason)
        if self.token_share < 1:
            kept = max(1, round(len(features) * self.token_share))
            features = features[np.sort(rng.permutation(len(features))[:kept])]
        return torch.from_numpy(np.array(features)).float()


@dataclass(frozen=True)
class OnlineImages:
    """Pictures that are read when their turn comes.

    Attributes:
        samples: whose pictures.
        transform: to the encoder's size and normalisation.
        is_varied: whether each time a random crop is taken, instead of the plain picture.
        flip: whether half of the crops are mirrored.
    """

    samples: Source
    transform: ImageTransform
    is_varied: bool = True
    flip: bool = False

    def read(self, index: int, rng: np.random.Generator) -> Tensor:
        """(3, H, W) float32, normalised."""
        sample = self.samples[index]
        try:
            image = load_image(sample.image, name=sample.id)
        except BadImage as error:
            fault = fault_of(error, sample_id=sample.id, where=self.samples.where(index))
            raise BadSample(fault.sample, fault.where, fault.reason) from None
        if not self.is_varied:
            return self.transform(image)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return self.transform.augment(image, generator, flip=self.flip)
