"""What the Q-Former's passes cost: operations, and bytes that the forward pass keeps for the backward pass.

    operations of a token in a layer     2 (4 D^2 + 2 D F)                 self-attention's four maps, feed-forward
    of its attention                     4 keys D                          every pair of positions, twice
    of a query where it looks at the image   2 (2 D^2) + 4 N D             cross-attention; its keys and values apart
    of an image's keys and values        2 N (2 Dv D) a cross-attention    once an image, however many passes use them

The backward pass of what trains takes twice the forward pass. Letters as in model/config.py; F is the width of the
feed-forward network. Bytes follow what PyTorch's autograd saves of each layer (tests/training/test_plan_memory.py
counts it): what enters a map that trains, what enters a norm, the GELU's both sides, dropout's masks.
"""

from dataclasses import dataclass

from blip2.model.config import QFormerConfig

BACKWARD = 2  # of what trains: gradients of the weights and of the inputs
FLOAT32 = 4


@dataclass(frozen=True)
class Arithmetic:
    """In how many bytes things are kept.

    Attributes:
        product: an element that enters or leaves a matrix product: 2 in bfloat16, 4 in float32.
        attention: an element of queries, keys and values; CPUs attend in float32 whatever the products are.
        is_gpu: whether kernels are those of GPUs: dropout keeps a byte an element, fused attention draws its own.
    """

    product: int
    attention: int
    is_gpu: bool

    @classmethod
    def of(cls, precision: str, *, is_gpu: bool) -> "Arithmetic":
        """That of a training run in "bfloat16" or "float32"."""
        product = 2 if precision == "bfloat16" else FLOAT32
        return cls(product, product if is_gpu else FLOAT32, is_gpu)

    @property
    def casts(self) -> bool:
        """Whether autocast copies what enters a product, once for each product."""
        return self.product != FLOAT32

    def dropout_mask(self, probability: float, element: int) -> int:
        """Bytes that dropout keeps of an element."""
        if not probability:
            return 0
        return 1 if self.is_gpu else element


@dataclass(frozen=True)
class Pass:
    """One way through all layers, for one sample of a batch.

    Attributes:
        name: what it is for.
        rows: rows a sample; ITM has three.
        queries, text: positions of each kind in a row.
        past: positions before them whose keys and values are known.
    """

    name: str
    rows: float
    queries: int = 0
    text: int = 0
    past: int = 0

    @property
    def tokens(self) -> int:
        """Positions of a row."""
        return self.queries + self.text


def num_cross_attentions(config: QFormerConfig) -> int:
    """Layers that look at the image."""
    return sum(config.has_cross_attention(layer) for layer in range(config.num_hidden_layers))


# Operations, of one sample


def image_flops(config: QFormerConfig, image_tokens: int) -> float:
    """Forward: an image's keys and values for every cross-attention."""
    return 2 * num_cross_attentions(config) * image_tokens * 2 * config.encoder_hidden_size * config.hidden_size


def pass_flops(one: Pass, config: QFormerConfig, image_tokens: int) -> float:
    """Forward: one pass, without the image's keys and values."""
    h, f = config.hidden_size, config.intermediate_size
    layer = one.tokens * 2 * (4 * h * h + 2 * h * f) + 4 * one.tokens * (one.past + one.tokens) * h
    cross = one.queries * (2 * 2 * h * h + 4 * image_tokens * h)
    return one.rows * (config.num_hidden_layers * layer + num_cross_attentions(config) * cross)


def vocabulary_flops(config: QFormerConfig, text: int) -> float:
    """Forward: ITG's head over the positions that predict a token."""
    return (text - 1) * 2 * (config.hidden_size**2 + config.hidden_size * config.vocab_size)


# Kept bytes, of one sample


def image_bytes(config: QFormerConfig, image_tokens: int, arithmetic: Arithmetic) -> float:
    """Of the image features: the norm's input, and its result as each key and value map takes it."""
    copies = 2 * num_cross_attentions(config) if arithmetic.casts else 1
    return image_tokens * config.encoder_hidden_size * (FLOAT32 + copies * arithmetic.product)


def pass_bytes(
    one: Pass, config: QFormerConfig, image_tokens: int, arithmetic: Arithmetic, *, checkpointed: bool = False
) -> float:
    """Of one pass, with its own keys and values of the image.

    With `checkpointed` only each layer's input stays, and one layer at a time is computed again.
    """
    h, layers, crossings = config.hidden_size, config.num_hidden_layers, num_cross_attentions(config)
    mask = arithmetic.dropout_mask(config.hidden_dropout_prob, FLOAT32)
    embedded = one.tokens * h * (FLOAT32 + mask)
    image = crossings * image_tokens * 2 * h * arithmetic.attention if one.queries else 0
    inside = layers * (_attention_bytes(one, config, arithmetic) + _feed_forward_bytes(one, config, arithmetic))
    inside += crossings * _cross_attention_bytes(one, config, image_tokens, arithmetic)
    if checkpointed:
        inside = layers * one.tokens * h * FLOAT32 + inside / layers
    return one.rows * (embedded + image + inside)


def vocabulary_bytes(config: QFormerConfig, text: int, arithmetic: Arithmetic) -> float:
    """Of ITG's head, but for the logits: its dense layer, GELU and norm."""
    return (text - 1) * config.hidden_size * 4 * arithmetic.product


def _attention_bytes(one: Pass, config: QFormerConfig, arithmetic: Arithmetic) -> float:
    keys = one.past + one.tokens
    inputs = one.tokens * (3 if arithmetic.casts else 1) * arithmetic.product
    attended = (one.tokens + 2 * keys) * arithmetic.attention
    width = config.hidden_size
    return width * (inputs + attended) + _after_attention(one.tokens, keys, config, arithmetic)


def _cross_attention_bytes(one: Pass, config: QFormerConfig, image_tokens: int, arithmetic: Arithmetic) -> float:
    """Without keys and values."""
    inputs = one.queries * config.hidden_size * (arithmetic.product + arithmetic.attention)
    return inputs + _after_attention(one.queries, image_tokens, config, arithmetic)


def _after_attention(tokens: int, keys: int, config: QFormerConfig, arithmetic: Arithmetic) -> float:
    """What is attended, as it left attention and as it enters its map; the norm; the softmax where it is kept."""
    mask = arithmetic.dropout_mask(config.hidden_dropout_prob, arithmetic.product)
    is_fused = arithmetic.is_gpu or not config.attention_probs_dropout_prob
    recast = arithmetic.attention if is_fused and arithmetic.product != arithmetic.attention else 0
    widths = tokens * config.hidden_size * (arithmetic.product + recast + FLOAT32 + mask)
    sums = 1 if is_fused else 3 * keys  # of the softmax; or the softmax, dropout's mask, and their product
    return widths + tokens * config.num_attention_heads * sums * FLOAT32


def _feed_forward_bytes(one: Pass, config: QFormerConfig, arithmetic: Arithmetic) -> float:
    mask = arithmetic.dropout_mask(config.hidden_dropout_prob, arithmetic.product)
    narrow = config.hidden_size * (arithmetic.product + FLOAT32 + mask)
    return one.tokens * (narrow + 2 * config.intermediate_size * arithmetic.product)
