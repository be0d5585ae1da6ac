"""EfficientNet-Lite, the mini model's image encoder, and the image features it gives to the Q-Former.

A convolution network without squeeze-and-excite, with ReLU6 and TensorFlow's "SAME" padding, so that the published
weights hold (github.com/tensorflow/tpu, efficientnet/lite). Seven stages; at 256 pixels:

    stage 5  120 channels  16 x 16  ─────────────────────────────┐
    stage 7  352 channels   8 x 8   ── enlarged twice, bilinear ─┴─ 472 per cell ┐
    position: sines and cosines of row and column ──────────────────  40 per cell ┴─ image_features (B, 256, 512)
"""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from blip2.model.vision import ImageEncoder

# Variant -> (width factor, depth factor), as published.
COEFFICIENTS = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}

# Of each stage before scaling: (blocks, kernel, stride, expansion, channels).
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS, HEAD_CHANNELS, NUM_CLASSES = 32, 1280, 1000  # the same in all variants of Lite
BATCH_NORM_EPS = 1e-3
LOCAL_STAGE, GLOBAL_STAGE = 4, 6  # indices into STAGES: the last with stride 16, the last of all

# (rgb - 127) / 128 on 0..255, as the weights were trained, for values in 0..1.
IMAGE_MEAN, IMAGE_STD = (127 / 255, 127 / 255, 127 / 255), (128 / 255, 128 / 255, 128 / 255)


