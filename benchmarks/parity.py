"""How far this project's numbers are from the originals', as the table in docs/parity.md.

    python benchmarks/parity.py --out docs/parity.md

Tiny models with wide random weights, float32 on a CPU: Hugging Face's classes run in the same process, the original
code (LAVIS) gave its numbers to the golden file of tests/parity. `make test` holds every row below 1e-5.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from parity import lavis_golden  # noqa: E402
from parity.hf_checkpoints import KINDS, PROMPTS, forgetful, make, pictures, token_losses  # noqa: E402

import blip2  # noqa: E402

CLASSES = {
    "blip2-opt": "Blip2ForConditionalGeneration, OPT",
    "blip2-t5": "Blip2ForConditionalGeneration, T5",
    "instructblip-llama": "InstructBlipForConditionalGeneration, Llama",
    "instructblip-t5": "InstructBlipForConditionalGeneration, T5",
    "blip2-retrieval": "Blip2ForImageTextRetrieval",
}


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "parity.md")
    parser.add_argument("--images", type=int, default=50)
    args = parser.parse_args()
    rows = [row for kind in KINDS for row in hugging_face(kind, args.images)] + lavis()
    args.out.write_text(document(rows, args.images), encoding="utf-8")
    print(args.out.read_text(encoding="utf-8"))


def hugging_face(kind: str, count: int) -> list[tuple[str, str, str]]:
    """(class, what, largest difference) over `count` random pictures."""
    with tempfile.TemporaryDirectory() as folder:
        peer, images = make(kind, Path(folder) / "checkpoint"), pictures(count)
        model = forgetful(blip2.load(peer.folder))
        pixel_values = peer.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            vision = peer.model.vision_model
            features = model.image_features(images)
            found = {
                "pixel values": apart(model.transform.batch(images), pixel_values),
                "image features": apart(vision.post_layernorm(features), vision(pixel_values).last_hidden_state),
            }
            found |= retrieval(peer, model, images) if kind == "blip2-retrieval" else generation(peer, model, images)
    return [(CLASSES[kind], what, far) for what, far in found.items()]


def generation(peer, model, images) -> dict[str, str]:
    """Visual prompts, then whole generations."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(images))]
    ours = model.generator.visual_prompt(model.image_features(images), prompts)
    theirs, said = [], {1: [], 5: []}
    for image, prompt in zip(images, prompts, strict=True):
        inputs = peer.processor(images=[image], text=[prompt], return_tensors="pt")
        given = {name: inputs[name] for name in ("qformer_input_ids", "qformer_attention_mask") if name in inputs}
        theirs.append(peer.model.get_image_features(inputs["pixel_values"], **given).pooler_output)
        start = 0 if peer.model.config.text_config.is_encoder_decoder else inputs["input_ids"].shape[1]
        for beams in said:
            new_ids = peer.model.generate(**inputs, max_new_tokens=12, num_beams=beams)[:, start:]
            said[beams] += [text.strip() for text in peer.processor.batch_decode(new_ids, skip_special_tokens=True)]
    found = {"visual prompts": apart(ours, torch.cat(theirs))}
    pairs = [token_losses(peer, model, *asked, "a red cup left") for asked in zip(images, prompts, strict=True)]
    found["loss of every token"] = apart(*(torch.cat(side) for side in zip(*pairs, strict=True)))
    for beams, expected in said.items():
        given = model.generate(images, prompts, max_new_tokens=12, num_beams=beams)
        same = sum(a == b for a, b in zip(given, expected, strict=True))
        found["greedy text" if beams == 1 else "text by 5 beams"] = f"{same} of {len(expected)} equal"
    return found


def retrieval(peer, model, images) -> dict[str, str]:
    """Similarities and match logits of every picture with a text of its own."""
    texts = ["a red cup", "which colour is the star left of the cat ?", "cat"]
    itc, itm = [], []
    for image in images:
        inputs = peer.processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
        matches = model.match(image, texts)
        theirs = peer.model(**inputs).logits_per_image[0]
        itc.append(torch.tensor([row.itc for row in matches]) - theirs)
        theirs = peer.model(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(dim=-1)[:, 1]
        itm.append(torch.tensor([row.itm for row in matches]) - theirs)
    return {name: f"{float(torch.cat(row).abs().max()):.1e}" for name, row in (("ITC", itc), ("ITM", itm))}


def lavis() -> list[tuple[str, str, str]]:
    """The golden file's rows."""
    golden, model = lavis_golden.load()
    losses = lavis_golden.losses(golden, model)
    found = {f"{name.upper()} loss": apart(losses[name].detach(), golden[name]) for name in ("itc", "itm", "itg")}
    found |= {
        f"gradient of {theirs}": apart(gradient, golden[f"gradient.{theirs}"])
        for theirs, gradient in lavis_golden.gradients(golden, model).items()
    }
    rows = [("LAVIS Blip2Qformer", what, far) for what, far in found.items()]
    for name in lavis_golden.SPEAKERS:
        golden, loss, model = lavis_golden.speaker_loss(name)
        rows.append((f"LAVIS {name}", "loss", apart(loss.detach(), golden["loss"])))
        gradient = model.query_tokens.grad
        rows.append((f"LAVIS {name}", "gradient of query_tokens", apart(gradient, golden["gradient.query_tokens"])))
    return rows


def apart(ours: Tensor, theirs: Tensor) -> str:
    """The largest difference."""
    return f"{float((ours - theirs).abs().max()):.1e}"


def document(rows: list[tuple[str, str, str]], count: int) -> str:
    """The page."""
    lines = "\n".join(f"| {kind} | {what} | {far} |" for kind, what, far in rows)
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    return f"""# Equal to the originals

Largest differences on tiny models with wide random weights, float32, CPU: {count} random pictures of random shapes for
Hugging Face's classes ({versions}, same process), six pairs for LAVIS (506965b, its own numbers).
Made by `python benchmarks/parity.py`; `make test` checks the same.

LAVIS trains OPT to say the beginning token too, which stands between the visual prompt and the text; a recipe here does
not. The row below gives both that token. How to repeat LAVIS's numbers: `benchmarks/lavis_golden.py`.

| class | what | largest difference |
|---|---|---|
{lines}
"""


if __name__ == "__main__":
    main()
