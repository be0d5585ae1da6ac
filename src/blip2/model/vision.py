"""What an image encoder must offer, and how any Hugging Face vision tower offers it.

An image encoder is frozen: it turns pictures into image features and does not learn, but where a run that fine-tunes
asks it to (`unfreeze`). The paper removes the tower's last
layer and takes what the second-last one gives (section 4.1), with no norm after it: the norm over image features is the
Q-Former's own, trained with it.

    pixel_values (B, 3, H, W)  ->  image_features (B, N, Dv),   N = [CLS] where the tower has one + one per patch
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from blip2.errors import UnknownModel
from blip2.model.recorded import Recorded

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
MOST_RECORDED = 16  # pictures; a pass over more takes a GPU longer than launching it does


class ImageEncoder(nn.Module):
    """A frozen network that turns pictures into image features; subclasses say how in `encode`.

    Weights take no gradient and the network stays in evaluation mode, also after `.train()`, which would otherwise wake
    its dropout and batch-norm statistics when the module around it is trained.

    Attributes:
        is_exact: whether each picture is encoded by itself and without autocast, and its features are float32: on one
            device with as many threads the bits are then always the same. Slower where a batch pays, as on a GPU.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        image_size: int,
        width: int,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
    ) -> None:
        """Freezes the network and keeps what others must know of it.

        Args:
            network: the network that `encode` uses.
            name: what the encoder is called in a model's description.
            image_size: side of the square pictures it was made for.
            width: Dv, channels of a feature.
            image_mean, image_std: per colour, of values in 0..1: pixel_values = (rgb - mean) / std.
        """
        super().__init__()
        self.is_exact = False
        self._recorded: Recorded | None = None
        self.network = network.requires_grad_(False)
        self.name = name
        self.image_size = image_size
        self.width = width
        self.image_mean: tuple[float, float, float] = image_mean
        self.image_std: tuple[float, float, float] = image_std
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and so of the features, but for exact ones."""
        return next(self.network.parameters()).dtype

    def unfreeze(self) -> None:
        """Lets gradients through and into the weights, for fine-tuning; dropout stays asleep, as in LAVIS."""
        self.network.requires_grad_(True)

    def record(self) -> None:
        """Has passes over few pictures recorded and replayed from now on, where a GPU runs them (model/recorded.py).

        Such an encoder cannot be copied or pickled.
        """
        network = self.network
        self._recorded = Recorded(self.encode, weights=lambda: next(network.parameters()), most_rows=MOST_RECORDED)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Image features (B, N, Dv) of pixel_values (B, 3, H, W), already in the dtype of the weights."""
        raise NotImplementedError(f"{type(self).__name__} must define encode(pixel_values).")

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Image features; without gradient, unless it was unfrozen.

        Args:
            pixel_values: (B, 3, H, W), normalised with image_mean and image_std.

        Returns:
            (B, N, Dv), in the dtype of the weights; float32 where `is_exact`.
        """
        trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.network.parameters())
        with torch.set_grad_enabled(trains):
            if not self.is_exact:
                return (self._recorded or self.encode)(pixel_values.to(self.dtype))
            with torch.autocast(pixel_values.device.type, enabled=False):
                return torch.cat([self.encode(one.to(self.dtype)) for one in pixel_values.split(1)]).float()


@dataclass(frozen=True)
class Tower:
    """How one family of Hugging Face towers is read.

    Attributes:
        embed: (network, pixel_values) -> (B, N, Dv), patches with positions, ready for the first layer.
        drop_last_layer: whether the checkpoints still hold the layer the paper removes.
        image_mean, image_std: used where a checkpoint names none.
        layer_arguments: what each layer must be given besides the hidden states.
    """

    embed: Callable[[Any, Tensor], Tensor]
    drop_last_layer: bool
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    layer_arguments: Mapping[str, None] = field(default_factory=lambda: {"attention_mask": None})


def _embed_clip(network: Any, pixel_values: Tensor) -> Tensor:
    return network.pre_layrnorm(_embed(network, pixel_values))


def _embed(network: Any, pixel_values: Tensor) -> Tensor:
    return network.embeddings(pixel_values, interpolate_pos_encoding=True)


def _embed_dinov2(network: Any, pixel_values: Tensor) -> Tensor:
    return network.embeddings(pixel_values)  # interpolates unasked


# BLIP-2's own checkpoints hold 39 of EVA's 40 layers: the last is gone already.
TOWERS: dict[str, Tower] = {
    "CLIPVisionModel": Tower(_embed_clip, True, CLIP_MEAN, CLIP_STD),
    "Blip2VisionModel": Tower(_embed, False, CLIP_MEAN, CLIP_STD, layer_arguments={}),
    "InstructBlipVisionModel": Tower(_embed, False, CLIP_MEAN, CLIP_STD, layer_arguments={}),
    "SiglipVisionModel": Tower(_embed, True, HALF_MEAN, HALF_STD),
    "Dinov2Model": Tower(_embed_dinov2, True, IMAGENET_MEAN, IMAGENET_STD),
    "Dinov2WithRegistersModel": Tower(_embed_dinov2, True, IMAGENET_MEAN, IMAGENET_STD),
    "ViTModel": Tower(_embed, True, HALF_MEAN, HALF_STD),
}


class HuggingFaceVision(ImageEncoder):
    """A Hugging Face vision tower as an image encoder: its last hidden states, [CLS] first, before any final norm.

    Pictures of any size and shape are accepted: the tower's position embeddings are interpolated (bicubic) to the grid
    of patches; what does not fill a patch at the right or lower edge is cut off.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        image_size: int | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
        drop_last_layer: bool | None = None,
    ) -> None:
        """Takes the tower over: its last layer is deleted where the paper's second-last layer is wanted.

        Args:
            network: an instance of one of the classes in TOWERS.
            name: what the encoder is called in a model's description.
            image_size: side of the pictures to be given; None: the size the tower was trained at.
            image_mean, image_std: None: those the family was trained with.
            drop_last_layer: None: as the paper does, for checkpoints that still hold the layer.

        Raises:
            UnknownModel: for a tower that is not in TOWERS.
        """
        if type(network).__name__ not in TOWERS:
            raise UnknownModel(
                f"{type(network).__name__} is no vision tower we can read. These are: {', '.join(TOWERS)}. "
                "To add one, give it a line in TOWERS of blip2/model/vision.py."
            )
        tower = TOWERS[type(network).__name__]
        config: Any = network.config
        super().__init__(
            network,
            name=name,
            image_size=image_size or config.image_size,
            width=config.hidden_size,
            image_mean=image_mean or tower.image_mean,
            image_std=image_std or tower.image_std,
        )
        self.tower = tower
        if tower.drop_last_layer if drop_last_layer is None else drop_last_layer:
            del encoder_layers(network)[-1]

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Hidden states (B, N, Dv) after the last layer that is left, before any final norm."""
        hidden_states = self.tower.embed(self.network, pixel_values)  # (B, N, Dv)
        for layer in encoder_layers(self.network):
            hidden_states = layer(hidden_states, **self.tower.layer_arguments)  # (B, N, Dv)
        return hidden_states


class HuggingFaceConvNext(ImageEncoder):
    """A Hugging Face ConvNeXt as an image encoder: the cells of its last stage, row by row, before any norm.

    There is no [CLS], and nothing to interpolate: pictures of any size and shape are accepted.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        image_size: int | None = None,
        image_mean: tuple[float, float, float] | None = None,
        image_std: tuple[float, float, float] | None = None,
    ) -> None:
        """Arguments as of `HuggingFaceVision`; the network is a `ConvNextModel` or `ConvNextV2Model`."""
        config: Any = network.config
        super().__init__(
            network,
            name=name,
            image_size=image_size or config.image_size,
            width=config.hidden_sizes[-1],
            image_mean=image_mean or IMAGENET_MEAN,
            image_std=image_std or IMAGENET_STD,
        )

    def encode(self, pixel_values: Tensor) -> Tensor:
        """The last stage's cells (B, N, Dv)."""
        network: Any = self.network
        cells = network.encoder(network.embeddings(pixel_values)).last_hidden_state  # (B, Dv, H', W')
        return cells.flatten(2).transpose(1, 2)


def encoder_layers(network: nn.Module) -> nn.ModuleList:
    """The layers of a tower, under any of the three names that transformers gives them."""
    for path in ("layers", "encoder.layers", "encoder.layer"):
        try:
            layers = network.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList):
            return layers
    raise UnknownModel(f"{type(network).__name__} keeps its layers under no name we know.")
