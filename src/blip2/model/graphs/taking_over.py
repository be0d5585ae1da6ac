"""Puts graphs in the place of a quantised LLM's layers.

One graph and not a call for each product, since two programs' threads on the same cores get in each other's way: a word
of OPT-2.7B took 66 to 190 ms that way, of which the products were 43 (docs/decisions.md).
"""

from typing import Any, Protocol

from torch import Tensor, nn

from blip2.model.graphs.decoders import LLAMA, OPT
from blip2.model.graphs.feeds import refuse, run
from blip2.model.graphs.graph import Graph, can_take
from blip2.model.graphs.t5 import T5
from blip2.model.quantized import Int4Linear, Int8Linear


class Family(Protocol):
    """How one kind of LLM is written down."""

    def fits(self, config: Any) -> bool:
        """Whether a configuration is one that can be."""
        ...

    def replace(self, network: Any) -> None:
        """Puts graphs in the place of the layers."""
        ...


FAMILIES: dict[str, Family] = {
    "OPTForCausalLM": OPT,
    "LlamaForCausalLM": LLAMA,
    "T5ForConditionalGeneration": T5(),
}


class OnnxLinear(nn.Module):
    """A quantised linear layer whose product is ONNX Runtime's.

    Args:
        layer: is used up.
    """

    def __init__(self, layer: Int4Linear | Int8Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        graph = Graph()
        (y,) = graph.product(graph.input("x", 1, "M", layer.in_features), layer)
        graph.output("y", y)
        self._session = graph.session()

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in x's dtype."""
        refuse(x)
        rows = x.reshape(-1, x.shape[-1]).float()
        (y,) = run(self._session, ["y"], {"x": rows[None]})
        return y[0].to(x.dtype).unflatten(0, x.shape[:-1])


def take_over(network: Any) -> bool:
    """Replaces the layers of a quantised LLM and its product with the vocabulary, in place.

    Args:
        network: a Hugging Face model, quantised and not used yet.

    Returns:
        Whether it was; false for a family without a graph, and for layers that are not quantised.
    """
    family = FAMILIES.get(type(network).__name__)
    if family is None or not family.fits(network.config):
        return False
    kinds = nn.Linear | Int4Linear | Int8Linear
    if not all(can_take(layer) for layer in network.modules() if isinstance(layer, kinds)):
        return False
    family.replace(network)
    network.set_output_embeddings(OnnxLinear(network.get_output_embeddings()))
    return True
