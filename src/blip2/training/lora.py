"""LoRA adapters on the language model (Hu et al., 2021), by PEFT, for when the LLM may change a little after all."""

from typing import Any

import torch
from torch import nn

from blip2.errors import BadRecipe, MissingPart

ADAPTER = ".lora_"  # in the names of adapters' weights


def add_adapters(network: nn.Module, rank: int) -> int:
    """Puts trainable adapters beside the attention's projections that PEFT names for the architecture.

    Args:
        network: a Hugging Face language model, changed in place; its own weights stay frozen.
        rank: of the adapters; their output is scaled by 2.

    Returns:
        The number of trainable weights.

    Raises:
        MissingPart: PEFT is not installed.
        BadRecipe: PEFT does not know the architecture.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingPart("model.lora_rank needs PEFT: pip install 'blip2[finetune]'.") from None
    try:
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0), network)
    except ValueError as fault:
        raise BadRecipe(f"model.lora_rank: {type(network).__name__} has no adapters in PEFT ({fault}).") from None
    trained = [(name, weight) for name, weight in network.named_parameters() if ADAPTER in name]
    for _, weight in trained:
        weight.data = weight.data.float()
    network.requires_grad_(False)
    for _, weight in trained:
        weight.requires_grad_(True)
    return sum(weight.numel() for _, weight in trained)


@torch.no_grad()
def merge_adapters(network: nn.Module) -> None:
    """Adds what the adapters learnt to the weights beside them, and takes the adapters away."""
    from peft.tuners.lora import LoraLayer

    found: list[tuple[str, Any]] = [
        (name, part) for name, part in network.named_modules() if isinstance(part, LoraLayer)
    ]
    for name, layer in found:
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, layer.get_base_layer())
