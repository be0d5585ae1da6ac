"""Shapes of the Q-Former and of the heads around it.

Letters used in all shapes:
    B  pairs in the batch        N  image tokens            Q  learned queries     T  text tokens
    D  Q-Former width            Dv image encoder's width   Dl LLM's width         E  embedding width of ITC
    H  attention heads           V  vocabulary              L  layers
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

BERT_VOCABULARY = 30_522  # bert-base-uncased; [DEC] follows it


@dataclass(frozen=True)
class QFormerConfig:
    """The Q-Former's shape; the defaults are the paper's (BERT-base, 32 queries).

    Attributes:
        encoder_hidden_size: Dv, width of the frozen image encoder's features.
        encoder_layer_norm_eps: of the norm over these features: 1e-5 in the original, 1e-6 at Hugging Face.
        cross_attention_frequency: layers 0, f, 2f, ... carry cross-attention.
        embed_dim: E, width of the features that image-text contrast compares.
        text_pooling: which text feature stands for a sentence in ITC: that of [CLS] (the paper) or the mean over the
            real tokens (as the MiniLM sentence encoder was trained).
        query_pooling: how the queries of an image stand for it in ITC: each for itself, the one most like the text
            counting (max, the paper), as their mean (with few training texts the maximum picks up noise), or side by
            side through one wide projection (concat), which lets each query keep a part of its own.
    """

    vocab_size: int = BERT_VOCABULARY + 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    encoder_hidden_size: int = 1408
    encoder_layer_norm_eps: float = 1e-5
    cross_attention_frequency: int = 2
    num_query_tokens: int = 32
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    embed_dim: int = 256
    text_pooling: Literal["cls", "mean"] = "cls"
    query_pooling: Literal["max", "mean", "concat"] = "max"

    def has_cross_attention(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, looks at the image."""
        return layer % self.cross_attention_frequency == 0

    def to_dict(self) -> dict:
        """Plain values, as written to disk."""
        return asdict(self)

    def without_dropout(self) -> "QFormerConfig":
        """The same shape with both dropouts at zero."""
        return replace(self, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
