"""Fusing a frozen LLM's layers with torch.compile: on CPUs a step moves activations more than it multiplies."""

import shutil
from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from blip2.errors import UserError

COMPILERS = ("g++", "clang++", "c++")


def compile_layers(network: nn.Module) -> None:
    """Compile each repeated layer of a Hugging Face model in place, for any batch size and length; names stay.

    The layers share their code, so this costs about 20 seconds at the first step, not 20 a layer.

    Raises:
        UserError: there is no C++ compiler, or the model marks no layers.
    """
    if not any(shutil.which(name) for name in COMPILERS):
        raise UserError("training.compile needs a C++ compiler (g++ or clang++); install one or set it to false.")
    layers = [module for module in network.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(f"training.compile finds no layers in {type(network).__name__}; set it to false.")
    for layer in layers:
        layer.compile(dynamic=True)


def without_compiling() -> AbstractContextManager[None]:
    """Inside, compiled modules run as written: generation meets too many shapes to compile for each."""
    return torch.compiler.set_stance("force_eager")
