"""EVA's ViT-g as LAVIS names it (visual_encoder.*, where it was fine-tuned) and as Hugging Face does.

LAVIS stores the biases of queries and values, Hugging Face one vector with zeros for the keys between them.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

from blip2.errors import BadData

PREFIX = "visual_encoder."
HEAD_WIDTH = 88  # of ViT-g, the one encoder that LAVIS fine-tuned; the weights alone do not tell
_NAMES = (  # LAVIS, Hugging Face
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.{}.norm1.", "encoder.layers.{}.layer_norm1."),
    ("blocks.{}.norm2.", "encoder.layers.{}.layer_norm2."),
    ("blocks.{}.attn.qkv.", "encoder.layers.{}.self_attn.qkv."),
    ("blocks.{}.attn.proj.", "encoder.layers.{}.self_attn.projection."),
    ("blocks.{}.mlp.", "encoder.layers.{}.mlp."),
)
_BIASES = re.compile(r"blocks\.(\d+)\.attn\.q_bias")
_QKV_BIAS = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.qkv\.bias")
UNUSED = "post_layernorm."  # the norm over image features is the bridge's own


def from_lavis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By the names of `Blip2VisionModel`; `weights` by LAVIS's, without visual_encoder. in front.

    Raises:
        BadData: a weight that EVA's ViT lacks.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if found := _BIASES.fullmatch(name):
            values = weights[name.replace("q_bias", "v_bias")]
            bias = torch.cat([tensor, torch.zeros_like(values), values])
            renamed[f"encoder.layers.{found[1]}.self_attn.qkv.bias"] = bias
        elif not name.endswith(".attn.v_bias"):
            renamed[_translate(name, 0, 1)] = tensor
    return renamed


def to_lavis(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back; a bias of the keys is left out, as it changes no attention."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if found := _QKV_BIAS.fullmatch(name):
            queries, _, values = tensor.chunk(3)
            renamed[f"blocks.{found[1]}.attn.q_bias"], renamed[f"blocks.{found[1]}.attn.v_bias"] = queries, values
        elif not name.startswith(UNUSED):
            renamed[_translate(name, 1, 0)] = tensor
    return renamed


def image_size(weights: Mapping[str, Tensor]) -> int:
    """Side of the pictures, in pixels, by LAVIS's names."""
    grid = round((weights["pos_embed"].shape[1] - 1) ** 0.5)
    return grid * weights["patch_embed.proj.weight"].shape[-1]


@contextmanager
def as_folder(weights: Mapping[str, Tensor], size: int) -> Iterator[Path]:
    """A folder with a `Blip2VisionModel` of these weights, for pictures of that side; gone afterwards."""
    patches = weights["embeddings.patch_embedding.weight"]
    width = patches.shape[0]
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=weights["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith("layer_norm1.weight") for name in weights),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=size,
        patch_size=patches.shape[-1],
    )
    with torch.device("meta"):
        model = Blip2VisionModel(config)
    norm = {f"{UNUSED}weight": torch.ones(width), f"{UNUSED}bias": torch.zeros(width)}
    model.load_state_dict({**norm, **weights}, strict=True, assign=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def _translate(name: str, source: int, target: int) -> str:
    number = re.search(r"\.(\d+)\.", name)
    for row in _NAMES:
        old, new = (row[side].format(number[1]) if number else row[side] for side in (source, target))
        if name.startswith(old):
            return new + name[len(old) :]
    raise BadData(f"The image encoder holds {name}, which EVA's ViT-g lacks. Only ViT-g is converted.")
