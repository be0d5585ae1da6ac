"""What is written row by row is what transformers' `generate` gives, whoever else is being written meanwhile."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from blip2.model.language import DecoderLM, EncoderDecoderLM
from blip2.model.packed import PackedLinear, pack
from blip2.model.reading import WORTH_TRIMMING
from blip2.model.writing import Decoding, Writer, write

VOCABULARY, WIDTH, NUM_ROWS = 60, 16, 6
STOP, PAD = [*range(2, VOCABULARY, 5)], 1
WAYS = {
    "greedy": {},
    "at least five": {"min_new_tokens": 5},
    "no repeats": {"repetition_penalty": 1.8},
    "beams": {"num_beams": 4},
    "all beams": {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.0},
    "short beams": {"num_beams": 3, "length_penalty": -1.0, "min_new_tokens": 3},
    "long beams": {"num_beams": 3, "length_penalty": 2.0, "repetition_penalty": 1.3},
    "sampled": {"do_sample": True, "temperature": 0.7, "top_p": 0.8},
    "sampled beams": {"do_sample": True, "num_beams": 3, "temperature": 1.3, "top_p": 0.9},
}


# transformers says that a prompt given as embeddings is not penalised; so it is here.
pytestmark = pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")


def _llama():
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape))


def _mistral():
    """Sees six positions back: its cache keeps a window only."""
    shape = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    few = {"num_key_value_heads": 1, "sliding_window": 6}
    return MistralForCausalLM(MistralConfig(vocab_size=VOCABULARY, max_position_embeddings=64, **shape, **few))


def _gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=64))


def _opt():
    shape = {"hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 32, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, num_attention_heads=2, max_position_embeddings=64, **shape))


def _t5():
    shape = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    special = {"decoder_start_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **shape, **special))


FAMILIES = [_llama, _mistral, _gpt2, _opt, _t5]
JOINING = [_llama, _gpt2, _opt, _t5]


def make_language_model(make):
    torch.manual_seed(3)
    network = make()
    for parameter in network.parameters():
        parameter.data.mul_(4)  # so that what it says differs from row to row, and ends at different lengths
    kind = EncoderDecoderLM if network.config.is_encoder_decoder else DecoderLM
    return kind(network, stop_ids=STOP, pad_id=PAD)


def make_prompts(language_model):
    """Visual prompts (6, 3, D) and ragged prompts (6, P) with their mask."""
    torch.manual_seed(5)
    lengths = torch.tensor([4, 1, 3, 2, 4, 1])
    mask = (torch.arange(4)[None] < lengths[:, None]).long()
    mask = mask if language_model.is_encoder_decoder else mask.flip(1)
    return torch.randn(NUM_ROWS, 3, WIDTH), torch.randint(10, VOCABULARY, (NUM_ROWS, 4)), mask


def alone(prompts, row, language_model):
    """One row's prompt, without padding."""
    visual, ids, mask = prompts
    seen = mask[row].bool()
    return visual[row : row + 1], ids[row][seen][None], mask[row][seen][None]


def up_to_the_end(row):
    ids = row.tolist()
    return ids[: next((i + 1 for i, token in enumerate(ids) if token in STOP), len(ids))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", FAMILIES)
def test_what_is_written_is_what_transformers_generates(make, way):
    language_model = make_language_model(make)
    options = WAYS[way]
    for row in range(NUM_ROWS):
        visual, ids, mask = alone(make_prompts(language_model), row, language_model)
        embeds = torch.cat([visual, language_model.embed(ids)], dim=1)
        torch.manual_seed(row)
        expected = language_model.model.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            eos_token_id=STOP,
            pad_token_id=PAD,
            max_new_tokens=12,
            **{"top_k": 0} | options if "do_sample" in options else options,
        )[:, 1 if language_model.is_encoder_decoder else 0 :]
        torch.manual_seed(row)
        found = write(language_model, *language_model.start(visual, ids, mask), Decoding(max_new_tokens=12, **options))
        assert [up_to_the_end(text) for text in found] == [up_to_the_end(text) for text in expected]


