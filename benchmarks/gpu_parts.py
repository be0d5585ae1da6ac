"""What the parts of a caption take on a GPU, launched kernel by kernel and recorded: docs/speed.md.

    python benchmarks/gpu_parts.py

ViT-g, the Q-Former and OPT-2.7B with random weights in bfloat16, each by itself. Medians in milliseconds. Without a GPU
(`--device cpu --layers 0.05`) it runs as well, and records nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Blip2VisionConfig, Blip2VisionModel, OPTConfig, OPTForCausalLM

from blip2.evaluation.speed import machine
from blip2.model.config import QFormerConfig
from blip2.model.key_values import make_cache
from blip2.model.language import DecoderLM
from blip2.model.recorded import record
from blip2.model.replay import LENGTHS, FixedStep
from blip2.model.row_step import RowStep
from blip2.model.stage2 import Blip2Stage2
from blip2.model.vision import HuggingFaceVision

PROMPT, WIDTH, VISION_WIDTH, QUERIES = 8, 2560, 1408, 32
READ = QUERIES + PROMPT
Times = dict[str, dict[str, float]]


def main() -> None:
    """Makes each part, measures it, lets it go."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers of the encoder and the LLM")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 32, 64])
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    found: Times = {}
    with torch.inference_mode():
        if args.device != "cpu":
            found["copy"] = {"terabytes a second": _bandwidth()}
        for measure in (_vision, _qformer, _language):
            measure(found, args)
    if args.out is not None:
        args.out.write_text(json.dumps({"machine": machine(), "milliseconds": found}, indent=1) + "\n")
    print(json.dumps(machine()))


def _vision(found: Times, args: argparse.Namespace) -> None:
    with torch.device(args.device):
        network = Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=max(1, round(39 * args.layers))))
    encoder = HuggingFaceVision(network.bfloat16(), name="ViT-g")
    for rows in args.rows:
        pixels = torch.randn(rows, 3, 224, 224, device=args.device)
        _tell(found, f"image encoder, {rows} pictures", partial(encoder, pixels), args)


def _qformer(found: Times, args: argparse.Namespace) -> None:
    with torch.device(args.device):
        model = Blip2Stage2(None, QFormerConfig(encoder_hidden_size=VISION_WIDTH), None, language_width=WIDTH).eval()
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        for rows in args.rows:
            features = torch.randn(rows, 257, VISION_WIDTH, device=args.device, dtype=dtype)
            name = f"Q-Former in {str(dtype).removeprefix('torch.')}, {rows} pictures"
            _tell(found, name, partial(model.visual_prompt, features), args)


def _language(found: Times, args: argparse.Namespace) -> None:
    shape = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 4 * WIDTH, "num_attention_heads": 32}
    layers = max(1, round(32 * args.layers))
    with torch.device(args.device):
        network = OPTForCausalLM(OPTConfig(**shape, num_hidden_layers=layers, vocab_size=50_272)).bfloat16()
    language_model = DecoderLM(network, stop_ids=[2], pad_id=1)
    for rows in args.rows:
        visual = torch.randn(rows, QUERIES, WIDTH, device=args.device, dtype=torch.bfloat16)
        ids = torch.ones(rows, PROMPT, dtype=torch.long, device=args.device)
        read = partial(language_model._read, visual, ids, torch.ones_like(ids))
        _tell(found, f"prompt of {READ} positions, {rows} rows", read, args)
    for rows in args.rows:
        _tell(found, f"a token, {rows} rows", _step(network, rows, None)._forward, args, begin=True)
    if RowStep.runs_on(torch.device(args.device)):
        row_step = RowStep(network)
        _tell(found, "a token, 1 row, own kernels", _step(network, 1, row_step)._forward, args, begin=True)


def _step(network: Any, rows: int, row_step: RowStep | None) -> FixedStep:
    """A step over buffers that the prompt fills."""
    cache = make_cache(network.config)
    heads, width = network.config.num_attention_heads, WIDTH // network.config.num_attention_heads
    for layer in range(network.config.num_hidden_layers):
        states = torch.randn(2, rows, heads, READ, width, device=network.device, dtype=network.dtype)
        cache.update(states[0], states[1], layer)
    return FixedStep(network, cache, rows, LENGTHS, row_step)


def _tell(found: Times, name: str, run: Callable[[], Any], args: argparse.Namespace, *, begin: bool = False) -> None:
    """Measures and prints; with `begin` `run` is a step's, which is put back to the prompt's end before each run."""
    step = getattr(run, "__self__", None) if begin else None

    def ready() -> None:
        if isinstance(step, FixedStep):
            step._slot.fill_(READ - 1)
            step._positions.fill_(READ - 1)

    found[name] = {"launched": _median(run, ready, args)}
    if args.device != "cpu":
        tape = step._tape if isinstance(step, FixedStep) else record(run, torch.device(args.device))[0]
        if tape is not None:
            found[name]["recorded"] = _median(tape.replay, ready, args)
    print(name, {kind: round(value, 3) for kind, value in found[name].items()}, flush=True)


def _median(run: Callable[[], Any], ready: Callable[[], None], args: argparse.Namespace) -> float:
    taken = []
    for number in range(args.runs + 2):
        ready()
        _wait(args.device)
        start = time.perf_counter()
        run()
        _wait(args.device)
        if number >= 2:
            taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


def _bandwidth() -> float:
    """Of a copy on the GPU, reading and writing together."""
    source = torch.randn(1 << 30, device="cuda").bfloat16()
    target = torch.empty_like(source)
    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(seconds) / 1e12


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
