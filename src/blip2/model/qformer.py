"""The Q-Former: a BERT whose learned queries look at an image (paper, section 3.1).

    queries ─┐                       ┌─ cross-attention to the image (every other layer) ─ query FFN ─┐
             ├─ self-attention, shared ┤                                                                ├─ next layer
    text ────┘                       └───────────────────────────────────────────────── text FFN ─────┘

The three objectives differ only in the self-attention mask, and the masks fall apart into passes that share work:
    image pass   queries alone: serves ITC and, through its keys and values, ITG (queries never see text in either);
    text pass    text alone, both directions: ITC;
    joint pass   queries and text together: ITM, and instruction-aware queries;
    caption pass text alone, causal, after the image pass's keys and values: ITG.
Image features are projected to cross-attention keys and values once (`project_image`) and indexed after that.
Attribute names are Hugging Face's (`transformers.Blip2QFormerModel`), so weights need no renaming.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.model.config import QFormerConfig


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one attention, each (B, H, S, D/H)."""

    key: Tensor
    value: Tensor

    def rows(self, rows: Tensor) -> "KeyValue":
        """Those of the batch rows numbered `rows` (index_select: its backward adds faster than that of `[rows]`)."""
        return KeyValue(self.key.index_select(0, rows), self.value.index_select(0, rows))

    def above(self, other: "KeyValue") -> "KeyValue":
        """These with the batch rows of `other` below them."""
        return KeyValue(torch.cat([self.key, other.key]), torch.cat([self.value, other.value]))

    def then(self, other: "KeyValue") -> "KeyValue":
        """These followed by `other`, along the sequence."""
        return KeyValue(torch.cat([self.key, other.key], dim=2), torch.cat([self.value, other.value], dim=2))


ImageKeyValues = dict[int, KeyValue]  # layer number -> the image's keys and values there


def select_images(image: ImageKeyValues, rows: Tensor) -> ImageKeyValues:
    """The keys and values of the images numbered `rows`, in that order; repeats are allowed."""
    return {layer: pair.rows(rows) for layer, pair in image.items()}


def join_images(*parts: ImageKeyValues) -> ImageKeyValues:
    """The keys and values of several batches of images, one batch after the other."""
    joined, *others = parts
    for other in others:
        joined = {layer: pair.above(other[layer]) for layer, pair in joined.items()}
    return joined


@dataclass(frozen=True)
class QFormerOutput:
    """What a pass gives; a side that was not fed is None.

    Attributes:
        queries: (B, Q, D).
        text: (B, T, D).
        past: self-attention keys and values by layer.
    """

    queries: Tensor | None
    text: Tensor | None
    past: list[KeyValue]


class Projections(nn.Module):
    """The three linear maps of an attention."""

    def __init__(self, width: int, key_width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(key_width, width)
        self.value = nn.Linear(key_width, width)


class Attention(nn.Module):
    """Multi-head attention with residual and post-norm, as BERT has it.

    Args:
        config: shape of the Q-Former.
        key_width: width of what the keys and values are made from.
    """

    def __init__(self, config: QFormerConfig, key_width: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_prob = config.attention_probs_dropout_prob
        width = config.hidden_size
        self.attention = Projections(width, key_width)
        self.output = ResidualNorm(width, config)

    def project(self, source: Tensor) -> KeyValue:
        """Keys and values of `source` (B, S, key_width)."""
        return KeyValue(self._heads(self.attention.key(source)), self._heads(self.attention.value(source)))

    def forward(self, hidden: Tensor, keys: KeyValue, mask: Tensor | None) -> Tensor:
        """Attend from `hidden` (B, S, D) to `keys`; `mask` broadcasts to (B, H, S, keys), true = may attend."""
        query = self._heads(self.attention.query(hidden))  # (B, H, S, D/H)
        dropout = self.dropout_prob if self.training else 0.0
        context = attend(query, keys, mask, dropout)  # (B, H, S, D/H)
        return self.output(context.transpose(1, 2).flatten(2), hidden)  # (B, S, D)

    def _heads(self, projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, S, D/H)


def attend(query: Tensor, keys: KeyValue, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k / sqrt(d)) v, (B, H, S, D/H).

    On a CPU in float32 also under autocast: the bfloat16 kernel's backward takes 14 times as long there (384 x 12 heads
    x 42 x 42: 626 ms against 44, torch 2.13, 2 cores with AMX).
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, keys.key, keys.value, attn_mask=mask, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        q, k, v = query.float(), keys.key.float(), keys.value.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).to(query.dtype)


