"""A tiny model folder with real parts: a CLIP tower, a Llama, a BERT start, tokenizers, and random trained parts.

Weights are drawn wide, so that pictures, prompts and questions change what the language model says.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2.checkpoints.native import FrozenPart, ModelSettings, Prompts, save_model_folder, trained_state
from blip2.model.config import QFormerConfig
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.model.stage2 import Blip2Stage2
from blip2.preprocessing.prompts import CAPTION_INSTRUCTION, CAPTION_PROMPT, QUESTION_PROMPT

WORDS = "what which colour is the this a an of red blue green cup cat star left right how many one two three ? ."
FROM_TEXT_INIT = ("embeddings.word_embeddings.weight",)
WIDTH = 32


@dataclass(frozen=True)
class TinyParts:
    """Folders of the frozen parts and the model folder made with them."""

    model: Path
    vision: Path
    language: Path
    text_init: Path


def make_tiny_model(
    root: Path, *, parts: tuple[str, ...] = ("stage1", "generation"), aware: bool = True, decoder_only: bool = True
) -> TinyParts:
    """Writes all folders under `root`.

    Args:
        root: an existing folder.
        parts: which trained parts the model has.
        aware: whether the generating part reads the instruction.
        decoder_only: whether the language model is a Llama or a T5.
    """
    torch.manual_seed(0)
    folders = TinyParts(root / "tiny", root / "vision", root / "language", root / "text")
    _save_vision(folders.vision)
    _save_language(folders.language, decoder_only)
    vocab_size = _save_text(folders.text_init)
    settings = _settings(folders, vocab_size, aware)
    bert = BertModel.from_pretrained(folders.text_init).state_dict()
    built = {
        "stage1": Blip2Stage1(None, settings.qformer),
        "generation": Blip2Stage2(None, settings.qformer, None, language_width=WIDTH, instruction_aware=aware),
    }
    states = {}
    for name in parts:
        load_text_weights(built[name], bert)
        states[name] = trained_state(built[name], FROM_TEXT_INIT)
    save_model_folder(folders.model, settings, states)
    return folders


def _settings(folders: TinyParts, vocab_size: int, aware: bool) -> ModelSettings:
    qformer = QFormerConfig(
        vocab_size=vocab_size + 1,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        encoder_hidden_size=WIDTH,
        num_query_tokens=4,
        max_position_embeddings=64,
        embed_dim=16,
        initializer_range=0.3,
    )
    return ModelSettings(
        name="tiny",
        vision=FrozenPart(str(folders.vision)),
        language=FrozenPart(str(folders.language)),
        text_init=FrozenPart(str(folders.text_init)),
        qformer=qformer,
        image_size=32,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        instruction_aware=aware,
        prompts=Prompts(CAPTION_PROMPT, CAPTION_INSTRUCTION, QUESTION_PROMPT),
        from_text_init=FROM_TEXT_INIT,
        notes={"licence": "none, random weights"},
    )


def _save_vision(folder: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,
    )
    CLIPVisionModel(config).save_pretrained(folder)


def _save_language(folder: Path, decoder_only: bool) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, QUESTION_PROMPT, CAPTION_PROMPT] * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(folder)
    if not decoder_only:
        _save_t5(folder, tokenizer.get_vocab_size())
        return
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _save_t5(folder: Path, vocab_size: int) -> None:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        initializer_factor=4.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)


def _save_text(folder: Path) -> int:
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*WORDS.split(), *letters, *(f"##{letter}" for letter in letters), "[", "]", "describe", "picture"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    return len(vocabulary)
