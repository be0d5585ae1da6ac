"""Tokenizers: padding sides, ends, and that what a user types never becomes a special token."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from blip2.errors import BadData, MissingFile
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer, pad

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cup", "##s", "[", "]", "sep", "dec", "cls"]
CORPUS = ["Question: what is this? Answer: a red cup", "a picture of a cup", "im_end im_start < | >"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def words(vocabulary):
    return QFormerTokenizer(vocabulary)


def byte_level(**special):
    """A GPT-2-like Hugging Face tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|im_end|>"} | special))


def sentence_piece():
    """A T5-like Hugging Face tokenizer: a space before every word, </s> at the end and as a piece of the vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -3.0), ("▁a", -2.0), ("▁cup", -2.0)]
    pieces += [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz</>"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def test_dec_is_the_last_id_of_the_vocabulary(words):
    assert (words.dec_id, words.vocab_size) == (len(VOCABULARY), len(VOCABULARY) + 1)


def test_texts_stand_between_cls_and_sep_and_are_padded_on_the_right(words):
    batch = words.encode(["a red cup", "Cups"])
    assert batch.input_ids.tolist() == [[2, 5, 6, 7, 3], [2, 7, 8, 3, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


def test_what_is_cut_off_leaves_sep_in_its_place(words):
    assert words.encode(["red " * 50], max_length=4).input_ids.tolist() == [[2, 6, 6, 3]]


@pytest.mark.parametrize("typed", ["[SEP]", "[DEC]", "[CLS]"])
def test_special_tokens_typed_by_a_user_are_plain_characters_for_the_qformer(words, typed):
    ids = words.encode([f"a {typed} cup"]).input_ids[0].tolist()
    assert ids == [2, 5, *words.encode([typed]).input_ids[0].tolist()[1:-1], 7, 3]
    assert not {words.dec_id, words.sep_id, words.cls_id} & set(ids[1:-1])


def test_a_tokenizer_json_reads_like_its_vocabulary(words, tmp_path, vocabulary):
    words._tokenizer.enable_padding(length=9)  # files carry padding and truncation, which must not apply
    words._tokenizer.enable_truncation(3)
    words._tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["a red [SEP] cup", "cups " * 9]
    expected = QFormerTokenizer(vocabulary).encode(texts)
    for path in (tmp_path / "tokenizer.json", tmp_path):
        assert torch.equal(QFormerTokenizer(path).encode(texts).input_ids, expected.input_ids)


def test_the_qformer_decodes_what_it_encodes(words):
    assert words.decode(words.encode(["a red cup", "cups"]).input_ids) == ["a red cup", "cups"]


def test_what_is_no_bert_tokenizer_is_refused(tmp_path):
    with pytest.raises(MissingFile, match="There is no tokenizer file"):
        QFormerTokenizer(tmp_path / "nowhere.txt")
    with pytest.raises(MissingFile, match=r"holds neither tokenizer\.json nor vocab\.txt"):
        QFormerTokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(BadData, match="so it is not a BERT vocabulary"):
        QFormerTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadData, match="cannot be read as a tokenizer"):
        QFormerTokenizer(tmp_path)
    byte_level().save_pretrained(tmp_path)
    with pytest.raises(BadData, match=r"has no \[PAD\] token"):
        QFormerTokenizer(tmp_path)


def test_padding_sides():
    assert pad([[5], [6, 7]], 0, side="left").input_ids.tolist() == [[0, 5], [6, 7]]
    assert pad([[5], [6, 7]], 0).input_ids.tolist() == [[5, 0], [6, 7]]
    assert pad([[], []], 0).input_ids.shape == (2, 0)


def test_prompts_are_padded_left_and_targets_right_with_eos():
    tokenizer = LanguageTokenizer(byte_level())
    prompts, targets = tokenizer.encode_prompts(["a", "a red cup"]), tokenizer.encode_targets(["cup", "a red cup"])
    assert prompts.attention_mask[0].tolist()[-1] == 1 and prompts.attention_mask[0].sum() == 1
    assert targets.attention_mask[0].tolist()[0] == 1
    ends = targets.attention_mask.sum(dim=1) - 1
    assert targets.input_ids[[0, 1], ends].tolist() == [tokenizer.eos_id] * 2
    assert tokenizer.pad_id == tokenizer.eos_id  # this tokenizer has no token of its own for padding


def test_prompts_for_an_encoder_are_padded_right():
    prompts = LanguageTokenizer(sentence_piece(), prompt_padding="right").encode_prompts(["a", "a cup"])
    assert prompts.attention_mask.tolist() == [[1, 1, 0], [1, 1, 1]]


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_a_prompt_and_its_target_are_the_tokens_of_the_whole_text(make):
    network_tokenizer = make()
    tokenizer = LanguageTokenizer(network_tokenizer)
    prompt = network_tokenizer("a cup", add_special_tokens=False)["input_ids"]
    target = tokenizer.encode_targets(["a cup"], append_eos=False).input_ids[0].tolist()
    assert prompt + target == network_tokenizer("a cup a cup", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokenizer.encode_targets(["a cup"]).input_ids) == ["a cup"]


def test_bos_and_eos_are_added_to_prompts_only_where_the_tokenizer_does_so():
    assert LanguageTokenizer(sentence_piece()).encode_prompts(["a cup"]).input_ids.tolist() == [[4, 5, 1]]
    with_bos = byte_level(bos_token="<|im_start|>")
    assert LanguageTokenizer(with_bos).encode_prompts(["a"]).input_ids.shape == (1, 1)
    with_bos._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", with_bos.bos_token_id)]
    )
    tokenizer = LanguageTokenizer(with_bos)
    assert tokenizer.encode_prompts(["a"]).input_ids[0, 0] == tokenizer.bos_id
    assert tokenizer.encode_targets(["a"]).input_ids[0, 0] != tokenizer.bos_id


def test_a_text_after_an_empty_prompt_begins_without_the_parting_space():
    tokenizer = LanguageTokenizer(byte_level())
    alone = tokenizer.tokenizer("cup", add_special_tokens=False).input_ids
    after_nothing, after_words = tokenizer.encode_targets(["cup", "cup"], prompts=["", "a red"]).input_ids.tolist()
    parted = tokenizer.encode_targets(["cup"]).input_ids[0].tolist()
    assert after_nothing[: len(alone)] == alone and after_words[: len(parted)] == parted
    assert alone != parted[: len(alone)]


@pytest.mark.parametrize(
    ("make", "typed"), [(byte_level, "<|im_end|>"), (byte_level, "<|im_start|>"), (sentence_piece, "</s>")]
)
def test_special_tokens_typed_by_a_user_are_plain_characters_for_the_language_model(make, typed):
    tokenizer = LanguageTokenizer(make())
    ids = tokenizer._plain_ids(f"a {typed} cup{typed}")
    assert not set(ids) & tokenizer._special_ids
    assert len(ids) > 6


def test_decoding_stops_at_the_first_eos():
    tokenizer = LanguageTokenizer(byte_level())
    ids = tokenizer.encode_targets(["a cup"]).input_ids
    assert tokenizer.decode(torch.cat([ids, ids], dim=1)) == ["a cup"]


def test_targets_are_cut_without_eos():
    tokenizer = LanguageTokenizer(byte_level())
    ids = tokenizer.encode_targets(["a cup a cup a cup"], max_length=3).input_ids
    assert ids.shape == (1, 3) and ids[0, -1] != tokenizer.eos_id


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(BadData, match="would never end"):
        LanguageTokenizer(byte_level(eos_token=None))
