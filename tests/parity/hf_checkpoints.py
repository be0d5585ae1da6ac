"""Tiny Hugging Face checkpoints of every class, random but wide awake: pictures and prompts change what they say."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

WORDS = (
    "what which colour is the this a photo of an red blue green cup cat star left right how many one two : . ? answer"
)
PROMPTS = ("a photo of", "question: which colour is the red cup left of the star? answer:", "how many", "a cat? the")
NUM_QUERIES, WIDTH = 5, 32
KINDS = ("blip2-opt", "blip2-t5", "instructblip-llama", "instructblip-t5", "blip2-retrieval")


@dataclass(frozen=True)
class Peer:
    """A checkpoint with the code that made it."""

    folder: Path
    model: Any
    processor: Any


def make(kind: str, folder: Path) -> Peer:
    """Writes a checkpoint of one of KINDS; the model given back is the one that was written."""
    torch.manual_seed(len(kind))
    model = _model(kind).eval()
    if kind.endswith("t5"):  # FlanT5's head is its own
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.empty_like(head.weight))
    _wake(model)
    processor = _processor(kind, model.config)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder, max_shard_size="200KB")
    processor.save_pretrained(folder)
    return Peer(folder, model, processor)


def made_on_first_use(factory: Any) -> Callable[[str], Peer]:
    """Kind -> its checkpoint, written when it is first asked for; `factory` is pytest's tmp_path_factory."""
    made: dict[str, Peer] = {}

    def peer(kind: str) -> Peer:
        if kind not in made:
            made[kind] = make(kind, factory.mktemp(kind) / "checkpoint")
        return made[kind]

    return peer


def pictures(count: int) -> list[Image.Image]:
    """Random pictures of random shapes."""
    rng = np.random.default_rng(count)
    shapes = rng.integers(8, 90, (count, 2))
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in shapes]


def forgetful(model: Any) -> Any:
    """The model, keeping nothing of a picture: what it gives is computed in the batch asked for, as a peer's is."""
    model.image_cache.max_bytes = 0
    if "generation" in model.settings.parts:
        model.generator.image_cache.max_bytes = 0
    return model


def token_losses(peer: Peer, model: Any, image: Image.Image, prompt: str, answer: str) -> tuple[Tensor, Tensor]:
    """Cross-entropy (T,) of every token of an answer: by our model, and from the logits of Hugging Face's."""
    generator = model.generator
    inputs = peer.processor(images=[image], text=[prompt], padding=True, return_tensors="pt")
    told = generator.tokenizer.encode_targets([answer])
    if generator.language_model.is_encoder_decoder:
        logits = peer.model(**inputs, labels=told.input_ids).logits
    else:
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(told.input_ids)], dim=1)
        ids = torch.cat([inputs["input_ids"], told.input_ids], dim=1)
        logits = peer.model(**{**inputs, "attention_mask": mask, "input_ids": ids}).logits
        logits = logits[:, -told.input_ids.shape[1] - 1 : -1]
    theirs = torch.nn.functional.cross_entropy(logits[0], told.input_ids[0], reduction="none")
    read = generator.tokenizer.encode_prompts([prompt])
    visual_prompt = generator.visual_prompt(model.image_features(image), [prompt])
    ours = generator.language_model.token_losses(
        visual_prompt, read.input_ids, read.attention_mask, told.input_ids, told.attention_mask
    )
    return ours[0], theirs


def _model(kind: str) -> Any:
    vision = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 7,
    }
    qformer = {
        "vocab_size": _bert_size(),
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "encoder_hidden_size": 24,
        "max_position_embeddings": 64,
    }
    language = _language_config(kind)
    shared = {"num_query_tokens": NUM_QUERIES, "image_token_index": language.vocab_size - 1}
    if kind.startswith("instructblip"):
        parts = (InstructBlipVisionConfig(**vision), InstructBlipQFormerConfig(**qformer), language)
        config = InstructBlipConfig(
            **dict(zip(("vision_config", "qformer_config", "text_config"), parts, strict=True)), **shared
        )
        return InstructBlipForConditionalGeneration(config)
    parts = (
        Blip2VisionConfig(**vision),
        Blip2QFormerConfig(**qformer, use_qformer_text_input=kind == "blip2-retrieval"),
        language,
    )
    named = dict(zip(("vision_config", "qformer_config", "text_config"), parts, strict=True))
    if kind == "blip2-retrieval":
        return Blip2ForImageTextRetrieval(Blip2Config(**named, num_query_tokens=NUM_QUERIES, image_text_hidden_size=16))
    return Blip2ForConditionalGeneration(Blip2Config(**named, **shared))


def _language_config(kind: str) -> Any:
    size = len(language_tokenizer(kind)) + 1  # and the image token
    shape = {"vocab_size": size, "hidden_size": WIDTH, "num_attention_heads": 4, "num_hidden_layers": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if kind.endswith("t5"):
        return T5Config(
            vocab_size=size, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            eos_token_id=1, pad_token_id=2, decoder_start_token_id=2, tie_word_embeddings=False,
        )  # fmt: skip
    if kind.endswith("llama"):
        return LlamaConfig(**shape, **ends, intermediate_size=64, num_key_value_heads=2)
    return OPTConfig(**shape, **ends, ffn_dim=64, word_embed_proj_dim=WIDTH)


def _wake(model: Any) -> None:
    """Wide random weights everywhere: published starts are zeros in places, which would hide a mistake."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
        elif name.endswith("weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)


def _processor(kind: str, config: Any) -> Any:
    image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28})
    if kind == "blip2-retrieval":
        return Blip2Processor(image_processor, _bert_tokenizer())
    tokenizer = language_tokenizer(kind)
    if kind.startswith("instructblip"):
        return InstructBlipProcessor(image_processor, tokenizer, _bert_tokenizer(), num_query_tokens=NUM_QUERIES)
    return Blip2Processor(image_processor, tokenizer, num_query_tokens=NUM_QUERIES)


def language_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Byte-level, with what the family puts around a text: </s> before it (OPT), <s> (Llama), </s> after it (T5)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *PROMPTS], trainer)
    single = "$A </s>" if kind.endswith("t5") else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right" if kind.endswith("t5") else "left",
    )


def _bert_vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz?.:"
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *letters, *(f"##{c}" for c in letters)]


def _bert_tokenizer() -> BertTokenizer:
    distinct = list(dict.fromkeys(_bert_vocabulary()))
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(distinct)})
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


def _bert_size() -> int:
    return len(_bert_tokenizer())
