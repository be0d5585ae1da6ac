"""blip2 plan: what a training run will need, before anything is fetched or paid."""

import json as json_format
from typing import Annotated, Literal

import typer

from blip2.cli import options


def plan(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe, such as paper/stage1-vit-g, or a YAML file.")],
    gpu: Annotated[
        str,
        typer.Option(
            help="a100-40g, a100-80g, h100, h200, b200, l40s, 4090, 3090, t4; or cpu: this computer, measured now."
        ),
    ] = "a100-80g",
    gpus: Annotated[int, typer.Option(min=1, help="How many of them.")] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting of the recipe. Repeatable."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(help="Share of the peak that a run reaches; the paper's: 0.12 (stage 1), 0.19 (stage 2).")
    ] = 0.4,
    price: Annotated[float | None, typer.Option(min=0, help="Of one processor for an hour.")] = None,
    strategy: Annotated[
        Literal["ddp", "fsdp"] | None,
        typer.Option(help="A copy of the model on each, or shards; by default the recipe's."),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--activation-checkpointing/--no-activation-checkpointing",
            help="Compute layers again in the backward pass, to save memory; by default the recipe's.",
        ),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest text of a batch; by default data.max_text_length.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Tell a run's parameters, memory, work, days and price; nothing is fetched.

    Exit code 1 says that it does not fit.
    """
    from blip2.training.plan import Options, make_plan
    from blip2.training.plan_report import as_record, as_text
    from blip2.training.recipe import apply_overrides, read_recipe

    chosen = apply_overrides(read_recipe(recipe), settings or ())
    made = make_plan(
        chosen,
        Options(
            gpu=gpu,
            gpus=gpus,
            utilisation=utilisation,
            price=price,
            strategy=strategy,
            activation_checkpointing=checkpointing,
            text_tokens=text_tokens,
        ),
    )
    print(json_format.dumps(as_record(made), ensure_ascii=False) if json else as_text(made))
    if not made.fits:
        raise typer.Exit(1)
