"""Blip2Stage1: frozen image encoder + Q-Former + the heads of ITC, ITM and ITG. Also the retrieval model.

Each method is one pass of the Q-Former (qformer.py); training/stage1.py joins them into a step.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.model.config import QFormerConfig
from blip2.model.masks import continuation_mask, together_mask
from blip2.model.qformer import (
    ImageKeyValues,
    KeyValue,
    QFormer,
    TextEmbeddings,
    initialise,
)

INITIAL_TEMPERATURE = 0.07


@dataclass(frozen=True)
class Text:
    """Tokenised text.

    Attributes:
        input_ids: (B, T), padded on the right.
        attention_mask: (B, T), 1 = real token.
    """

    input_ids: Tensor
    attention_mask: Tensor

    def __getitem__(self, rows: Tensor) -> "Text":
        return Text(self.input_ids[rows], self.attention_mask[rows])


@dataclass(frozen=True)
class ImagePass:
    """The queries' pass over images alone.

    Attributes:
        output: (B, Q, D), the Q-Former output at the queries.
        past: self-attention keys and values by layer, for ITG.
        image: cross-attention keys and values by layer, for ITM.
    """

    output: Tensor
    past: list[KeyValue]
    image: ImageKeyValues


class LanguageModelHead(nn.Module):
    """BERT's transform and the tied word embeddings."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, word_embeddings: Tensor) -> Tensor:
        """Vocabulary logits (..., V) of hidden states (..., D)."""
        return F.linear(self.LayerNorm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class Blip2Stage1(nn.Module):
    """The representation-learning model.

    Args:
        vision_model: frozen image encoder (vision.ImageEncoder), or None when image features are given ready.
        config: the Q-Former's shape; its `encoder_hidden_size` is the encoder's width.
    """

    def __init__(self, vision_model: nn.Module | None, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = vision_model
        # Trainable; Hugging Face keeps it as the vision tower's post_layernorm.
        self.vision_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.encoder_layer_norm_eps)
        self.embeddings = TextEmbeddings(config)
        self.qformer = QFormer(config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        joined = config.num_query_tokens if config.query_pooling == "concat" else 1
        self.vision_projection = nn.Linear(joined * config.hidden_size, config.embed_dim)
        self.text_projection = nn.Linear(config.hidden_size, config.embed_dim)
        self.itm_head = nn.Linear(config.hidden_size, 2)
        self.lm_head = LanguageModelHead(config)
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))
        for part in (self.embeddings, self.qformer, self.itm_head, self.lm_head):
            initialise(part, config)
        nn.init.normal_(self.query_tokens, std=config.initializer_range)

    # -- passes ---------------------------------------------------------------------------------------------------
    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Frozen image features (B, N, Dv) of `pixel_values` (B, 3, H, W); no gradient."""
        assert self.vision_model is not None, "this model was built for ready image features"
        return self.vision_model(pixel_values)

    def project_image(self, image_features: Tensor) -> ImageKeyValues:
        """Cross-attention keys and values of images (B, N, Dv), by layer."""
        return self.qformer.project_image(image_features, self.vision_layernorm)

    def image_pass(self, image_features: Tensor) -> ImagePass:
        """Let the queries look at the images `image_features` (B, N, Dv)."""
        image = self.project_image(image_features)
        queries = self.query_tokens.expand(image_features.shape[0], -1, -1)
        output = self.qformer(queries=queries, image=image)
        assert output.queries is not None
        return ImagePass(output=output.queries, past=output.past, image=image)

    def match_logits(self, image: ImageKeyValues, text: Text) -> Tensor:
        """ITM: (B, 2) logits of no match and match, the mean over the queries of the joint pass."""
        batch = text.input_ids.shape[0]
        output = self.qformer(
            queries=self.query_tokens.expand(batch, -1, -1),
            text=self.embeddings(text.input_ids),
            image=image,
            mask=together_mask(self.config.num_query_tokens, text.attention_mask),
            text_is_real=text.attention_mask,
            wants_text=False,
        )
        assert output.queries is not None
        return self.itm_head(output.queries).mean(dim=1)  # (B, 2)

    def caption_hidden(self, text: Text, past: list[KeyValue]) -> Tensor:
        """ITG: hidden states (B, T, D) of text after the queries of an image pass."""
        num_past, length = past[0].key.shape[2], text.input_ids.shape[1]
        mask = continuation_mask(num_past, length, text.input_ids.device)
        words = self.embeddings(text.input_ids)
        output = self.qformer(text=words, past=past, mask=mask, text_is_real=text.attention_mask)
        assert output.text is not None
        return output.text

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) over the next word piece of hidden states (..., D)."""
        return self.lm_head(hidden, self.embeddings.word_embeddings.weight)

    # -- ITC features ---------------------------------------------------------------------------------------------
    def project_queries(self, query_output: Tensor) -> Tensor:
        """Query outputs (B, Q, D) as vectors of unit length: (B, Q, E), or (B, 1, E) where queries are pooled."""
        if self.config.query_pooling == "concat":
            query_output = query_output.flatten(1)[:, None]  # (B, 1, Q * D)
        embeds = F.normalize(self.vision_projection(query_output).float(), dim=-1)  # (B, Q or 1, E)
        if self.config.query_pooling == "mean":
            return F.normalize(embeds.mean(dim=1, keepdim=True), dim=-1)  # (B, 1, E)
        return embeds

    def embed_images(self, image_features: Tensor) -> Tensor:
        """ITC features of images (B, N, Dv): (B, Q, E) of unit length, or (B, 1, E) where queries are pooled."""
        return self.project_queries(self.image_pass(image_features).output)

    def embed_texts(self, text: Text) -> Tensor:
        """ITC features of texts: (B, E) of unit length."""
        return F.normalize(self.text_projection(self.pool_texts(text)).float(), dim=-1)

    def pool_texts(self, text: Text) -> Tensor:
        """Texts as one vector each, (B, D), before the projection of ITC."""
        mask = text.attention_mask.bool()[:, None, None]  # (B, 1, 1, T)
        hidden = self.qformer(text=self.embeddings(text.input_ids), mask=mask, text_is_real=text.attention_mask).text
        assert hidden is not None
        if self.config.text_pooling == "cls":
            return hidden[:, 0]
        weights = text.attention_mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def match(self, image_features: Tensor, text: Text) -> Tensor:
        """ITM logits (B, 2) of image b with text b."""
        return self.match_logits(self.project_image(image_features), text)


