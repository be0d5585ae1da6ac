"""AdamW over groups of parameters, and the learning rate of each step (paper, section 4).

rate
 |      /‾‾\\_
 |     /     ‾‾\\__        linear from warmup_learning_rate over warmup_steps,
 |    /           ‾‾\\_    then half a cosine down to min_learning_rate at the last step
 |   /                ‾
 +---------------------- step
"""

import math

import torch
from torch import nn

from blip2.model.vision import ImageEncoder
from blip2.training.sections import OptimizerSection


def build_optimizer(module: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters.

    Args:
        module: parameters that need no gradient are left out.
        section: the recipe's optimizer section.
    """
    return torch.optim.AdamW(
        parameter_groups(module, section.weight_decay, section.layer_decay),
        lr=section.warmup_learning_rate,
        betas=section.betas,
        eps=section.epsilon,
        fused=True,  # one pass over memory a step; the same bits run after run (tests/training/test_optimizer.py)
    )


def parameter_groups(module: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """The trainable parameters in groups: matrices with weight decay; biases, norms and single numbers without.

    The learned queries (1, Q, D) count as a matrix, as in LAVIS. With a `layer_decay`, the layers of a trained image
    encoder have groups of their own, whose learning rate is `layer_share` of the others': layer_decay for the last one,
    its square for the one below, and so on down to the patches (LAVIS, get_optimizer_params).
    """
    depths = encoder_depths(module) if layer_decay < 1 else {}
    members: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            members.setdefault((depths.get(name, 0), parameter.ndim >= 2), []).append(parameter)
    for is_matrix in (True, False):
        members.setdefault((0, is_matrix), [])
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_matrix else 0.0,
            "layer_share": layer_decay**depth,
        }
        for (depth, is_matrix), parameters in sorted(members.items(), key=lambda item: (item[0][0], not item[0][1]))
    ]


def encoder_depths(module: nn.Module) -> dict[str, int]:
    """How deep below the bridge each parameter of the image encoder lies, by name: 1 in its last layer."""
    depths: dict[str, int] = {}
    for prefix, encoder in module.named_modules():
        if not isinstance(encoder, ImageEncoder):
            continue
        stacks = [(name, part) for name, part in encoder.named_modules() if isinstance(part, nn.ModuleList)]
        path, layers = max(stacks, key=lambda stack: len(stack[1]), default=("", nn.ModuleList()))
        for name, _ in encoder.named_parameters():
            inside = name.removeprefix(f"{path}.")
            number = int(inside.split(".")[0]) if path and name != inside else -1
            depths[f"{prefix}.{name}"] = len(layers) - number
    return depths


def learning_rate(step: int, section: OptimizerSection, num_steps: int) -> float:
    """The learning rate of one step.

    Args:
        step: counted from 0.
        section: the recipe's optimizer section.
        num_steps: steps of the whole run.
    """
    if step < section.warmup_steps:
        gained = step / section.warmup_steps
        return section.warmup_learning_rate + gained * (section.learning_rate - section.warmup_learning_rate)
    spent = (step - section.warmup_steps) / max(1, num_steps - 1 - section.warmup_steps)
    height = 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))
    return section.min_learning_rate + height * (section.learning_rate - section.min_learning_rate)
