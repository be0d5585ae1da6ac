"""blip2 train: a training run from a recipe, resumed where it stood."""

import json
import signal
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe, such as mini/stage1, or a YAML file.")],
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Change a setting, e.g. optimizer.weight_decay=0.1. Repeatable."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data set: a folder, or a name such as open-pairs-zh.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; by default one of the recipe's name.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps of the whole run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Go on from the run's newest checkpoint, start anew, or PATH."),
    ] = "auto",
    devices: Annotated[
        int | None, typer.Option(min=1, help="Processes on this machine, one a GPU; as torchrun starts them.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Print the resolved recipe, each setting explained.")] = False,
) -> None:
    """Train a model by a recipe.

    A run that was stopped, even by a crash, goes on when the same command is run again; the result is that of an
    uninterrupted run. SIGTERM, SIGUSR1 and Ctrl-C save and leave; the exit code is then the signal's (130 for Ctrl-C).

    On several GPUs: --devices 8. On several machines: torchrun (its options) -m blip2 train RECIPE.
    """
    from blip2.training.recipe import apply_overrides, check_ranks, read_recipe, to_yaml

    flags = {
        "data.folder": None if data is None else str(data.resolve() if data.exists() else data),
        "training.steps": steps,
        "training.batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
    }
    overrides = [f"{name}={json.dumps(value)}" for name, value in flags.items() if value is not None]
    chosen = apply_overrides(read_recipe(recipe), [*(settings or ()), *overrides])
    if show:
        typer.echo(to_yaml(chosen, with_help=True), nl=False)
        return

    from blip2 import distributed, paths

    if devices and devices > 1 and not distributed.is_launched():
        check_ranks(chosen, devices)
        distributed.launch_again(devices)

    from blip2.training import loop
    from blip2.training.build import build

    run_dir = out or paths.runs_dir() / chosen.name
    run_dir.mkdir(parents=True, exist_ok=True)
    if distributed.is_launched():  # one that waits for the others in C would not obey what main set
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with distributed.joined():
        summary = loop.train(build(chosen, run_dir), chosen, run_dir, resume)
    if summary.stopped_by and not distributed.is_launched():  # torchrun says so itself
        raise typer.Exit(128 + signal.Signals[summary.stopped_by])