@pytest.mark.parametrize("way", ["greedy", "no repeats", "beams", "all beams", "short beams"])
@pytest.mark.parametrize("make", FAMILIES)
def test_rows_are_written_in_a_batch_as_alone(make, way):
    language_model = make_language_model(make)
    decoding = Decoding(max_new_tokens=12, **WAYS[way])
    prompts = make_prompts(language_model)
    together = write(language_model, *language_model.start(*prompts), decoding)
    expected = []
    for row in range(NUM_ROWS):
        started = language_model.start(*alone(prompts, row, language_model))
        expected += [up_to_the_end(text) for text in write(language_model, *started, decoding)]
    assert [up_to_the_end(text) for text in together] == expected
    assert len({tuple(text) for text in expected}) > 2
    assert way != "greedy" or len({len(text) for text in expected}) > 1  # some leave before others


@pytest.mark.parametrize("make", JOINING)
def test_rows_that_join_and_leave_while_others_are_written_change_nothing(make):
    language_model = make_language_model(make)
    prompts = make_prompts(language_model)
    ways = [Decoding(max_new_tokens=5 + row, repetition_penalty=1.0 + row % 2) for row in range(NUM_ROWS)]
    expected = []
    for row in range(NUM_ROWS):
        started = language_model.start(*alone(prompts, row, language_model))
        expected.append(up_to_the_end(write(language_model, *started, ways[row])[0]))
    writer, rows = Writer(language_model), []
    with torch.no_grad():
        for row in range(NUM_ROWS):  # one joins after every second step
            started = language_model.start(*alone(prompts, row, language_model))
            assert writer.takes(started[0])
            rows += writer.add(*started, [ways[row]])
            writer.step()
            writer.step()
        assert len(writer.rows) < NUM_ROWS  # some have left
        while writer.rows:
            writer.step()
    assert [row.token_ids for row in rows] == expected


def test_a_cancelled_row_leaves_before_the_next_step_and_the_others_go_on():
    language_model = make_language_model(_opt)
    started = language_model.start(*make_prompts(language_model))
    decoding = Decoding(max_new_tokens=12, min_new_tokens=12)
    expected = write(language_model, *language_model.start(*make_prompts(language_model)), decoding).tolist()
    writer = Writer(language_model)
    rows = writer.add(*started, [decoding] * NUM_ROWS)
    with torch.no_grad():
        writer.step()
        rows[0].is_cancelled = rows[4].is_cancelled = True
        written, done = writer.step()
        assert written == [rows[i] for i in (1, 2, 3, 5)] and done == []
        assert len(rows[0].token_ids) == 1
        while writer.rows:
            _, done = writer.step()
    assert [row.token_ids for row in done] == [expected[i] for i in (1, 2, 3, 5)]
    for row in rows:
        row.is_cancelled = True
    assert writer.step() == ([], [])


def test_a_cache_that_keeps_a_window_takes_nobody_in():
    language_model = make_language_model(_mistral)
    visual, ids, mask = make_prompts(language_model)
    writer = Writer(language_model)
    writer.add(*language_model.start(visual, ids, mask), [Decoding()] * NUM_ROWS)
    assert not writer.takes(language_model.start(visual, ids, mask)[0])


@pytest.mark.parametrize("make", FAMILIES)
def test_packed_layers_say_the_same(make):
    language_model = make_language_model(make)
    prompts, decoding = make_prompts(language_model), Decoding(max_new_tokens=12)
    expected = write(language_model, *language_model.start(*prompts), decoding).tolist()
    count = pack(language_model.model)
    assert count == sum(isinstance(layer, PackedLinear) for layer in language_model.modules())
    assert write(language_model, *language_model.start(*prompts), decoding).tolist() == expected


@pytest.mark.parametrize("make", JOINING)
def test_what_is_kept_does_not_grow_while_rows_come_and_go(make):
    language_model = make_language_model(make)
    prompts = make_prompts(language_model)
    decoding = Decoding(max_new_tokens=6, min_new_tokens=6)
    expected = []
    for row in range(NUM_ROWS):
        started = language_model.start(*alone(prompts, row, language_model))
        expected.append(write(language_model, *started, decoding)[0].tolist())
    writer, rows, lengths = Writer(language_model), [], []
    with torch.no_grad():
        for turn in range(60):  # there is always somebody who is being written
            rows += writer.add(*language_model.start(*alone(prompts, turn % NUM_ROWS, language_model)), [decoding])
            writer.step()
            writer.step()
            assert writer._reading is not None
            lengths.append(writer._reading.mask.shape[1])
            assert writer._reading.written.shape[1] <= 1 + language_model.is_encoder_decoder
        while writer.rows:
            writer.step()
    assert [row.token_ids for row in rows] == [expected[turn % NUM_ROWS] for turn in range(60)]
    assert max(lengths) <= 7 + 6 + 2 * WORTH_TRIMMING