class ResidualNorm(nn.Module):
    """dense -> dropout -> add the residual -> LayerNorm."""

    def __init__(self, width_in: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class Intermediate(nn.Module):
    """The widening half of a feed-forward network, exact GELU."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return F.gelu(self.dense(hidden))


class QFormerLayer(nn.Module):
    """One layer: shared self-attention, then each side its own way (picture at the top of this file).

    Args:
        has_cross_attention: whether the queries look at the image here.
        has_text: whether the text's feed-forward network exists (stage 2 drops it).
    """

    def __init__(self, config: QFormerConfig, *, has_cross_attention: bool, has_text: bool) -> None:
        super().__init__()
        self.attention = Attention(config, config.hidden_size)
        if has_cross_attention:
            self.crossattention = Attention(config, config.encoder_hidden_size)
        if has_text:
            self.intermediate = Intermediate(config)
            self.output = ResidualNorm(config.intermediate_size, config)
        self.intermediate_query = Intermediate(config)
        self.output_query = ResidualNorm(config.intermediate_size, config)

    def forward(
        self,
        hidden: Tensor,
        num_queries: int,
        *,
        image: KeyValue | None,
        mask: Tensor | None,
        past: KeyValue | None,
    ) -> tuple[Tensor, KeyValue]:
        """One layer over `hidden` (B, S, D), whose first `num_queries` positions are queries, the rest text.

        Returns:
            hidden (B, S, D) and this layer's own self-attention keys and values (without `past`).
        """
        own = self.attention.project(hidden)
        hidden = self.attention(hidden, past.then(own) if past else own, mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        sides = []
        if num_queries:
            if image is not None:
                queries = self.crossattention(queries, image, None)
            sides.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1]:
            sides.append(self.output(self.intermediate(text), text))
        return sides[0] if len(sides) == 1 else torch.cat(sides, dim=1), own


class Layers(nn.Module):
    """The stack of layers, under the name that Hugging Face gives it."""

    def __init__(self, config: QFormerConfig, *, has_text: bool) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            QFormerLayer(config, has_cross_attention=config.has_cross_attention(i), has_text=has_text)
            for i in range(config.num_hidden_layers)
        )


class QFormer(nn.Module):
    """All layers; takes ready embeddings (see `TextEmbeddings`) and the image's keys and values.

    Args:
        config: the shape.
        has_text: whether text may be fed; stage 2 without instructions has no text half.
    """

    def __init__(self, config: QFormerConfig, *, has_text: bool = True) -> None:
        super().__init__()
        self.config = config
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Layers(config, has_text=has_text)

    def project_image(self, image_features: Tensor) -> ImageKeyValues:
        """Keys and values of the image for every cross-attention, computed once however many passes use them.

        Args:
            image_features: (B, N, Dv), after the vision LayerNorm.
        """
        image = {}
        for i, layer in enumerate(self.encoder.layer):
            if self.config.has_cross_attention(i):
                attention = layer.get_submodule("crossattention")
                assert isinstance(attention, Attention)
                image[i] = attention.project(image_features)
        return image

    def forward(
        self,
        *,
        queries: Tensor | None = None,
        text: Tensor | None = None,
        image: ImageKeyValues | None = None,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
    ) -> QFormerOutput:
        """Run one pass.

        Args:
            queries: (B, Q, D) query embeddings, or None for a pass over text alone.
            text: (B, T, D) text embeddings, or None for a pass over queries alone.
            image: from `project_image`; needed when queries are given.
            mask: bool, broadcasting to (B, H, S, past+S); None lets all see all.
            past: keys and values of an earlier pass by layer, put before this pass's own.
        """
        fed = [side for side in (queries, text) if side is not None]
        num_queries = 0 if queries is None else queries.shape[1]
        hidden = self.dropout(self.layernorm(torch.cat(fed, dim=1) if len(fed) == 2 else fed[0]))  # (B, S, D)
        own_past = []
        for i, layer in enumerate(self.encoder.layer):
            hidden, own = layer(
                hidden,
                num_queries,
                image=image.get(i) if image and num_queries else None,
                mask=mask,
                past=past[i] if past else None,
            )
            own_past.append(own)
        return QFormerOutput(
            queries=hidden[:, :num_queries] if queries is not None else None,
            text=hidden[:, num_queries:] if text is not None else None,
            past=own_past,
        )


class TextEmbeddings(nn.Module):
    """Word plus position embeddings, before the Q-Former's own LayerNorm. Positions count from 0 in every pass."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, first_position: int = 0) -> Tensor:
        """Embed `input_ids` (B, T) -> (B, T, D)."""
        positions = torch.arange(first_position, first_position + input_ids.shape[1], device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)


def initialise(module: nn.Module, config: QFormerConfig) -> None:
    """BERT's initialisation: normal weights, zero biases, unit norms."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=config.initializer_range)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            with torch.no_grad():
                part.weight[part.padding_idx].zero_()
