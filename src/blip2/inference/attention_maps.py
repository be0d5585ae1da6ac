"""Where the Q-Former looked: its cross-attention over the picture, for each query, and which queries a word came from.

    queries   softmax(q k / sqrt(d)) of every cross-attention, mean over heads and layers, [CLS] and its like left out
    words     how much a word's log-probability falls when a query's vector is replaced by the mean of all of them

The second is a test on the language model itself, so it works with any, quantised or not; each query takes a pass.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip2.errors import UserError
from blip2.inference.blip2 import Blip2
from blip2.inference.generation import Generator
from blip2.model.qformer import Attention, KeyValue

ROWS_AT_ONCE = 32
# a word with the spaces before it; where words are not parted by spaces, a character
_WORD = re.compile(r"\s*(?:[぀-ヿ㐀-鿿豈-﫿]|[^\s぀-ヿ㐀-鿿豈-﫿]+)")
# dark violet to yellow by even steps of lightness, four anchors
_COLOURS = np.array([(13, 8, 135), (156, 23, 158), (237, 121, 83), (240, 249, 33)], dtype=np.float64)


@dataclass(frozen=True)
class WordSource:
    """A word of the answer and where it came from.

    Attributes:
        text: the word, with the space before it.
        weights: (Q,) at least 0, sum 1: the share of each query.
    """

    text: str
    weights: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """What the Q-Former looked at.

    Attributes:
        queries: (Q, rows, columns), each sums to 1 over a grid that covers the whole picture.
        words: of an answer; empty where it was not asked for.
    """

    queries: Tensor
    words: list[WordSource]

    @property
    def average(self) -> Tensor:
        """(rows, columns), the mean over the queries."""
        return self.queries.mean(dim=0)

    def of_word(self, number: int) -> Tensor:
        """(rows, columns), the queries weighted by their share in word `number`."""
        return torch.einsum("q,qrc->rc", self.words[number].weights, self.queries)


@torch.inference_mode()
def attention_maps(model: Blip2, image_features: Tensor, instruction: str) -> Tensor:
    """(Q, rows, columns) over one picture's features (1, N, Dv), each summing to 1.

    Args:
        model: with a generating part.
        image_features: as `Blip2.image_features` gives them.
        instruction: what an instruction-aware Q-Former is told.

    Raises:
        UserError: the image encoder's features are no square grid.
    """
    generator = model.generator
    num_queries = generator.model.config.num_query_tokens
    taken: list[Tensor] = []

    def note(module: torch.nn.Module, arguments: tuple[Tensor, KeyValue, None]) -> None:
        assert isinstance(module, Attention)
        taken.append(_probabilities(module, arguments[0], arguments[1]))

    modules = [module for name, module in generator.model.qformer.named_modules() if name.endswith(".crossattention")]
    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        generator.compute_visual_prompt(image_features, [instruction])
    finally:
        for hook in hooks:
            hook.remove()
    seen = torch.stack(taken).mean(dim=0)[0, :num_queries].float().cpu()  # (Q, N)
    side = math.isqrt(seen.shape[1])
    if seen.shape[1] - side * side > 8:  # [CLS] and registers stand before the patches
        raise UserError(f"The image encoder gives {seen.shape[1]} features, no square grid, so nothing can be drawn.")
    cells = seen[:, seen.shape[1] - side * side :]
    return (cells / cells.sum(dim=1, keepdim=True)).unflatten(1, (side, side))


def _probabilities(module: Attention, hidden: Tensor, keys: KeyValue) -> Tensor:
    """(B, Q, N), mean over the heads."""
    query = module.attention.query(hidden).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)  # (B, H, Q, D/H)
    scores = torch.einsum("bhqd,bhnd->bhqn", query, keys.key) / math.sqrt(query.shape[-1])
    return scores.float().softmax(dim=-1).mean(dim=1)


@torch.inference_mode()
def word_sources(
    generator: Generator, image_features: Tensor, prompt: str, instruction: str, answer: str
) -> list[WordSource]:
    """Every word of `answer` with the share of each query in it.

    Args:
        generator: what said it.
        image_features: (1, N, Dv).
        prompt, instruction: what was asked.
        answer: what was said.
    """
    if not answer.strip():
        return []
    visual = generator.visual_prompt(image_features, [instruction])  # (1, Q, Dl)
    num_queries = visual.shape[1]
    rows = visual.repeat(num_queries + 1, 1, 1)  # (Q + 1, Q, Dl), the last one whole
    each = torch.arange(num_queries, device=visual.device)
    rows[each, each] = visual.mean(dim=1)
    prompts = generator.tokenizer.encode_prompts([prompt]).to(visual.device)
    target = generator.tokenizer.encode_targets([answer], prompts=[prompt], append_eos=False).to(visual.device)
    losses = []
    for some in rows.split(ROWS_AT_ONCE):
        texts = (prompts.input_ids, prompts.attention_mask, target.input_ids, target.attention_mask)
        losses.append(generator.language_model.token_losses(some, *(text.expand(len(some), -1) for text in texts)))
    loss = torch.cat(losses).float().cpu()  # (Q + 1, T)
    falls = loss[:num_queries] - loss[num_queries:]  # (Q, T), of the log-probability without that query
    words = _words(generator, target.input_ids[0].tolist(), answer.strip())
    return [WordSource(text, _shares(falls[:, tokens].sum(dim=1))) for text, tokens in words]


def _shares(falls: Tensor) -> Tensor:
    """(Q,) that sum to 1; equal ones where no query matters."""
    helpful = falls.clamp(min=0)
    total = helpful.sum()
    return helpful / total if total > 0 else torch.full_like(falls, 1 / len(falls))


def _words(generator: Generator, token_ids: Sequence[int], answer: str) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the places of its tokens."""
    decode = generator.tokenizer.decode
    ends = [len(decode(torch.tensor([token_ids[: i + 1]]))[0]) for i in range(len(token_ids))]
    spans = [(match.group(), match.end()) for match in _WORD.finditer(answer)]
    words: list[tuple[str, list[int]]] = [(text, []) for text, _ in spans]
    for token, end in enumerate(ends):
        place = next((i for i, (_, word_end) in enumerate(spans) if end <= word_end), len(spans) - 1)
        words[place][1].append(token)
    return [(text, tokens) for text, tokens in words if tokens]


def draw(image: Image.Image, weights: Tensor, *, opacity: float = 0.6) -> Image.Image:
    """The picture in grey under its map (rows, columns): violet where it was looked at least, yellow where most."""
    grey = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    scaled = (weights - weights.min()) / (weights.max() - weights.min()).clamp(min=1e-12)
    small = Image.fromarray((scaled.numpy() * 255).astype(np.uint8))
    share = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float64) / 255  # (H, W)
    anchors = np.linspace(0, 1, len(_COLOURS))
    colour = np.stack([np.interp(share, anchors, channel) for channel in _COLOURS.T], axis=-1)  # (H, W, 3)
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).round().astype(np.uint8))
