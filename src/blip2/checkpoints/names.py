"""What each weight of the bridge is called by us, by Hugging Face and by the original code (LAVIS).

One table, read in every direction. A row is a beginning of names; of equal beginnings the longest counts, and what
follows it is kept. `{}` stands for a layer's number. A format that lacks a weight has None there: Hugging Face keeps
neither the temperature nor the head of ITG, so what is converted to it and back has lost both.

InstructBLIP differs from BLIP-2 at Hugging Face in three rows, which hold the name there after a bar.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import Tensor

from blip2.errors import UnknownModel
from blip2.model.config import QFormerConfig

Format = Literal["blip2", "hf", "hf-instruct", "lavis"]

_LAYER, _LAVIS_LAYER = "qformer.encoder.layer.{}", "Qformer.bert.encoder.layer.{}"
_INSTRUCT = "qformer.embeddings."

# ours, Hugging Face's BLIP-2, Hugging Face's InstructBLIP, LAVIS
_ROWS: tuple[tuple[str | None, ...], ...] = (
    ("query_tokens", "query_tokens", "query_tokens", "query_tokens"),
    ("vision_layernorm.", *["vision_model.post_layernorm."] * 2, "ln_vision."),
    (
        "embeddings.word_embeddings.",
        "embeddings.word_embeddings.",
        f"{_INSTRUCT}word_embeddings.",
        "Qformer.bert.embeddings.word_embeddings.",
    ),
    (
        "embeddings.position_embeddings.",
        "embeddings.position_embeddings.",
        f"{_INSTRUCT}position_embeddings.",
        "Qformer.bert.embeddings.position_embeddings.",
    ),
    ("qformer.layernorm.", "qformer.layernorm.", f"{_INSTRUCT}layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    *(
        (f"{_LAYER}.{part}.attention.", *[f"{_LAYER}.{part}.attention."] * 2, f"{_LAVIS_LAYER}.{part}.self.")
        for part in ("attention", "crossattention")
    ),
    (f"{_LAYER}.", *[f"{_LAYER}."] * 2, f"{_LAVIS_LAYER}."),
    ("vision_projection.", "vision_projection.", None, "vision_proj."),
    ("text_projection.", "text_projection.", None, "text_proj."),
    ("itm_head.", "itm_head.", None, "itm_head."),
    ("temperature", None, None, "temp"),
    ("lm_head.dense.", None, None, "Qformer.cls.predictions.transform.dense."),
    ("lm_head.LayerNorm.", None, None, "Qformer.cls.predictions.transform.LayerNorm."),
    ("lm_head.bias", None, None, "Qformer.cls.predictions.bias"),
    ("language_projection.", "language_projection.", "language_projection.", "opt_proj."),
    ("language_projection.", "language_projection.", "language_projection.", "t5_proj."),
    ("language_projection.", "language_projection.", "language_projection.", "llm_proj."),
)
_COLUMN: dict[Format, int] = {"blip2": 0, "hf": 1, "hf-instruct": 2, "lavis": 3}


@dataclass(frozen=True)
class Names:
    """The way from one format's names to another's.

    Attributes:
        source, target: the formats.
    """

    source: Format
    target: Format

    @cached_property
    def _rules(self) -> list[tuple[str, str]]:
        """(beginning there, beginning here), the longest first; of equal ones the first row counts."""
        rows = [(row[_COLUMN[self.source]], row[_COLUMN[self.target]]) for row in _ROWS]
        known = [(old, new) for old, new in rows if old is not None and new is not None]
        return sorted(known, key=lambda rule: -len(rule[0]))

    def translate(self, name: str) -> str | None:
        """The target's name of a weight; None where the target has none, or the name is not of the bridge."""
        numbers = [piece for piece in name.split(".") if piece.isdigit()]
        for old, new in self._rules:
            beginning = old.format(*numbers[:1]) if "{}" in old and numbers else old
            if name.startswith(beginning):
                return (new.format(*numbers[:1]) if "{}" in new else new) + name[len(beginning) :]
        return None

    def rename(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights under the target's names; those that have none there are left out."""
        renamed = {self.translate(name): tensor for name, tensor in weights.items()}
        return {name: tensor for name, tensor in renamed.items() if name is not None}


def unnamed(names: Iterable[str], source: Format, target: Format) -> list[str]:
    """Those names of the source that the target has no place for."""
    way = Names(source, target)
    return [name for name in names if way.translate(name) is None]


def check_pooling(config: QFormerConfig, why: str) -> None:
    """Raises UnknownModel where a bridge compares otherwise than both originals do, whose formats do not tell how."""
    if (config.query_pooling, config.text_pooling) != ("max", "cls"):
        raise UnknownModel(
            f"This bridge compares images by query_pooling {config.query_pooling} and texts by text_pooling "
            f"{config.text_pooling}; {why}"
        )
