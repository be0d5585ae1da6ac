"""A decoder LLM's losses on ragged batches equal those of each row alone, for families with other positions."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from blip2.model.language import DecoderLM
from blip2.model.writing import Decoding, write

VOCABULARY, WIDTH = 60, 16
PROMPTS, TARGETS = ([5, 6, 7, 8], [9], [3, 4]), ([11, 2], [12, 13, 14, 2], [15, 16, 2])
TOLERANCE = 1e-5  # float32; worst of 20 seeds and the three families 5e-7


def _llama() -> LlamaForCausalLM:
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape))


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64))


def _opt() -> OPTForCausalLM:
    shape = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=64, **shape))


def _padded(rows: tuple[list[int], ...], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) padded with 1, and the mask."""
    length = max(map(len, rows))
    fill = [length - len(row) for row in rows]
    ids = [[1] * n + row if left else row + [1] * n for row, n in zip(rows, fill, strict=True)]
    mask = [[0] * n + [1] * len(row) if left else [1] * len(row) + [0] * n for row, n in zip(rows, fill, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize("make", [_llama, _gpt2, _opt])
def test_ragged_rows_have_the_losses_that_each_has_alone(make):
    torch.manual_seed(0)
    network = make().eval()
    model = DecoderLM(network, stop_ids=[2], pad_id=1)
    visual_prompt = torch.randn(3, 4, WIDTH)
    prompt, target = _padded(PROMPTS, left=True), _padded(TARGETS, left=False)
    losses = model.token_losses(visual_prompt, *prompt, *target)
    assert losses.shape == target[0].shape
    assert torch.equal(losses == 0, target[1] == 0)
    for row, (before, after) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        ids = torch.tensor([before + after])
        embeds = torch.cat([visual_prompt[row : row + 1], network.get_input_embeddings()(ids)], dim=1)
        logits = network(inputs_embeds=embeds).logits[0, -len(after) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="none")
        assert losses[row, : len(after)].tolist() == pytest.approx(expected.tolist(), abs=TOLERANCE)


@pytest.mark.parametrize("make", [_llama, _gpt2, _opt])
def test_the_vocabularys_matrix_is_given_inputs_in_one_piece(make):
    """In bfloat16 on a CPU PyTorch would otherwise copy the matrix once a row, at the first word of every batch."""
    language_model = DecoderLM(make().eval(), stop_ids=[2], pad_id=1)
    prompt_ids, prompt_mask = _padded(PROMPTS, left=True)
    seen = []
    head = language_model.model.get_output_embeddings()
    head.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    started = language_model.start(torch.randn(len(PROMPTS), 4, WIDTH), prompt_ids, prompt_mask)
    write(language_model, *started, Decoding(max_new_tokens=3))
    assert seen and all(hidden.is_contiguous() for hidden in seen)
