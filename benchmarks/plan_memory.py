"""The memory that `blip2 plan --gpu cpu` foretells beside what a run takes: a table for docs/how-to/plan.md.

    python benchmarks/plan_memory.py
    python benchmarks/plan_memory.py mini/stage2 --set training.precision=float32 --runs 5
    python benchmarks/plan_memory.py --tensors --set training.batch_size=24 --set training.answer_samples=0

Each recipe runs a few steps of the real loop in a process of its own, with the real parts, random image features of
the right shape, and texts as long as the plan takes them to be. Measured is the most that the process held at once
(VmHWM) less what it held when everything was loaded; the plan's part of that is all but the weights. With --tensors it
is the tensors of one step that are alive at once, without what the C library loses between them.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECIPES = ("mini/stage1", "mini/stage2", "mini/instruct")
STEPS = 4
SMALLER = ("training.compile=false", "data.validation=[]", f"training.steps={STEPS}", "training.log_every=1000")
WEIGHTS = ("frozen weights", "trained weights")  # are there when everything is loaded


def main() -> None:
    """Measures each recipe in processes of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tensors", action="store_true", help="measure tensors alive at once")
    parser.add_argument("--measure", action="store_true", help="one recipe, in this process; prints JSON")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps((measure_tensors if args.tensors else measure)(args.recipes[0], args.settings)))
        return
    print(
        "| recipe | precision | foretold, GB | measured, GB | spread | foretold / measured |\n|---|---|---|---|---|---|"
    )
    for recipe in args.recipes:
        given = [f"--set={setting}" for setting in args.settings]
        command = [sys.executable, __file__, recipe, "--measure", *(["--tensors"] if args.tensors else []), *given]
        runs = [subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True) for _ in range(args.runs)]
        found = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
        peaks = [one["measured"] for one in found]
        told, peak = found[0]["foretold"], statistics.median(peaks)
        print(
            f"| {recipe} | {found[0]['precision']} | {told / 1e9:.2f} | {peak / 1e9:.2f} "
            f"| {min(peaks) / 1e9:.2f}-{max(peaks) / 1e9:.2f} | {told / peak:.2f} |",
            flush=True,
        )


def measure(name: str, settings: list[str]) -> dict[str, Any]:
    """Bytes foretold and measured of one recipe, weights left out of both."""
    from blip2.training import loop
    from blip2.training.memory import keep_freed_memory
    from blip2.training.plan import Options, make_plan
    from blip2.training.recipe import apply_overrides, read_recipe

    recipe = apply_overrides(read_recipe(name), [*SMALLER, *settings])
    plan = make_plan(recipe, Options(gpu="cpu"))
    keep_freed_memory()
    module, batch = parts(recipe)
    measured = 0

    def batches(number: int) -> Any:
        nonlocal measured
        if number == STEPS - 1:  # read ahead: the steps before the last two are done
            measured = held("VmHWM") - loaded
        return batch()

    give_back()
    loaded = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with tempfile.TemporaryDirectory() as run_dir:
        loop.train(loop.Job(module=module, batches=batches), recipe, run_dir)
    foretold = sum(part.bytes for part in plan.memory if part.name not in WEIGHTS)
    return {"foretold": foretold, "measured": measured, "precision": plan.precision}


def measure_tensors(name: str, settings: list[str]) -> dict[str, Any]:
    """Bytes foretold and measured of the tensors alive at once in one step, before any optimiser keeps moments."""
    import weakref

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    from blip2.training.plan import Options, make_plan
    from blip2.training.recipe import apply_overrides, read_recipe

    recipe = apply_overrides(read_recipe(name), [*SMALLER, *settings])
    plan = make_plan(recipe, Options(gpu="cpu"))
    module, make = parts(recipe)
    batch = make()
    alive: dict[int, int] = {parameter.untyped_storage()._cdata: 0 for parameter in module.parameters()}
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal most
            result = func(*args, **(kwargs or {}))
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in alive:
                    memory = tensor.untyped_storage()
                    alive[memory._cdata] = memory.nbytes()
                    weakref.finalize(memory, alive.pop, memory._cdata, None)
            most = max(most, sum(alive.values()))
            return result

    with Watch():
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16"):
            loss = module(batch)["loss"]
        loss.backward()
    named = ("activations", "logits and their gradients", "bfloat16 copies of weights")
    foretold = sum(part.bytes for part in plan.memory if part.name in (*named, "features and similarities of ITC"))
    return {"foretold": foretold, "measured": most, "precision": plan.precision}


