"""At the published size, OPT-2.7B with ViT-g in bfloat16: transformers' features, prompts, logits and words.

Random weights, since no checkpoint can be had without a hub; 7.8 GB on disk and as much in memory, a few minutes.
"""

import gc
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

import blip2
from blip2.model.writing import Decoding, write

from .hf_checkpoints import PROMPTS, pictures
from .real_sizes import make

BYTES = 8_000_000_000
NEW_TOKENS = 5
ROUNDING = 0.125  # between two logits of about 4: four steps of bfloat16


@pytest.mark.slow
@torch.inference_mode()
def test_opt_2_7b_with_vit_g_gives_the_numbers_of_transformers(tmp_path):
    if shutil.disk_usage(tmp_path).free < 2 * BYTES or available_memory() < 1.3 * BYTES:
        pytest.skip("needs 16 GB of disk and 11 GB of memory")
    folder, images, prompts = tmp_path / "opt-2.7b", pictures(2), list(PROMPTS[:2])
    processor = make(folder, "opt-2.7b")
    gc.collect()
    theirs = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16).eval()
    inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt").to(torch.bfloat16)
    pixel_values = inputs["pixel_values"]
    features = raw_features(theirs, pixel_values)
    told, mask = theirs.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"]
    for part in (theirs.qformer, theirs.language_projection, theirs.vision_model.post_layernorm):
        part.float()  # as the bridge is kept here; the rest is in bfloat16
    seen = theirs.vision_model.post_layernorm(features.float())
    queries = theirs.query_tokens.float().expand(len(images), -1, -1)
    read = theirs.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
    visual_prompts = theirs.language_projection(read)
    told[inputs["input_ids"] == theirs.config.image_token_index] = visual_prompts.to(told.dtype).flatten(0, 1)
    told_all = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW_TOKENS}
    found = theirs.language_model.generate(inputs_embeds=told, attention_mask=mask, **told_all)
    said, logits = found.sequences, torch.stack(found.logits, dim=1).float()  # (B, T), (B, T, V)
    del theirs
    gc.collect()
    ours = blip2.load(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in ours.generator.model.qformer.parameters()} == {torch.float32}
    here = ours.image_features(images)
    torch.testing.assert_close(here, features, atol=0, rtol=0)
    prompts_here = ours.generator.visual_prompt(here, prompts)
    torch.testing.assert_close(prompts_here, visual_prompts, atol=1e-5, rtol=1e-5)
    assert (prompts_here[0] - prompts_here[1]).abs().max() > 0.01  # they see
    asked = ours.generator.tokenizer.encode_prompts(prompts)
    language_model = ours.generator.language_model
    reading, first = language_model.start(prompts_here, asked.input_ids, asked.attention_mask)
    after_theirs = [first, *(language_model.step(reading, token) for token in said.t()[:-1])]
    torch.testing.assert_close(torch.stack(after_theirs, dim=1), logits, atol=ROUNDING, rtol=0)
    assert logits.std() > 4 * ROUNDING
    started = language_model.start(prompts_here, asked.input_ids, asked.attention_mask)
    words = write(language_model, *started, Decoding(max_new_tokens=NEW_TOKENS))
    num_same = 0
    for ours_said, theirs_said, of_row in zip(words, said, logits, strict=True):
        best, second = of_row.topk(2).values.unbind(1)
        for word, expected, margin in zip(ours_said, theirs_said, best - second, strict=True):
            if word != expected:  # padding lies elsewhere, so sums are rounded otherwise, and ties are broken otherwise
                assert margin <= ROUNDING
                break
            num_same += 1
    assert num_same >= NEW_TOKENS


def raw_features(model, pixel_values):
    """What transformers' tower gives before its last norm."""
    vision = model.vision_model
    return vision.encoder(inputs_embeds=vision.embeddings(pixel_values)).last_hidden_state


def available_memory():
    """Bytes that can be had without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    line = next(line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024
