"""The golden file that LAVIS gave, and our model with its weights (see benchmarks/lavis_golden.py)."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from blip2.checkpoints.names import Names, unnamed
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.training.stage1 import Stage1Step

GOLDEN = Path(__file__).parent / "golden" / "lavis_stage1.safetensors"
DEC = 59
# Not of the bridge: a buffer, and the second name of tied weights.
DROPPED = {
    "Qformer.bert.embeddings.position_ids",
    "Qformer.cls.predictions.decoder.weight",
    "Qformer.cls.predictions.decoder.bias",
}


def load() -> tuple[dict[str, Tensor], Blip2Stage1]:
    """The file, and our model, in evaluation mode."""
    golden = load_file(GOLDEN)
    state = {name.removeprefix("model."): tensor for name, tensor in golden.items() if name.startswith("model.")}
    assert set(unnamed(state, "lavis", "blip2")) <= DROPPED
    config = QFormerConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=24,
        num_query_tokens=5,
        max_position_embeddings=20,
        embed_dim=16,
    )
    model = Blip2Stage1(None, config)
    model.load_state_dict(Names("lavis", "blip2").rename(state))  # strict: nothing is lacking, nothing left over
    return golden, model.eval()


def losses(golden: dict[str, Tensor], model: Blip2Stage1) -> dict[str, Tensor]:
    """What our step makes of LAVIS's inputs, with the hardest negatives; gradients are on the model then."""
    step = Stage1Step(model, bos_id=DEC, negatives="hardest").eval()
    text = Text(golden["input_ids"], golden["attention_mask"])
    model.zero_grad()
    found = step(Stage1Batch(golden["images"], text, groups=torch.arange(len(golden["images"]))))
    found["loss"].backward()
    return found


def gradients(golden: dict[str, Tensor], model: Blip2Stage1) -> dict[str, Tensor]:
    """Ours, by LAVIS's names, of the weights whose gradient the file holds; after `losses`."""
    way, ours = Names("lavis", "blip2"), dict(model.named_parameters())
    names = [name.removeprefix("gradient.") for name in golden if name.startswith("gradient.")]
    return {name: ours[way.translate(name)].grad for name in names}
