"""AdamW over two groups of parameters, and the learning rate of each step (paper, section 4).

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

from blip2.training.recipe import OptimizerSection


def build_optimizer(module: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """AdamW over the module's trainable parameters.

    Args:
        module: parameters that need no gradient are left out.
        section: the recipe's optimizer section.
    """
    return torch.optim.AdamW(
        parameter_groups(module, section.weight_decay),
        lr=section.warmup_learning_rate,
        betas=section.betas,
        eps=section.epsilon,
        fused=True,  # one pass over memory a step; the same bits run after run (tests/training/test_optimizer.py)
    )


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """The trainable parameters in two groups: matrices with weight decay; biases, norms and single numbers without.

    The learned queries (1, Q, D) count as a matrix, as in LAVIS.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0},
    ]


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
