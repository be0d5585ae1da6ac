"""Checkpoints in the published shapes with random weights, for what does not depend on their values."""

from pathlib import Path

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

from .hf_checkpoints import language_tokenizer

OPT = {
    "model_type": "opt",
    "hidden_size": 2560,
    "word_embed_proj_dim": 2560,
    "ffn_dim": 10_240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 50_272,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
FLAN_T5 = {
    "model_type": "t5",
    "d_model": 2048,
    "d_kv": 64,
    "num_heads": 32,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "vocab_size": 32_128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
# one piece each, as in the published vocabularies, so that the prompts of `blip2 bench` are as long as they are there
PIECES = ("question", "answer", *(f" {word}" for word in "photo of question how many cups are there answer".split()))
SIZES = {"opt-2.7b": ("blip2-opt", OPT), "flan-t5-xl": ("blip2-t5", FLAN_T5)}


def make(folder: Path, size: str, layers: float = 1.0, device: str = "cpu") -> Blip2Processor:
    """Writes a checkpoint of that size in Hugging Face's layout, in shards of 2 GB; gives its processor.

    Args:
        folder: where.
        size: one of SIZES.
        layers: share of the layers of both stacks.
        device: where the weights are drawn, which a GPU does in a second.
    """
    kind, language = SIZES[size]
    language = {
        key: round(value * layers) if key in ("num_hidden_layers", "num_layers", "num_decoder_layers") else value
        for key, value in language.items()
    }
    tokenizer = language_tokenizer(kind)
    tokenizer.add_tokens(list(PIECES))
    tokenizer.add_tokens([f" w{i}" for i in range(len(tokenizer), language["vocab_size"] - 1)])  # each id is a text
    processor = Blip2Processor(
        BlipImageProcessorPil(size={"height": 224, "width": 224}), tokenizer, num_query_tokens=32
    )
    config = Blip2Config(
        text_config=language,
        vision_config={"num_hidden_layers": round(39 * layers)},
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Blip2ForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():  # published starts are too small to tell pictures apart
        if parameter.ndim > 1 and not name.startswith("language_model."):
            torch.nn.init.normal_(parameter, std=0.05 if name.startswith("vision_model.") else 0.1)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, max_shard_size="2GB")
    processor.save_pretrained(folder)
    return processor
