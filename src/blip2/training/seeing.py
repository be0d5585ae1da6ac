"""Pictures that a batch brings as they are, encoded in the step; a batch of ready image features passes through."""

from dataclasses import replace
from typing import Protocol, TypeVar

from torch import Tensor

from blip2.model.stage1 import Blip2Stage1
from blip2.model.stage2 import Blip2Stage2

PIXELS_NDIM = 4  # (B, 3, H, W); image features are (B, N, Dv)


class HasImages(Protocol):
    """A batch with `image_features`, which may be pixel_values still."""

    @property
    def image_features(self) -> Tensor: ...


Batch = TypeVar("Batch", bound=HasImages)


def seen(model: Blip2Stage1 | Blip2Stage2, batch: Batch) -> Batch:
    """The batch with image features (B, N, Dv) where it held pixel_values (B, 3, H, W)."""
    return replace(batch, image_features=image_features_of(model, batch.image_features))  # type: ignore[type-var]


def image_features_of(model: Blip2Stage1 | Blip2Stage2, images: Tensor) -> Tensor:
    """Image features (B, N, Dv): `images` encoded if they are pixel_values (B, 3, H, W), else as they are."""
    return model.encode_image(images) if images.ndim == PIXELS_NDIM else images