def parts(recipe: Any) -> tuple[Any, Any]:
    """The module of a step, and a function that makes a batch."""
    import torch

    from blip2.checkpoints import frozen
    from blip2.inference.stage1_losses import Stage1Batch
    from blip2.model.stage1 import Blip2Stage1, Text, load_text_weights
    from blip2.model.stage2 import Blip2Stage2
    from blip2.preprocessing.text import QFormerTokenizer
    from blip2.training import step_cost
    from blip2.training.instruct import AnswerBatch, InstructBatch, InstructStep
    from blip2.training.parts import frozen_dtype, load_language_model, qformer_config
    from blip2.training.stage1 import Sentences, Stage1Step
    from blip2.training.stage2 import Stage2Batch, Stage2Step

    training, section = recipe.training, recipe.model
    dtype = frozen_dtype(recipe)
    told = step_cost.StepSettings.of(recipe)
    shape = step_cost.step_parts(recipe, told, "bfloat16" if dtype == torch.bfloat16 else "float32")
    length, image, rows = step_cost.lengths(recipe, told, shape.language), shape.image, training.micro_batch_size
    text_init = frozen.load_text_init(section.text_init)
    vocabulary = QFormerTokenizer(text_init.tokenizer_file).vocab_size
    config = qformer_config(recipe, text_init, image.width, vocabulary)

    def text(tokens: int, limit: int, count: int = rows) -> Text:
        return Text(torch.randint(5, limit, (count, tokens)), torch.ones(count, tokens, dtype=torch.long))

    def features(count: int = rows) -> torch.Tensor:
        return torch.randn(count, image.num_tokens, image.width)

    if recipe.stage == "stage1":
        model = Blip2Stage1(None, config)
        load_text_weights(model, text_init.state_dict)
        model.embeddings.word_embeddings.requires_grad_(not section.freeze_word_embeddings)
        weight = training.sentence_weight
        sentences = Sentences(copy.deepcopy(model).requires_grad_(False), weight, weight) if weight else None
        weights = (training.itc_weight, training.itm_weight, training.itg_weight)
        step = Stage1Step(
            model,
            bos_id=vocabulary - 1,
            negatives=training.negatives,
            weights=weights,
            matched_share=training.matched_share,
            sentences=sentences,
        )
        return step, lambda: Stage1Batch(features(), text(length.text, vocabulary), torch.arange(rows))

    language, _ = load_language_model(section.language, dtype)
    language.model.set_attn_implementation("eager")
    words = language.model.config.vocab_size
    for weight in language.model.parameters():
        weight.sum()  # weights may be mapped from a file: they are to be in memory before anything is measured
    is_aware = section.instruction_aware
    bridge = Blip2Stage2(None, config, language, instruction_aware=is_aware)
    load_text_weights(bridge, text_init.state_dict)
    if is_aware:
        bridge.embeddings.word_embeddings.requires_grad_(not section.freeze_word_embeddings)

    def spoken() -> Stage2Batch:
        instruction = text(length.text, vocabulary) if is_aware else None
        return Stage2Batch(features(), text(length.prompt, words), text(length.target, words), instruction)

    if not training.answer_samples:
        return Stage2Step(bridge), spoken
    classified = training.answer_samples // training.accumulation

    def both() -> InstructBatch:
        answer = torch.randint(0, training.num_answers, (classified,))
        listed = AnswerBatch(features(classified), text(length.text, vocabulary, classified), answer)
        return InstructBatch(spoken(), listed)

    return InstructStep(bridge, training.num_answers), both


def held(name: str) -> int:
    """A figure of this process's memory in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def give_back() -> None:
    """Returns what the C library keeps of freed memory, so that the steps do not find it lying there."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


if __name__ == "__main__":
    main()
