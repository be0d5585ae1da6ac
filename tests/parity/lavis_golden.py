"""The golden files that LAVIS gave, and our models with their weights (see benchmarks/lavis_golden.py)."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2.checkpoints.names import Names, unnamed
from blip2.inference.stage1_losses import Stage1Batch
from blip2.model.config import QFormerConfig
from blip2.model.language import DecoderLM, EncoderDecoderLM
from blip2.model.stage1 import Blip2Stage1, Text
from blip2.model.stage2 import Blip2Stage2
from blip2.training.stage1 import Stage1Step

FOLDER = Path(__file__).parent / "golden"
GOLDEN, GOLDEN_STAGE2 = FOLDER / "lavis_stage1.safetensors", FOLDER / "lavis_stage2.safetensors"
SPEAKERS = ("Blip2OPT", "Blip2T5", "Blip2T5Instruct", "Blip2VicunaInstruct")
DEC, WIDTH = 59, 32
# Not of the bridge: a buffer, and the second name of tied weights.
DROPPED = {
    "Qformer.bert.embeddings.position_ids",
    "Qformer.cls.predictions.decoder.weight",
    "Qformer.cls.predictions.decoder.bias",
}
CONFIG = QFormerConfig(
    vocab_size=60,
    hidden_size=WIDTH,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    encoder_hidden_size=24,
    num_query_tokens=5,
    max_position_embeddings=20,
    embed_dim=16,
)


def load() -> tuple[dict[str, Tensor], Blip2Stage1]:
    """The file, and our model, in evaluation mode."""
    golden = load_file(GOLDEN)
    state = {name.removeprefix("model."): tensor for name, tensor in golden.items() if name.startswith("model.")}
    assert set(unnamed(state, "lavis", "blip2")) <= DROPPED
    model = Blip2Stage1(None, CONFIG)
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


def speaker_loss(name: str) -> tuple[dict[str, Tensor], Tensor, Blip2Stage2]:
    """Of one of SPEAKERS: its part of the file, our loss of its inputs, and our model, with gradients."""
    golden = {k.removeprefix(f"{name}."): v for k, v in load_file(GOLDEN_STAGE2).items() if k.startswith(f"{name}.")}
    state = {k.removeprefix("model."): v for k, v in golden.items() if k.startswith("model.")}
    own_llm = ("opt_model.", "t5_model.", "llm_model.")
    network = _language_network(name)
    told = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(own_llm)}
    network.load_state_dict({k: v for k, v in told.items() if not k.endswith("rotary_emb.inv_freq")})
    wrapper = EncoderDecoderLM if network.config.is_encoder_decoder else DecoderLM
    language_model = wrapper(network, stop_ids=[2], pad_id=0)
    is_aware = name.endswith("Instruct")
    model = Blip2Stage2(None, CONFIG, language_model, instruction_aware=is_aware)
    bridge = Names("lavis", "blip2").rename(state)
    missing, unexpected = model.load_state_dict(bridge, strict=False)
    assert not unexpected and all(one.startswith("language_model.") for one in missing)
    model.eval()
    instruction = Text(golden["qformer_ids"], golden["qformer_mask"]) if is_aware else None
    visual_prompt = model.visual_prompt(golden["images"], instruction)
    prompt, target = ((golden[f"{one}_ids"], golden[f"{one}_mask"]) for one in ("language", "output"))
    if name == "Blip2OPT":  # no prompt: the text is the target, beginning token and all
        prompt, target = tuple(one[:, :0] for one in prompt), prompt
    elif name == "Blip2VicunaInstruct":  # goes on where the prompt ends, without a beginning token
        target = tuple(one[:, 1:] for one in target)
    loss = language_model.token_losses(visual_prompt, *prompt, *target).sum() / target[1].sum()
    loss.backward()
    return golden, loss, model


def _language_network(name: str) -> Any:
    """The LLM of a class as transformers has it."""
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if name == "Blip2OPT":
        return OPTForCausalLM(OPTConfig(**shape, **ends, ffn_dim=64, word_embed_proj_dim=WIDTH)).eval()
    if name == "Blip2VicunaInstruct":
        return LlamaForCausalLM(LlamaConfig(**shape, **ends, intermediate_size=64)).eval()
    config = T5Config(
        vocab_size=60, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, tie_word_embeddings=False, **ends,
    )  # fmt: skip
    config.dense_act_fn = "gelu"
    network = T5ForConditionalGeneration(config).eval()
    network.lm_head.weight = torch.nn.Parameter(torch.zeros(60, WIDTH))  # FlanT5's is its own
    return network