def scaled_channels(channels: int, factor: float) -> int:
    """Channels times factor, to the nearest multiple of 8 that is not over 10 % smaller."""
    scaled = channels * factor
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": with stride 2 the odd pixel goes to the right and below."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = (kernel - 1) // 2 if stride == 1 else 0
        super().__init__(in_channels, out_channels, kernel, stride, padding=padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        if self.stride[0] > 1:
            (top, bottom), (left, right) = (self._edges(size) for size in input.shape[-2:])
            input = F.pad(input, (left, right, top, bottom))
        return super().forward(input)

    def _edges(self, size: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        return missing // 2, missing - missing // 2


class Block(nn.Module):
    """Inverted residual: 1x1 to more channels, depthwise, 1x1 back; the input is added where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = in_channels * expansion
        if expansion > 1:
            self.expand_conv = SameConv2d(in_channels, inner, 1)
            self.bn0 = nn.BatchNorm2d(inner, eps=BATCH_NORM_EPS)
        self.depthwise_conv = SameConv2d(inner, inner, kernel, stride, groups=inner)
        self.bn1 = nn.BatchNorm2d(inner, eps=BATCH_NORM_EPS)
        self.project_conv = SameConv2d(inner, out_channels, 1)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)
        self.expands = expansion > 1
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        inner = F.relu6(self.bn0(self.expand_conv(maps)), inplace=True) if self.expands else maps
        inner = F.relu6(self.bn1(self.depthwise_conv(inner)), inplace=True)
        out = self.bn2(self.project_conv(inner))
        return out.add_(maps) if self.is_residual else out


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite with its ImageNet classifier; the weights' names are the package's less the underscores."""

    def __init__(self, variant: int) -> None:
        """Builds variant 0, 1 or 2 with random weights."""
        super().__init__()
        width, depth = COEFFICIENTS[variant]
        self.conv_stem = SameConv2d(3, STEM_CHANNELS, 3, stride=2)
        self.bn0 = nn.BatchNorm2d(STEM_CHANNELS, eps=BATCH_NORM_EPS)
        self.blocks = nn.ModuleList()
        self.stage_ends: list[int] = []  # index of each stage's last block
        self.stage_channels: list[int] = []
        in_channels = STEM_CHANNELS
        for index, (num_blocks, kernel, stride, expansion, channels) in enumerate(STAGES):
            if 0 < index < len(STAGES) - 1:  # Lite scales the depth of all stages but the first and the last
                num_blocks = math.ceil(num_blocks * depth)
            out_channels = scaled_channels(channels, width)
            for block in range(num_blocks):
                self.blocks.append(Block(in_channels, out_channels, kernel, stride if block == 0 else 1, expansion))
                in_channels = out_channels
            self.stage_ends.append(len(self.blocks) - 1)
            self.stage_channels.append(out_channels)
        self.conv_head = SameConv2d(in_channels, HEAD_CHANNELS, 1)
        self.bn1 = nn.BatchNorm2d(HEAD_CHANNELS, eps=BATCH_NORM_EPS)
        self.fc = nn.Linear(HEAD_CHANNELS, NUM_CLASSES)

    def load_package_weights(self, state_dict: dict[str, Tensor]) -> None:
        """Loads the state dict of the registry package, every tensor of it and nothing else.

        Raises:
            RuntimeError: a tensor is missing, too many or of another shape.
        """
        renamed = {name.removeprefix("_").replace("._", "."): tensor for name, tensor in state_dict.items()}
        self.load_state_dict(renamed, strict=True)

    def stages(self, pixel_values: Tensor) -> list[Tensor]:
        """Feature maps at the end of each of the seven stages.

        Args:
            pixel_values: (B, 3, H, W), normalised with IMAGE_MEAN and IMAGE_STD.

        Returns:
            Seven of (B, C_s, H_s, W_s).
        """
        maps = F.relu6(self.bn0(self.conv_stem(pixel_values)), inplace=True)  # (B, 32, H/2, W/2)
        ends = []
        for index, block in enumerate(self.blocks):
            maps = block(maps)
            if index in self.stage_ends:
                ends.append(maps)
        return ends

    def classify(self, pixel_values: Tensor) -> Tensor:
        """ImageNet-1k logits (B, 1000) of pixel_values (B, 3, H, W)."""
        maps = F.relu6(self.bn1(self.conv_head(self.stages(pixel_values)[-1])))  # (B, 1280, H/32, W/32)
        return self.fc(maps.mean(dim=(2, 3)))  # (B, 1000)

    forward = classify

    def fold_batch_norms(self) -> None:
        """Moves each batch norm into the convolution before it: the same function up to rounding, faster."""
        self.eval()
        _fold(self, "conv_stem", "bn0")
        _fold(self, "conv_head", "bn1")
        for block in self.blocks:
            if block.expands:
                _fold(block, "expand_conv", "bn0")
            _fold(block, "depthwise_conv", "bn1")
            _fold(block, "project_conv", "bn2")


def _fold(owner: nn.Module, conv: str, norm: str) -> None:
    setattr(owner, conv, fuse_conv_bn_eval(getattr(owner, conv), getattr(owner, norm)))
    setattr(owner, norm, nn.Identity())


def position_channels(rows: int, columns: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines that say where in the picture a cell of a grid lies.

    Half of the channels tell the row, half the column. Positions are fractions of the picture, so that "left" reads the
    same in a grid of any size. Frequencies run from half a wave over the picture, one-to-one with the position, to four
    waves, which part neighbours in a grid of 16.

    Args:
        rows, columns: of the grid.
        channels: a multiple of 4.

    Returns:
        (rows * columns, channels) float32, row by row, of mean square 1/2.
    """
    frequencies = torch.logspace(0, 3, channels // 4, base=2, device=device) * math.pi  # (channels/4,)

    def waves(size: int) -> Tensor:
        centres = (torch.arange(size, device=device) + 0.5) / size  # (size,)
        angles = centres[:, None] * frequencies  # (size, channels/4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)  # (size, channels/2)

    by_row = waves(rows)[:, None].expand(-1, columns, -1)
    by_column = waves(columns)[None].expand(rows, -1, -1)
    return torch.cat([by_row, by_column], dim=-1).flatten(0, 1)  # (rows * columns, channels)


# Standard deviations of the two maps over 200 stamps and 300 Fluent 3D emoji on white at 256 pixels (stage 5: 6.78 and
# 6.88; stage 7 once enlarged: 2.39 and 2.34; means within 0.25 of zero). Dividing by them lets all groups weigh alike.
LOCAL_STD, GLOBAL_STD = 6.8, 2.4
POSITION_STD = math.sqrt(0.5)  # by construction
POSITION_CHANNELS = 40  # brings Lite2's 472 channels to 512


class Stages(Protocol):
    """Computes stages 5 and 7 in the network's place: `graphs.convolutions.Stages`."""

    def takes(self, pixel_values: Tensor) -> bool:
        """Whether it can, of such pictures (B, 3, H, W)."""
        ...

    def maps(self, pixel_values: Tensor) -> list[Tensor]:
        """Both maps (B, C, h, w)."""
        ...


class EfficientNetTokens(ImageEncoder):
    """Image features of EfficientNet-Lite: one per cell of 16 x 16 pixels, what is there and where it lies.

    Stage 7 knows what things are, stage 5 where their edges and colours are; no channel of a convolution tells the
    position, so fixed ones are added. `features` alone is what a cache need hold: positions follow from the grid.

    Attributes:
        faster: what computes the two stages sooner where it can, from the weights that were there when it was made.
    """

    def __init__(self, network: EfficientNetLite, *, name: str, image_size: int = 256) -> None:
        """Takes the network over.

        Args:
            network: with trained weights, in the dtype the features shall have; best with its batch norms folded.
            name: what the encoder is called in a model's description.
            image_size: side of the pictures to be given; a multiple of 32 lets the two maps lie exactly on each other.
        """
        feature_width = network.stage_channels[LOCAL_STAGE] + network.stage_channels[GLOBAL_STAGE]
        super().__init__(
            network.to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
            name=name,
            image_size=image_size,
            width=feature_width + POSITION_CHANNELS,
            image_mean=IMAGE_MEAN,
            image_std=IMAGE_STD,
        )
        self.feature_width = feature_width
        self.faster: Stages | None = None

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Image features with positions, (B, N, Dv)."""
        rows, columns = (math.ceil(size / 16) for size in pixel_values.shape[-2:])
        return self.add_positions(self.features(pixel_values), grid=(rows, columns))

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """What is seen in each cell, without its position.

        Args:
            pixel_values: (B, 3, H, W), normalised with image_mean and image_std.

        Returns:
            (B, N, 472 for Lite2) with N = ceil(H / 16) * ceil(W / 16), row by row, of standard deviation near 1.
        """
        pixel_values = pixel_values.to(self.dtype).contiguous(memory_format=torch.channels_last)
        network = self.network
        assert isinstance(network, EfficientNetLite)
        if self.faster is not None and self.faster.takes(pixel_values):
            local, whole = self.faster.maps(pixel_values)  # (B, 120, H/16, W/16), (B, 352, H/32, W/32)
        else:
            stages = network.stages(pixel_values)
            local, whole = stages[LOCAL_STAGE], stages[GLOBAL_STAGE]
        whole = F.interpolate(whole, size=local.shape[-2:], mode="bilinear", align_corners=False)
        joined = torch.cat([whole / GLOBAL_STD, local / LOCAL_STD], dim=1)  # (B, 472, H/16, W/16)
        return joined.flatten(2).transpose(1, 2).contiguous()  # (B, N, 472)

    def add_positions(self, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Features with the channels that tell the cell's place.

        Args:
            features: (B, N, 472), as `features` gives them, perhaps from a cache.
            grid: rows and columns; None: of a square picture.

        Returns:
            (B, N, 512), in the dtype of the features.

        Raises:
            ValueError: N is not rows * columns.
        """
        num_cells = features.shape[1]
        rows, columns = grid or (math.isqrt(num_cells),) * 2
        if rows * columns != num_cells:
            raise ValueError(f"{num_cells} features do not fill a grid of {rows} x {columns}; give the right grid.")
        positions = position_channels(rows, columns, POSITION_CHANNELS, features.device) / POSITION_STD  # (N, 40)
        return torch.cat([features, positions.to(features.dtype).expand(len(features), -1, -1)], dim=-1)
