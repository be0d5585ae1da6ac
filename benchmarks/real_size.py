"""Speed and memory at published sizes, quantised and not, beside transformers in the same run: docs/quantization.md.

    python benchmarks/real_size.py opt-2.7b --work build/real

Random weights in the published shapes, since the published weights are on a hub: times and memory do not depend on the
values. OPT-2.7B or FlanT5-XL with ViT-g and the paper's Q-Former, 8 GB on disk in bfloat16 and 4 GB more quantised; all
contenders are in memory at once, 15 GB. With --layers 0.5 both stacks are half as deep, which lets two float32 models
stand beside each other in 16 GB (--unquantised).
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from parity.hf_checkpoints import language_tokenizer  # noqa: E402

from blip2.checkpoints import quantize  # noqa: E402
from blip2.evaluation import speed, speed_report  # noqa: E402

OPT = {
    "model_type": "opt",
    "hidden_size": 2560,
    "word_embed_proj_dim": 2560,
    "ffn_dim": 10_240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50_272,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FLAN_T5 = {
    "model_type": "t5",
    "d_model": 2048,
    "d_kv": 64,
    "num_heads": 32,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 32_128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
SIZES = {"opt-2.7b": ("blip2-opt", OPT), "flan-t5-xl": ("blip2-t5", FLAN_T5)}


def main() -> None:
    """Makes what is not there yet, measures, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and the results")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=17)
    parser.add_argument("--batch", type=int, action="append", default=[])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--layers", type=float, default=1.0, help="share of the layers of both stacks")
    parser.add_argument("--unquantised", action="store_true", help="float32 beside float32, instead of int8 and int4")
    args = parser.parse_args()
    name = args.size if args.layers == 1 else f"{args.size}-{args.layers:g}"
    folder = args.work / name
    if not (folder / "config.json").is_file():
        make(folder, args.size, args.layers)
    if args.unquantised:
        contenders = [speed.Contender("blip2", str(folder)), speed.Contender("transformers", str(folder))]
    else:
        contenders = []
        for bits in ("int4", "int8"):
            small = args.work / f"{name}-{bits}"
            if not small.is_dir():
                print(f"quantising to {bits}", file=sys.stderr)
                quantize.write(folder, str(folder), small, bits, group_size=args.group_size)
            contenders.append(speed.Contender("blip2", str(small)))
        contenders.append(speed.Contender("transformers", str(folder), dtype="bfloat16"))
    plan = speed.Plan(args.runs, args.tokens, tuple(args.batch))
    found = speed.compare(contenders, plan, lambda text: print(text, file=sys.stderr))
    speed_report.save(args.work / f"{name}{'-float32' if args.unquantised else ''}-results", found)
    print(speed_report.as_text(found))


def make(folder: Path, size: str, layers: float) -> None:
    """A checkpoint of that size in Hugging Face's layout, in shards of 2 GB."""
    kind, language = SIZES[size]
    language = {
        key: round(value * layers) if key in ("num_hidden_layers", "num_layers", "num_decoder_layers") else value
        for key, value in language.items()
    }
    tokenizer = language_tokenizer(kind)
    tokenizer.add_tokens([f" w{i}" for i in range(len(tokenizer), language["vocab_size"] - 1)])  # each id is a text
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": 224, "width": 224}), tokenizer, num_query_tokens=32
    )
    config = Blip2Config(
        text_config=language,
        vision_config={"num_hidden_layers": round(39 * layers)},
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = Blip2ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():  # published starts are too small to tell pictures apart
        if parameter.ndim > 1 and not name.startswith("language_model."):
            torch.nn.init.normal_(parameter, std=0.05 if name.startswith("vision_model.") else 0.1)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, max_shard_size="2GB")
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
