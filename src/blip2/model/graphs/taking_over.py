"""Puts LiteRT's products in the place of a network's layers, all in one model: of a quantised one, or of a small LLM in
float32.

One model and not a call for each product, since two programs' threads on the same cores get in each other's way
(docs/decisions.md).
"""

from typing import Any, Protocol

from torch import Tensor, nn

from blip2.model.graphs.attention import one_thread, refuse
from blip2.model.graphs.decoders import LLAMA, OPT
from blip2.model.graphs.graph import ModelFile, Signature
from blip2.model.graphs.runtime import Runtime
from blip2.model.graphs.t5 import T5
from blip2.model.graphs.towers import TAKEN, take_over_tower
from blip2.model.graphs.weights import Linear


class Family(Protocol):
    """How one kind of LLM is written down."""

    def fits(self, config: Any) -> bool:
        """Whether a configuration is one that can be."""
        ...

    def write(self, network: Any, file: ModelFile, vocabulary: Signature) -> list[Any]:
        """Writes the layers down and puts others in their place, which it gives back: they lack their `runtime`."""
        ...


FAMILIES: dict[str, Family] = {
    "OPTForCausalLM": OPT,
    "LlamaForCausalLM": LLAMA,
    "T5ForConditionalGeneration": T5(),
}


class Product(nn.Module):
    """A linear layer whose product is a signature's."""

    def __init__(self, layer: Linear, signature: Signature) -> None:
        super().__init__()
        self.runtime: Runtime  # once the file is complete
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._name = signature.name
        signature.output("y", signature.product(signature.input("x", layer.in_features), layer))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), in x's dtype."""
        refuse(x)
        with one_thread():
            (y,) = self.runtime.run_rows(self._name, x=x.reshape(-1, x.shape[-1]).float())
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


def take_over(network: Any) -> bool:
    """Replaces an LLM's layers and its product with the vocabulary, or a quantised image encoder's layers.

    Args:
        network: a Hugging Face model or tower, quantised and not used yet; or an LLM in float32.

    Returns:
        Whether it was; false for a family that is not written down, and where only some layers are quantised.
    """
    if type(network).__name__ in TAKEN:
        return take_over_tower(network)
    family = FAMILIES.get(type(network).__name__)
    if family is None or not family.fits(network.config):
        return False
    if len({isinstance(layer, nn.Linear) for layer in network.modules() if isinstance(layer, Linear)}) > 1:
        return False
    file = ModelFile()
    vocabulary = file.signature("vocabulary")
    product = Product(network.get_output_embeddings(), vocabulary)
    network.set_output_embeddings(product)
    made = family.write(network, file, vocabulary)
    runtime = file.runtime()
    for one in (product, *made):
        one.runtime = runtime
    return True