def load_text_weights(model: nn.Module, bert: dict[str, Tensor], only: Collection[str] | None = None) -> list[str]:
    """Start a Q-Former from a BERT: embeddings, self-attention, both FFNs (the query FFN is a copy of BERT's), LM head.

    Cross-attention, queries and projections keep their random start (LAVIS, blip2_qformer.__init__). Vocabulary rows
    beyond BERT's ([DEC]) start as the mean of the word embeddings.

    Args:
        model: a Blip2Stage1, or a Blip2Stage2 with or without its text half.
        bert: state dict in Hugging Face's BertModel names.
        only: names of the parameters to set, of ours; None: all that BERT has.

    Returns:
        Names of the parameters that were set.
    """
    own = dict(model.named_parameters())
    done = []
    for name, parameter in own.items():
        source = bert.get(_bert_name(name))
        if source is None or (only is not None and name not in only):
            continue
        with torch.no_grad():
            if parameter.shape == source.shape:
                parameter.copy_(source)
            elif name == "embeddings.word_embeddings.weight":
                parameter[: source.shape[0]] = source
                parameter[source.shape[0] :] = source.mean(dim=0)
            else:
                raise ValueError(f"{name} has shape {tuple(parameter.shape)}, the text model {tuple(source.shape)}")
        done.append(name)
    return done


def _bert_name(name: str) -> str:
    """BertModel's name of one of our parameters ("" where BERT has none)."""
    if name.startswith("qformer.layernorm."):
        return name.replace("qformer.layernorm.", "embeddings.LayerNorm.")
    if name.startswith("embeddings."):
        return name
    if not name.startswith("qformer.encoder.") or "crossattention" in name:
        return ""
    bert = name.removeprefix("qformer.").replace(".attention.attention.", ".attention.self.")
    return bert.replace("intermediate_query", "intermediate").replace("output_query", "output")
