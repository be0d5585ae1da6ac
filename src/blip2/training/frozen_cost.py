"""What a frozen part costs, found by running it once on the meta device: any architecture, no memory, no arithmetic.

The same modules run as in training; operations are counted by torch's own counter, and what autograd keeps for the
backward pass by a hook.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip2.model.language import LanguageModel
from blip2.model.vision import ImageEncoder


@dataclass(frozen=True)
class PartCost:
    """Of one sample.

    Attributes:
        forward_flops, backward_flops: operations; backward 0 where no gradient passes.
        kept_bytes: what autograd keeps for the backward pass.
        layer_input_bytes: of that, what stays when each layer is computed again in the backward pass.
        num_layers: of those layers.
        working_bytes: what a forward pass without gradient needs at its widest place.
    """

    forward_flops: float
    backward_flops: float = 0
    kept_bytes: float = 0
    layer_input_bytes: float = 0
    num_layers: int = 1
    working_bytes: float = 0

    def checkpointed_bytes(self) -> float:
        """What is kept when each layer is computed again: the layers' inputs, and one whole layer."""
        return min(self.kept_bytes, self.layer_input_bytes + self.kept_bytes / self.num_layers)


@dataclass(frozen=True)
class ImageFeatures:
    """N tokens of width Dv, as an encoder gives them for a picture of a certain size."""

    num_tokens: int
    width: int


def image_features(encoder: ImageEncoder, image_size: int) -> ImageFeatures:
    """The shape of the features of a picture."""
    with torch.no_grad():
        found = encoder.encode(_picture(encoder, image_size))
    return ImageFeatures(found.shape[1], found.shape[2])


def encoder_cost(encoder: ImageEncoder, image_size: int, *, is_trained: bool) -> PartCost:
    """Of an image encoder on the meta device, in the dtype of its weights; one that trains has them in float32.

    Fused attention keeps no softmax; what is kept of it on the meta device, where none is fused, is told apart by its
    growth with the square of the number of image tokens and left out.
    """
    features = image_features(encoder, image_size)
    if not is_trained:
        forward, working = _count_forward(lambda: encoder.encode(_picture(encoder, image_size)), encoder)
        return PartCost(forward, working_bytes=working)
    encoder.network.requires_grad_(True)
    layers = _num_layers(encoder.network)
    counted = _count(lambda: encoder.encode(_picture(encoder, image_size)), encoder)
    larger = _count(lambda: encoder.encode(_picture(encoder, 2 * image_size)), encoder)
    small, large = features.num_tokens, image_features(encoder, 2 * image_size).num_tokens
    linear = (counted.kept_bytes * large**2 - larger.kept_bytes * small**2) / (small * large * (large - small))
    encoder.network.requires_grad_(False)
    return PartCost(
        counted.forward_flops,
        counted.backward_flops,
        kept_bytes=linear * small,
        layer_input_bytes=layers * features.num_tokens * features.width * encoder.dtype.itemsize,
        num_layers=layers,
    )


def language_cost(language: LanguageModel, *, visual: int, prompt: int, target: int) -> PartCost:
    """Of an LLM on the meta device that gives a loss on a target after a visual prompt, gradients passing through it.

    Args:
        language: frozen.
        visual, prompt, target: lengths in tokens. Logits are computed at the target's positions; what they keep is not
            counted here.
    """
    decoder_length = target if language.is_encoder_decoder else 0
    length = visual + prompt + target - decoder_length
    embeds = torch.empty(1, length, language.width, dtype=language.model.dtype, device="meta", requires_grad=True)
    run = _encoder_decoder_run if language.is_encoder_decoder else _decoder_run
    counted = _count(lambda: run(language.model, embeds, target), language.model)
    layers = _num_layers(language.model)
    positions = (length + decoder_length) / (2 if decoder_length else 1)  # each side has half of the layers
    return PartCost(
        counted.forward_flops,
        counted.backward_flops,
        kept_bytes=counted.kept_bytes,
        layer_input_bytes=layers * positions * language.width * embeds.itemsize,
        num_layers=layers,
    )


def _decoder_run(network: Any, embeds: Tensor, target: int) -> Tensor:
    """Logits at the last positions.

    Mask and positions are given as every layer takes them: what transformers does else looks at values, which the meta
    device does not have.
    """
    decoder = network.get_decoder()
    length = embeds.shape[1]
    given: dict[str, Tensor] = {"attention_mask": embeds.new_zeros(1, 1, length, length)}
    if "position_ids" in inspect.signature(decoder.forward).parameters:
        given["position_ids"] = torch.arange(length, device="meta")[None]
    hidden = decoder(inputs_embeds=embeds, use_cache=False, **given).last_hidden_state
    return network.get_output_embeddings()(hidden[:, -target:])


def _encoder_decoder_run(network: Any, embeds: Tensor, target: int) -> Tensor:
    """Logits of the whole target."""
    ids = torch.zeros(1, target, dtype=torch.long, device="meta")
    return network(inputs_embeds=embeds, decoder_input_ids=ids, use_cache=False).logits


def _count(run: Callable[[], Tensor], module: nn.Module) -> PartCost:
    """Operations both ways, and what the forward pass keeps, each tensor's memory once and without weights."""
    own = {_memory(tensor) for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _memory(tensor) not in own:
            kept[_memory(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        result = run()
        forward = counter.get_total_flops()
        result.sum().backward()
    for parameter in module.parameters():
        parameter.grad = None
    return PartCost(forward, counter.get_total_flops() - forward, kept_bytes=sum(kept.values()))


@torch.no_grad()
def _count_forward(run: Callable[[], Tensor], module: nn.Module) -> tuple[float, float]:
    """Operations, and the most bytes that go into and come out of one step of it beside the result."""
    widest = 0

    def look(step: nn.Module, given: Any, result: Any) -> None:
        nonlocal widest
        tensors = [tensor for tensor in (*given, result) if isinstance(tensor, Tensor)]
        widest = max(widest, sum(tensor.nbytes for tensor in tensors))

    hooks = [step.register_forward_hook(look) for step in module.modules() if not list(step.children())]
    with FlopCounterMode(display=False) as counter:
        result = run()
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), widest + result.nbytes


def _memory(tensor: Tensor) -> int:
    """The same for tensors that share their memory; on the meta device they have no address."""
    return tensor.untyped_storage()._cdata


def _picture(encoder: ImageEncoder, size: int) -> Tensor:
    return torch.empty(1, 3, size, size, dtype=encoder.dtype, device="meta")


def _num_layers(network: nn.Module) -> int:
    """Repeated layers: members of the lists of modules that are not within another list."""
    lists = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.ModuleList)]
    outermost = [
        part for name, part in lists if not any(name.startswith(f"{other}.") for other, _ in lists if other != name)
    ]
    return max(1, sum(len(part) for part in outermost))
