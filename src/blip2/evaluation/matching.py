"""A retrieval model over whole sets: all images with all texts by ITC, chosen pairs by ITM."""

from collections.abc import Sequence

import torch
from torch import Tensor

from blip2.evaluation.encoding import Progress, Say
from blip2.inference.retrieval import Retriever
from blip2.model.qformer import select_images
from blip2.model.stage1 import Text
from blip2.objectives.itc import image_text_similarity

ROWS_AT_ONCE = 64


@torch.inference_mode()
def similarity_matrix(retriever: Retriever, image_features: Tensor, texts: Sequence[str], say: Say) -> Tensor:
    """ITC cosines (I, T) of image features (I, N, Dv) with texts: that of an image's best query."""
    device = retriever.model.query_tokens.device
    text_embeds = torch.cat([retriever.embed_texts(texts[rows]) for rows in _batches(len(texts))])  # (T, E)
    progress = Progress(say, "pictures compared with texts", len(image_features))
    similarities = []
    for rows in _batches(len(image_features)):
        image_embeds = retriever.embed_images(image_features[rows].to(device))  # (B, Q, E)
        similarities.append(image_text_similarity(image_embeds, text_embeds).cpu())
        progress.add(len(image_embeds))
    return torch.cat(similarities)


@torch.inference_mode()
def match_pairs(retriever: Retriever, image_features: Tensor, texts: Sequence[str], pairs: Tensor, say: Say) -> Tensor:
    """ITM logits (P, 2), no match and match, of pairs (P, 2) of image and text numbers, ordered by image.

    An image's keys and values are made once for its pairs that stand in one batch.
    """
    model = retriever.model
    device, dtype = model.query_tokens.device, model.query_tokens.dtype
    tokens = retriever.tokenizer.encode(texts, retriever.max_text_tokens).to(device)
    progress = Progress(say, "pairs matched", len(pairs))
    logits = []
    for some in pairs.split(ROWS_AT_ONCE):
        images, row_of = some[:, 0].unique_consecutive(return_inverse=True)
        features = image_features[images].to(device=device, dtype=dtype)
        keys = model.project_image(features)
        text = Text(tokens.input_ids, tokens.attention_mask)[some[:, 1].to(device)]
        length = int(text.attention_mask.sum(dim=1).max())
        text = Text(text.input_ids[:, :length], text.attention_mask[:, :length])
        logits.append(model.match_logits(select_images(keys, row_of.to(device)), text).float().cpu())
        progress.add(len(some))
    return torch.cat(logits)


def _batches(count: int) -> list[slice]:
    return [slice(first, first + ROWS_AT_ONCE) for first in range(0, count, ROWS_AT_ONCE)]
