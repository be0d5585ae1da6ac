"""Quick looks at held-out data while a run goes on; evaluation/ has the full tables."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blip2.data.features import FeatureCache
from blip2.data.sample import Sample
from blip2.model.stage1 import Blip2Stage1
from blip2.model.stage2 import Blip2Stage2
from blip2.model.writing import Decoding, write
from blip2.objectives.itc import image_text_similarity
from blip2.preprocessing.text import QFormerTokenizer
from blip2.training.batches import Stage2Batches, as_text
from blip2.training.stage2 import Stage2Batch, Stage2Step

CHUNK = 128


def retrieval_found(
    model: Blip2Stage1, tokenizer: QFormerTokenizer, samples: Sequence[Sample], features: FeatureCache
) -> dict[str, float]:
    """Share of pictures whose caption is the most similar, or among the ten most similar, of the split's captions."""
    captions = [sample.captions[0] for sample in samples]
    candidates = sorted(set(captions))
    rank_of = {caption: i for i, caption in enumerate(candidates)}
    own = torch.tensor([rank_of[caption] for caption in captions])
    texts = [as_text(tokenizer.encode(candidates[i : i + CHUNK])) for i in range(0, len(candidates), CHUNK)]
    text_embeds = torch.cat([model.embed_texts(text) for text in texts])  # (C, E)
    ranked = []
    for first in range(0, len(samples), CHUNK):
        image_embeds = model.embed_images(_rows(features, range(first, min(first + CHUNK, len(samples)))))
        ranked.append(image_text_similarity(image_embeds, text_embeds).topk(min(10, len(candidates)), dim=1).indices)
    hits = torch.cat(ranked) == own[:, None]  # (B, 10)
    return {"r1": float(hits[:, 0].float().mean()), "r10": float(hits.any(dim=1).float().mean())}


def answers_right(
    model: Blip2Stage2, batches: Stage2Batches, samples: Sequence[Sample], features: FeatureCache, limit: int
) -> dict[str, float]:
    """Loss on `limit` questions (or captions, where a split has no questions), and the share answered exactly."""
    asked = [(i, q.question, q.answer) for i, sample in enumerate(samples) for q in sample.questions][
        :: _stride(samples, limit)
    ]
    prompts = batches.prompts
    if asked:
        texts = [(i, q, prompts.question.replace("{}", q), a) for i, q, a in asked[:limit]]
    else:
        spaced = range(0, len(samples), max(1, len(samples) // limit))
        texts = [(i, prompts.caption_instruction, prompts.caption, samples[i].captions[0]) for i in spaced]
    losses, right = [], 0
    for first in range(0, len(texts), CHUNK):
        rows, instructions, asked_prompts, targets = zip(*texts[first : first + CHUNK], strict=True)
        batch = batches.batch(_rows(features, rows), instructions, asked_prompts, targets)
        losses.append(float(Stage2Step(model)(batch)["loss"]) * len(rows))
        said = batches.language_tokenizer.decode(_say(model, batch))
        right += sum(a.casefold() == b.casefold() for a, b in zip(said, targets, strict=True))
    return {"loss": sum(losses) / len(texts), "exact": right / len(texts)}


def _stride(samples: Sequence[Sample], limit: int) -> int:
    return max(1, sum(len(sample.questions) for sample in samples) // limit)


def _say(model: Blip2Stage2, batch: Stage2Batch) -> Tensor:
    assert model.language_model is not None
    visual_prompt = model.visual_prompt(batch.image_features, batch.instruction)
    prompt = batch.prompt
    started = model.language_model.start(visual_prompt, prompt.input_ids, prompt.attention_mask)
    return write(model.language_model, *started, Decoding(max_new_tokens=12))


def _rows(features: FeatureCache, rows: Sequence[int]) -> Tensor:
    return torch.from_numpy(features.read(np.asarray(rows))).float()
