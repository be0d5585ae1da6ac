"""How a step's module is laid over the ranks: the bridge on every one, the frozen parts whole or in shards.

    ddp    each rank has everything; gradients of the bridge are averaged (DistributedDataParallel)
    fsdp   each rank keeps a share of every frozen layer, and has the layer whole only while it is computed (FSDP2)

The bridge is small, so it is never sharded: its gradients, its optimizer and its checkpoints are the same either way.
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from blip2.distributed import world_size
from blip2.errors import BadRecipe


def shard_frozen_parts(module: nn.Module, device: torch.device) -> int:
    """Deals every frozen layer of the module out to the ranks; returns how many layers that were.

    Layers are the members of the frozen networks' lists of layers (nn.ModuleList); embeddings and heads stay whole.
    """
    if world_size() == 1:
        return 0
    mesh = init_device_mesh(device.type, (world_size(),))
    layers = list(frozen_layers(module))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    return len(layers)


def replicate(module: nn.Module, *, leaves_some_out: bool = False) -> nn.Module:
    """The module with the gradients of its trainable parameters averaged over the ranks in the backward pass.

    Args:
        module: as it is on every rank; the trainable parameters are made those of the first.
        leaves_some_out: whether a step may leave a trainable parameter without gradient.
    """
    if world_size() == 1:
        return module
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in module.named_buffers()]
    # The only way to have frozen parts left alone: they may be shards here, and need no broadcast at the start.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer PyTorch names the argument otherwise
        return DistributedDataParallel(
            module, broadcast_buffers=False, find_unused_parameters=leaves_some_out, gradient_as_bucket_view=True
        )


def not_yet_averaged(module: nn.Module, is_last: bool) -> AbstractContextManager:
    """Inside, gradients are kept to this rank unless this is the last part of a step."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) and not is_last else nullcontext()


def compute_activations_again(network: nn.Module) -> int:
    """Has the layers of a frozen LLM forget their activations and compute them again in the backward pass.

    Returns:
        The number of layers.

    Raises:
        BadRecipe: the network keeps no list of layers.
    """
    layers = set(frozen_layers(network))
    if not layers:
        raise BadRecipe(
            f"training.activation_checkpointing finds no layers in {type(network).__name__}; set it to false."
        )
    apply_activation_checkpointing(network, checkpoint_wrapper_fn=checkpoint_wrapper, check_fn=layers.__contains__)
    return len(layers)


def frozen_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of the longest lists of layers inside, of which no parameter is trained."""
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) > 1 and _is_frozen(child):
            yield from child
        else:
            yield from frozen_layers(child)


def _is_frozen(module: nn.Module) -> bool:
    parameters: list[Any] = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
