"""Pictures and texts as vectors, and how well they fit: the stage-1 model put to use.

ITC  cosine of a text with the picture's best query: fast, vectors can be kept
ITM  the joint pass of picture and text: slower, finer; the paper re-ranks the best ITC candidates with it
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip2.model.qformer import select_images
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.preprocessing.text import QFormerTokenizer


@dataclass(frozen=True)
class Match:
    """How well a text fits a picture.

    Attributes:
        text: the text.
        itc: cosine similarity in [-1, 1], of the best query (image-text contrast).
        itm: probability in [0, 1] that they belong together (image-text matching).
    """

    text: str
    itc: float
    itm: float


class Retriever:
    """The retrieval part: image features and texts in, vectors and matches out.

    Attributes:
        model: the stage-1 model, without its image encoder.
        tokenizer: the Q-Former's.
        max_text_tokens: how much of a text is read.
    """

    def __init__(self, model: Blip2Stage1, tokenizer: QFormerTokenizer, max_text_tokens: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_text_tokens = max_text_tokens

    @torch.inference_mode()
    def embed_images(self, image_features: Tensor) -> Tensor:
        """Unit vectors (B, Q, E) of image features (B, N, Dv); Q is 1 where the model pools its queries."""
        return self.model.embed_images(image_features.to(self._dtype))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors (B, E) of texts."""
        return self.model.embed_texts(self._tokenise(texts))

    @torch.inference_mode()
    def match(self, image_features: Tensor, texts: Sequence[str]) -> list[Match]:
        """How well each of the texts fits the picture with features (1, N, Dv), in the order given."""
        image_features = image_features.to(self._dtype)
        text = self._tokenise(texts)
        image_pass = self.model.image_pass(image_features)
        queries = self.model.project_queries(image_pass.output)[0]  # (Q, E)
        itc = torch.einsum("qe,ce->cq", queries, self.model.embed_texts(text)).amax(dim=-1)  # (C,)
        rows = torch.zeros(len(texts), dtype=torch.long, device=image_features.device)
        logits = self.model.match_logits(select_images(image_pass.image, rows), text)  # (C, 2)
        itm = logits.float().softmax(dim=-1)[:, 1]  # (C,)
        return [Match(*row) for row in zip(texts, itc.tolist(), itm.tolist(), strict=True)]

    @torch.inference_mode()
    def best_fitting(self, image_features: Tensor, texts: Sequence[Sequence[str]]) -> list[str]:
        """Of every picture's own texts the most similar one by ITC; of equal ones the first.

        Args:
            image_features: (B, N, Dv).
            texts: B lists, none of them empty.
        """
        image_embeds = self.embed_images(image_features)  # (B, Q, E)
        text_embeds = self.embed_texts([text for row in texts for text in row])  # (all, E)
        chosen = []
        for queries, row, own in zip(image_embeds, texts, text_embeds.split([len(row) for row in texts]), strict=True):
            chosen.append(row[int((own @ queries.T).amax(dim=1).argmax())])
        return chosen

    def _tokenise(self, texts: Sequence[str]) -> Text:
        batch = self.tokenizer.encode(texts, self.max_text_tokens).to(self.model.query_tokens.device)
        return Text(batch.input_ids, batch.attention_mask)

    @property
    def _dtype(self) -> torch.dtype:
        return self.model.query_tokens.dtype
