"""A training step of stage 1 beside the original code (LAVIS): time and peak memory, for docs/speed.md.

    git clone https://github.com/salesforce/LAVIS
    python benchmarks/stage1_step.py --lavis LAVIS

One step is what training repeats: ITC, ITM and ITG forward and backward, then AdamW over all weights, with dropout.
Both sides have the same random weights in the published shapes and the same batch, are processes of their own and step
in turns. Before that, their losses and gradients without dropout must agree, or there is no result. With
`--features cached` (the default) image features of ViT-g's shape are given ready; with `--features encoder` a ViT-g of
`--vision-layers` layers makes them within the step. Texts are as long as COCO's captions: about 13 word pieces.
The processor's time is told beside the clock's: with `--threads 1` it holds on a machine that others use too.

On a GPU (`--device cuda`) ours computes in bfloat16 and LAVIS in its own float16 autocast with a gradient scaler.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip2.checkpoints import eva
from blip2.checkpoints.names import Names
from blip2.evaluation.speed import machine
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.model.vision import HuggingFaceVision
from blip2.training.memory import keep_freed_memory
from blip2.training.optimizer import build_optimizer
from blip2.training.sections import OptimizerSection
from blip2.training.stage1 import Stage1Step

SEED = 20
RATE = 1e-6  # LAVIS's and the paper's warm-up begins here
CLS, SEP = 101, 102
IMAGE_TOKENS, IMAGE_SIZE = 257, 224
SHAPES = {
    "published": QFormerConfig(),
    "tiny": QFormerConfig(
        vocab_size=211, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
        encoder_hidden_size=48, num_query_tokens=8, max_position_embeddings=40, embed_dim=32,
    ),
}  # fmt: skip
SIDES = ("blip2", "lavis")
TOLERANCE = 1e-4  # of losses, relative, in float32; worst seen 4e-7
GRADIENT_TOLERANCE = 1e-3
HALF_TOLERANCE = 2e-2  # where the frozen encoders compute in bfloat16 here and float16 there
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12, "T4": 65e12}


@dataclass(frozen=True)
class Setting:
    """What is measured; the same on both sides."""

    lavis: Path
    size: str
    device: str
    batch: int
    vision_layers: int
    dropout: float
    length: int
    precision: str
    threads: int

    @property
    def config(self) -> QFormerConfig:
        """The Q-Former's shape."""
        dropout = {"hidden_dropout_prob": self.dropout, "attention_probs_dropout_prob": self.dropout}
        return replace(SHAPES[self.size], **dropout)


def main() -> None:
    """Measures, prints and saves; ends with status 1 where the two sides do not compute the same."""
    setting, rounds, out = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, setting, Path(folder)) for name in SIDES]  # the first writes the weights
        try:
            checked = {side.name: side.ask("check") for side in sides}
            faults = _differences(checked, setting)
            if faults:
                raise SystemExit("The two sides do not compute the same: " + "; ".join(faults))
            seconds, processor = _rounds(sides, rounds)
            peaks = {side.name: side.ask("peak") for side in sides}
        finally:
            for side in sides:
                side.end()
    found = _summary(setting, checked, seconds, peaks)
    found |= {"processor_seconds": processor, "times_less_processor": _ratio(processor)}
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(_table(found))


def _arguments() -> tuple[Setting, int, Path | None]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lavis", type=Path, required=True, help="a checkout of LAVIS")
    parser.add_argument("--features", choices=("cached", "encoder"), default="cached")
    parser.add_argument("--vision-layers", type=int, default=39, help="of ViT-g, with --features encoder")
    parser.add_argument("--size", choices=SHAPES, default="published", help="tiny is for a test of this script")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=0, help="of every text, in word pieces; 0: as COCO's captions")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="of ours; GPU: bfloat16, CPU: float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    args = parser.parse_args()
    if not (args.lavis / "lavis" / "models" / "blip2_models" / "blip2_qformer.py").is_file():
        raise SystemExit(
            f"{args.lavis} is no checkout of LAVIS. Get one and name it: git clone https://github.com/salesforce/LAVIS"
        )
    if args.features == "encoder" and args.size != "published":
        parser.error("--features encoder needs --size published: ViT-g has one width")
    setting = Setting(
        lavis=args.lavis,
        size=args.size,
        device=args.device,
        batch=args.batch,
        vision_layers=args.vision_layers if args.features == "encoder" else 0,
        dropout=args.dropout,
        length=args.length,
        precision=args.precision or ("bfloat16" if args.device.startswith("cuda") else "float32"),
        threads=args.threads,
    )
    return setting, args.rounds, args.out


