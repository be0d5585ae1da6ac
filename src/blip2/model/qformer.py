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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blip2.model.config import QFormerConfig
from blip2.model.layout import Layout
from blip2.model.recomputed import Dropout, attend_again, gelu_linear, saves_memory


@dataclass(frozen=True)
class KeyValue:
    """Keys and values of one attention.

    Attributes:
        key, value: (B, H, S, D/H) each.
        chosen: (C,) the batch rows meant, in that order, repeats allowed: they are copied where they are attended to,
            and no sooner. None: all as they are.
    """

    key: Tensor
    value: Tensor
    chosen: Tensor | None = None

    def rows(self, rows: Tensor) -> "KeyValue":
        """Those of the batch rows numbered `rows`."""
        return KeyValue(self.key, self.value, rows if self.chosen is None else self.chosen[rows])

    def copied(self) -> "KeyValue":
        """The chosen rows by themselves (index_select: its backward adds faster than that of `[chosen]`)."""
        if self.chosen is None:
            return self
        return KeyValue(self.key.index_select(0, self.chosen), self.value.index_select(0, self.chosen))

    def for_many(self) -> "KeyValue":
        """As a CPU's attention takes them in training, so that several passes need no copies: float32, head by head."""
        if not saves_memory(self.key.device):
            return self
        return KeyValue(self.key.float().contiguous(), self.value.float().contiguous(), self.chosen)

    def above(self, other: "KeyValue") -> "KeyValue":
        """These with the batch rows of `other` below them."""
        upper, lower = self.copied(), other.copied()
        return KeyValue(torch.cat([upper.key, lower.key]), torch.cat([upper.value, lower.value]))

    def then(self, other: "KeyValue") -> "KeyValue":
        """These followed by `other`, along the sequence."""
        first, next_ = self.copied(), other.copied()
        return KeyValue(torch.cat([first.key, next_.key], dim=2), torch.cat([first.value, next_.value], dim=2))


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

    def project(self, source: Tensor, layout: Layout | None = None) -> KeyValue:
        """Keys and values of `source`: rows (B, S, key_width), or positions (M, key_width) as `layout` says."""
        key, value = self.attention.key(source), self.attention.value(source)
        return KeyValue(self._heads(key, layout), self._heads(value, layout))

    def project_normed(self, normed: Tensor, norm: nn.LayerNorm) -> KeyValue:
        """Keys and values of `norm`'s result, given what it is before its gain and shift: (B, S, key_width).

        Gain and shift are multiplied into the maps, so that no gradient needs to reach `normed`: the same keys, values
        and gradients for a third less work.
        """
        maps = self.attention.key, self.attention.value
        key, value = (
            F.linear(normed, one.weight * norm.weight, one.bias + (one.weight * norm.bias).sum(dim=1)) for one in maps
        )
        return KeyValue(self._heads(key), self._heads(value))

    def forward(self, hidden: Tensor, keys: KeyValue, mask: Tensor | None, layout: Layout | None = None) -> Tensor:
        """Attend from `hidden` to `keys`; `mask` broadcasts to (B, H, S, keys), true = may attend.

        `hidden`, and what is returned, are rows (B, S, D), or positions (M, D) that lie as `layout` says.
        """
        query = self._heads(self.attention.query(hidden), layout)  # (B, H, S, D/H)
        dropout = self.dropout_prob if self.training else 0.0
        context = attend(query, keys, mask, dropout).transpose(1, 2).flatten(2)  # (B, S, D)
        return self.output(layout.positions(context) if layout else context, hidden)

    def _heads(self, projected: Tensor, layout: Layout | None = None) -> Tensor:
        rows = layout.rows(projected) if layout else projected  # (B, S, D)
        return rows.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, S, D/H)


def attend(query: Tensor, keys: KeyValue, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k / sqrt(d)) v, (B, H, S, D/H).

    On a CPU in float32 also under autocast: the bfloat16 kernel's backward takes 14 times as long there (384 x 12 heads
    x 42 x 42: 626 ms against 44, torch 2.13, 2 cores with AMX).
    """
    if query.device.type != "cpu":
        keys = keys.copied()
        return F.scaled_dot_product_attention(query, keys.key, keys.value, attn_mask=mask, dropout_p=dropout)
    with torch.autocast("cpu", enabled=False):
        if dropout and saves_memory(query.device):
            attended = attend_again(query.float(), keys.key.float(), keys.value.float(), keys.chosen, mask, dropout)
            return attended.to(query.dtype)
        keys = keys.copied()
        q, k, v = query.float(), keys.key.float(), keys.value.float()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).to(query.dtype)


class ResidualNorm(nn.Module):
    """dense -> dropout -> add the residual -> LayerNorm."""

    def __init__(self, width_in: int, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        return self.after(self.dense(hidden), residual)

    def after(self, mapped: Tensor, residual: Tensor) -> Tensor:
        """What follows the dense map."""
        return self.LayerNorm(self.dropout(mapped) + residual)


class Intermediate(nn.Module):
    """The widening half of a feed-forward network; an exact GELU follows it."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dense(hidden)


