"""Peak memory of loading a model, as a ratio to its weights, beside transformers: a table for docs/parity.md.

    python benchmarks/loading_memory.py --layers 24

Makes a BLIP-2 of random weights in Hugging Face's layout (OPT of that many layers of 2,048, a ViT of half as many of
1,408, the paper's Q-Former; 3.3 GB in float16 with 24) and loads it in a process of its own per row. Two peaks are
read, each less what the process held after its imports: of the memory it alone holds (RssAnon, looked at every 2 ms),
and of that with the pages of mapped files it has read (VmHWM), which the kernel takes back where memory is short.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOADERS = {
    "blip2.load": "import blip2; load = lambda: blip2.load(folder, dtype=dtype)",
    "transformers": (
        "from transformers import Blip2ForConditionalGeneration as peer; "
        "load = lambda: peer.from_pretrained(folder, dtype=dtype)"
    ),
}
MEASURE = """
import sys, threading, time, torch, transformers
from transformers import Blip2Processor, AutoModelForCausalLM, OPTForCausalLM, Blip2VisionModel
import blip2.inference.loading, transformers.models.blip_2.modeling_blip_2
transformers.utils.logging.disable_progress_bar()
folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
{loader}
def held(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before, alone, most, is_loading = held("VmRSS"), held("RssAnon"), 0, True
def look():
    global most
    while is_loading:
        most = max(most, held("RssAnon"))
        time.sleep(0.002)
watch = threading.Thread(target=look)
watch.start()
model = load()
is_loading = False
watch.join()
most = max(most, held("RssAnon"))
modules = [model] if isinstance(model, torch.nn.Module) else [model.vision_model, model.generator.model]
tensors = {{t.data_ptr(): t.nbytes for m in modules for t in m.state_dict().values()}}
print(most - alone, held("VmHWM") - before, sum(tensors.values()))
"""


def main() -> None:
    """Makes the model, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.layers)
        print("| loaded as | by | weights, GB | peak / weights | with mapped files |\n|---|---|---|---|---|")
        for dtype in ("float16", "bfloat16", "float32"):
            for name, loader in LOADERS.items():
                command = [sys.executable, "-c", MEASURE.format(loader=loader), folder, dtype]
                runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(args.runs)]
                counts = [tuple(map(int, run.stdout.split()[-3:])) for run in runs]
                alone, mapped = (statistics.median(row[i] / row[2] for row in counts) for i in (0, 1))
                print(f"| {dtype} | {name} | {counts[0][2] / 1e9:.2f} | {alone:.2f} | {mapped:.2f} |", flush=True)


def make(folder: Path, layers: int) -> None:
    """Writes the model, float16, in shards of 1 GB."""
    import torch
    from parity.hf_checkpoints import language_tokenizer
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

    tokenizer = language_tokenizer("blip2-opt")
    text = {"model_type": "opt", "hidden_size": 2048, "ffn_dim": 8192, "num_attention_heads": 32}
    text |= {"num_hidden_layers": layers, "word_embed_proj_dim": 2048}
    vision = {
        "hidden_size": 1408,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_hidden_layers": layers // 2,
    }
    config = Blip2Config(text_config=text, vision_config=vision, image_token_index=len(tokenizer))
    torch.set_default_dtype(torch.float16)
    model = Blip2ForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="1GB")
    Blip2Processor(BlipImageProcessorPil(size={"height": 224, "width": 224}), tokenizer).save_pretrained(folder)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    main()