Seconds = dict[str, list[float]]  # of each side's steps, in turns


def _rounds(sides: list["Side"], rounds: int) -> tuple[Seconds, Seconds]:
    """Seconds and processor seconds; each side goes first every other round, and steps once before that."""
    for side in sides:
        side.ask("step")
    seconds: Seconds = {side.name: [] for side in sides}
    processor: Seconds = {side.name: [] for side in sides}
    for number in range(rounds):
        for side in sides if number % 2 else sides[::-1]:
            taken, computed = side.ask("step")
            seconds[side.name].append(taken)
            processor[side.name].append(computed)
            print(f"round {number + 1}: {side.name} {taken:.2f} s, of the processor {computed:.2f} s", file=sys.stderr)
    return seconds, processor


# What they compute with


def texts(setting: Setting) -> Text:
    """The captions: random words, [CLS] first and [SEP] last, padded to the longest."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.normal(13.0, 2.6, (setting.batch,), generator=generator).round().long().clamp(8, 32)
    lengths = torch.full_like(drawn, setting.length) if setting.length else drawn
    mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()  # (B, T)
    ids = torch.randint(SEP + 1, setting.config.vocab_size - 1, mask.shape, generator=generator) * mask
    ids[:, 0] = CLS
    ids[torch.arange(setting.batch), lengths - 1] = SEP
    return Text(ids.to(setting.device), mask.to(setting.device))


def images(setting: Setting) -> Tensor:
    """Image features (B, N, Dv), which differ from image to image, or pixels (B, 3, H, W) for an encoder."""
    generator = torch.Generator().manual_seed(SEED + 1)
    if setting.vision_layers:
        return torch.randn(setting.batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(setting.device)
    width = setting.config.encoder_hidden_size
    own = torch.randn(setting.batch, 1, width, generator=generator)
    return (own + torch.randn(setting.batch, IMAGE_TOKENS, width, generator=generator)).to(setting.device)


# The two sides


class Ours:
    """This project's step, as training/loop.py makes it."""

    def __init__(self, setting: Setting, weights_file: Path) -> None:
        keep_freed_memory()  # as training/build.py does
        torch.manual_seed(SEED)
        config = setting.config
        model = Blip2Stage1(None, config)
        if setting.vision_layers:
            model.vision_model = _vision(setting.vision_layers)
        _write_for_lavis(model, weights_file)
        self.device, self.autocasts = torch.device(setting.device), setting.precision == "bfloat16"
        self.module = Stage1Step(model.to(self.device), bos_id=config.vocab_size - 1)
        if self.device.type == "cuda" and model.vision_model is not None:
            model.vision_model.to(torch.bfloat16)
        self.text, self.images, self.groups = texts(setting), images(setting), torch.arange(setting.batch)
        self.section = OptimizerSection(warmup_learning_rate=RATE)
        self.optimizer = build_optimizer(self.module, self.section)

    def check(self) -> dict[str, float]:
        """The losses without dropout, with the hardest negatives, in full precision; and how long gradients are."""
        self.module.eval()
        drawn, self.module.negatives = self.module.negatives, "hardest"
        losses = self.module(self._batch())
        losses["loss"].backward()
        self.module.negatives = drawn
        model = self.module.model
        gradients = {
            "query_tokens": model.query_tokens,
            "vision norm": model.vision_layernorm.weight,
            "word embeddings": model.embeddings.word_embeddings.weight,
            "first layer": model.get_parameter("qformer.encoder.layer.0.attention.attention.query.weight"),
        }
        found = {name: losses[name] for name in ("itc", "itm", "itg")}
        found |= {f"gradient of {name}": one.grad.norm() for name, one in gradients.items() if one.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return {name: value.item() for name, value in found.items()}

    def step(self) -> None:
        """One step of training."""
        self.module.train()
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocasts else nullcontext():
            losses = self.module(self._batch())
        losses["loss"].backward()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        norm = torch.nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
        told = [value.item() for value in (*losses.values(), norm)]  # told to the log
        assert all(map(math.isfinite, told))
        torch.nn.utils.clip_grads_with_norm_(parameters, self.section.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _batch(self) -> Stage1Batch:
        model = self.module.model
        features = self.images if model.vision_model is None else model.encode_image(self.images)
        return Stage1Batch(features.float(), self.text, self.groups.to(self.device))


def _vision(num_layers: int) -> HuggingFaceVision:
    """A ViT-g of random weights."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    network = Blip2VisionModel(Blip2VisionConfig(num_hidden_layers=num_layers))
    return HuggingFaceVision(network, name="vit-g", image_size=IMAGE_SIZE)


def _write_for_lavis(model: Blip2Stage1, file: Path) -> None:
    """Our weights under LAVIS's names."""
    weights = Names("blip2", "lavis").rename(model.state_dict())
    if model.vision_model is not None:
        network: Any = model.vision_model.network
        vision = {name: one for name, one in network.state_dict().items() if not name.startswith(eva.UNUSED)}
        weights |= {f"{eva.PREFIX}{name}": tensor for name, tensor in eva.to_lavis(vision).items()}
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)


def _theirs(setting: Setting, weights_file: Path) -> Any:
    import lavis_stage1

    torch.manual_seed(SEED)
    model = lavis_stage1.build(setting.lavis, setting.config, load_file(weights_file), setting.vision_layers)
    text = texts(setting)
    tokens = lavis_stage1.Tokens(text.input_ids, text.attention_mask, setting.config.vocab_size - 1)
    return lavis_stage1.Lavis(model, tokens, images(setting), RATE)


class Side:
    """One side's process."""

    def __init__(self, name: str, setting: Setting, folder: Path) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        args = (name, setting, folder / "weights.safetensors", other)
        self.process = context.Process(target=_serve, args=args, daemon=True)
        self.process.start()
        other.close()
        self._received()

    def ask(self, order: str) -> Any:
        """check: its losses; step: seconds and processor seconds of one; peak: the most bytes it held."""
        self.pipe.send(order)
        return self._received()

    def end(self) -> None:
        """Lets the process go."""
        if self.process.is_alive():
            self.pipe.send("end")
        self.process.join(60)

    def _received(self) -> Any:
        while not self.pipe.poll(1):
            if not self.process.is_alive():
                raise SystemExit(f"The process of {self.name} ended with status {self.process.exitcode}.")
        kind, value = self.pipe.recv()
        if kind == "fault":
            raise SystemExit(f"{self.name}: {value}")
        return value


def _serve(name: str, setting: Setting, weights_file: Path, pipe: Connection) -> None:
    """Builds a side and answers to orders until it is told to end."""
    torch.set_num_threads(setting.threads)
    try:
        side = Ours(setting, weights_file) if name == "blip2" else _theirs(setting, weights_file)
        pipe.send(("ready", None))
        while (order := pipe.recv()) != "end":
            if order == "check":
                pipe.send(("check", side.check()))
            elif order == "step":
                pipe.send(("step", _seconds(side.step, setting.device)))
            else:
                pipe.send(("peak", _peak(setting.device)))
    except EOFError:  # the measuring process is gone
        return
    except SystemExit as fault:
        pipe.send(("fault", str(fault)))
    except Exception:
        pipe.send(("fault", traceback.format_exc()))


def _seconds(step: Any, device: str) -> tuple[float, float]:
    begin, computed = time.perf_counter(), time.process_time()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, time.process_time() - computed


def _peak(device: str) -> int:
    """The most bytes this process held: of the GPU's memory, or of the machine's."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# What was found


def _differences(checked: dict[str, dict[str, float]], setting: Setting) -> list[str]:
    """What the two sides do not agree on."""
    ours, theirs = (checked[name] for name in SIDES)
    halves = setting.vision_layers and setting.device != "cpu"
    faults = []
    for name, value in ours.items():
        allowed = HALF_TOLERANCE if halves else GRADIENT_TOLERANCE if name.startswith("gradient") else TOLERANCE
        if not abs(value - theirs[name]) <= allowed * abs(theirs[name]):
            faults.append(f"{name} is {value:.7g} here and {theirs[name]:.7g} there")
    return faults


def _ratio(seconds: Seconds) -> float:
    """How many times the other side's median is ours."""
    ours, theirs = (statistics.median(seconds[name]) for name in SIDES)
    return theirs / ours


def _summary(setting: Setting, checked: Any, seconds: Seconds, peaks: dict[str, int]) -> dict[str, Any]:
    ratios = [theirs / ours for ours, theirs in zip(*(seconds[name] for name in SIDES), strict=True)]
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    flops = step_flops(setting, texts(replace(setting, device="cpu")).input_ids.shape[1])
    rate = flops / medians["blip2"]
    found = {
        "setting": {name: str(value) for name, value in vars(setting).items() if name != "lavis"},
        "checked": checked,
        "seconds": seconds,
        "median_seconds": medians,
        "times_faster": _ratio(seconds),
        "times_faster_by_round": ratios,
        "peak_bytes": peaks,
        "peak_ratio": peaks["blip2"] / peaks["lavis"],
        "samples_per_second": {name: setting.batch / taken for name, taken in medians.items()},
        "flops": flops,
        "flops_per_second": rate,
        "machine": machine(),
    }
    gpu = found["machine"]["gpu"] if setting.device != "cpu" else None
    peak = next((most for name, most in PEAKS.items() if gpu and name in gpu), None)
    return found | ({"utilisation": rate / peak} if peak else {})


def step_flops(setting: Setting, text_tokens: int) -> float:
    """Operations of our step in matrix products, without attention's own: forward, and twice as many backward.

    Passes: the image alone, the text alone, three joint ones (ITM), the caption after the queries; image features are
    projected once. The frozen encoder has no backward.
    """
    config = setting.config
    h, f, q = config.hidden_size, config.intermediate_size, config.num_query_tokens
    looking = sum(config.has_cross_attention(i) for i in range(config.num_hidden_layers))
    token = 2 * config.num_hidden_layers * (4 * h * h + 2 * h * f)
    cross = 2 * looking * q * 2 * h * h  # queries and outputs; then keys and values
    projected = 2 * looking * IMAGE_TOKENS * 2 * config.encoder_hidden_size * h
    vocabulary = 2 * text_tokens * (h * h + h * config.vocab_size)
    passes = q * token + cross + text_tokens * token + 3 * ((q + text_tokens) * token + cross) + text_tokens * token
    width, wide, n = 1408, 6144, IMAGE_TOKENS
    vision = 2 * setting.vision_layers * (n * (4 * width * width + 2 * width * wide) + 2 * n * n * width)
    return setting.batch * (3 * (passes + projected + vocabulary) + vision)


def _table(found: dict[str, Any]) -> str:
    ours, theirs = SIDES
    seconds, peaks = found["seconds"], found["peak_bytes"]
    spread, computed = ({name: _spread(one[name]) for name in SIDES} for one in (seconds, found["processor_seconds"]))
    ratios = found["times_faster_by_round"]
    lines = [
        "|  | blip2 | LAVIS | ratio |",
        "|---|---:|---:|---:|",
        f"| a step, median (range) | {spread[ours]} | {spread[theirs]} | "
        f"{found['times_faster']:.2f} times as fast ({min(ratios):.2f}-{max(ratios):.2f}) |",
        f"| processor time of a step | {computed[ours]} | {computed[theirs]} | "
        f"{found['times_less_processor']:.2f} times less |",
        f"| pairs a second | {found['samples_per_second'][ours]:.2f} | {found['samples_per_second'][theirs]:.2f} | |",
        f"| peak memory | {peaks[ours] / 1e9:.2f} GB | {peaks[theirs] / 1e9:.2f} GB | {found['peak_ratio']:.2f} |",
        "",
        f"{len(ratios)} rounds; {found['flops_per_second'] / 1e9:,.0f} GFLOP/s of ours; setting {found['setting']}",
        f"machine {found['machine']}",
    ]
    if "utilisation" in found:
        lines.append(f"utilisation of the GPU by ours: {found['utilisation']:.1%}")
    return "\n".join(lines)


def _spread(taken: list[float]) -> str:
    return f"{statistics.median(taken):.2f} s ({min(taken):.2f}-{max(taken):.2f})"


if __name__ == "__main__":
    main()