def feed_forward(widening: Intermediate, narrowing: ResidualNorm, hidden: Tensor) -> Tensor:
    """A feed-forward network with residual and post-norm, (..., D) -> (..., D)."""
    return narrowing.after(gelu_linear(widening(hidden), narrowing.dense), hidden)


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
        layout: Layout,
        *,
        image: KeyValue | None,
        mask: Tensor | None,
        past: KeyValue | None,
        ends_text: bool = False,
    ) -> tuple[Tensor, KeyValue]:
        """One layer over `hidden` (M, D), which lies as `layout` says.

        Returns:
            hidden (M, D), without the text's positions if `ends_text`; and this layer's own self-attention keys and
            values (without `past`).
        """
        own = self.attention.project(hidden, layout)
        if ends_text:
            hidden, layout = layout.split(hidden)[0], layout.without_text
        hidden = self.attention(hidden, past.then(own) if past else own, mask, layout)
        queries, text = layout.split(hidden)
        sides = []
        if layout.num_queries:
            if image is not None:
                queries = self.crossattention(layout.queries(queries), image, None).flatten(0, 1)
            sides.append(feed_forward(self.intermediate_query, self.output_query, queries))
        if layout.num_text:
            sides.append(feed_forward(self.intermediate, self.output, text))
        return sides[0] if len(sides) == 1 else torch.cat(sides), own


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
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.encoder = Layers(config, has_text=has_text)

    def project_image(self, image_features: Tensor, norm: nn.LayerNorm) -> ImageKeyValues:
        """Keys and values of the image for every cross-attention, computed once however many passes use them.

        Args:
            image_features: (B, N, Dv).
            norm: the vision LayerNorm, which they pass first.
        """
        attentions: dict[int, Any] = {
            i: layer.get_submodule("crossattention")
            for i, layer in enumerate(self.encoder.layer)
            if self.config.has_cross_attention(i)
        }
        learns_alone = torch.is_grad_enabled() and norm.weight.requires_grad and not image_features.requires_grad
        if not learns_alone:
            seen = _cast(norm(image_features))
            return {i: attention.project(seen).for_many() for i, attention in attentions.items()}
        normed = _cast(F.layer_norm(image_features, norm.normalized_shape, eps=norm.eps))
        return {i: attention.project_normed(normed, norm).for_many() for i, attention in attentions.items()}

    def forward(
        self,
        *,
        queries: Tensor | None = None,
        text: Tensor | None = None,
        image: ImageKeyValues | None = None,
        mask: Tensor | None = None,
        past: list[KeyValue] | None = None,
        text_is_real: Tensor | None = None,
        wants_text: bool = True,
    ) -> QFormerOutput:
        """Run one pass.

        Args:
            queries: (B, Q, D) query embeddings, or None for a pass over text alone.
            text: (B, T, D) text embeddings, or None for a pass over queries alone.
            image: from `project_image`; needed when queries are given.
            mask: bool, broadcasting to (B, H, S, past+S), (B, H, 1, past+S) without `wants_text`; None: all see all.
            past: keys and values of an earlier pass by layer, put before this pass's own.
            text_is_real: (B, T), true or 1 where a token is no padding, which a CPU leaves out while it trains; what is
                returned is zero there.
            wants_text: whether the text's hidden states are returned, or serve the queries alone.
        """
        leaves_out = text is not None and text_is_real is not None and saves_memory(text.device)
        layout = Layout.of(queries, text, text_is_real if leaves_out else None)
        hidden = self.dropout(self.layernorm(layout.pack(queries, text)))  # (M, D)
        own_past = []
        last = len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            hidden, own = layer(
                hidden,
                layout,
                image=image.get(i) if image and layout.num_queries else None,
                mask=mask,
                past=past[i] if past else None,
                ends_text=i == last and text is not None and not wants_text,
            )
            own_past.append(own)
        found, told = layout.split(hidden)
        return QFormerOutput(
            queries=None if queries is None else layout.queries(found),
            text=layout.texts(told) if text is not None and wants_text else None,
            past=own_past,
        )


def _cast(features: Tensor) -> Tensor:
    """In autocast's precision, where that is on: once, and not for each map that reads them."""
    device = features.device.type
    return features.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features


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
