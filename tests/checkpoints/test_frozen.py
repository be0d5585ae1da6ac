"""Frozen parts come by name: from packages, from Hugging Face folders, and from nothing that could run code."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from blip2 import paths, registry
from blip2.checkpoints import frozen, packaged
from blip2.errors import BadData, MissingFile, UnknownModel, Untrusted
from blip2.model.vision import HuggingFaceConvNext, HuggingFaceVision

SHAPE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION_SHAPE = {**SHAPE, "image_size": 32, "patch_size": 8}
TEXT_SHAPE = {**SHAPE, "vocab_size": 30, "max_position_embeddings": 16}
TOWERS = {
    "CLIPVisionModel": transformers.CLIPVisionConfig,
    "Blip2VisionModel": transformers.Blip2VisionConfig,
    "SiglipVisionModel": transformers.SiglipVisionConfig,
    "Dinov2Model": transformers.Dinov2Config,
    "Dinov2WithRegistersModel": transformers.Dinov2WithRegistersConfig,
    "ViTModel": transformers.ViTConfig,
}


def tiny(model_class: str, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, model_class)(config).eval()


def save_tokenizer(folder) -> None:
    words = {word: index for index, word in enumerate(["<pad>", "<unk>", "</s>", "a", "red", "cat"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("tower_class", TOWERS)
def test_a_saved_tower_gives_the_features_it_had_at_a_size_of_its_own(tower_class, tmp_path):
    tower = tiny(tower_class, TOWERS[tower_class](**VISION_SHAPE))
    tower.save_pretrained(tmp_path)
    encoder = frozen.load_vision(str(tmp_path), image_size=48)
    pixel_values = torch.randn(1, 3, encoder.image_size, encoder.image_size)
    expected = HuggingFaceVision(tower, name="tiny")(pixel_values)
    assert encoder.image_size == 48 and expected.shape[1] >= 36
    torch.testing.assert_close(encoder(pixel_values), expected)


def test_a_saved_convnext_gives_the_features_it_had(tmp_path):
    shape = {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 64}
    network = tiny("ConvNextModel", transformers.ConvNextConfig(**shape))
    network.save_pretrained(tmp_path)
    encoder, pixel_values = frozen.load_vision(str(tmp_path)), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder(pixel_values), HuggingFaceConvNext(network, name="tiny")(pixel_values))
    with pytest.raises(UnknownModel, match="no transformer layer to drop"):
        frozen.load_vision(str(tmp_path), drop_last_layer=True)


@pytest.mark.parametrize(
    ("whole", "tower_class"),
    [("CLIPModel", "CLIPVisionModel"), ("SiglipModel", "SiglipVisionModel"), ("Blip2Model", "Blip2VisionModel")],
)
def test_a_whole_model_gives_its_vision_half(whole, tower_class, tmp_path):
    if whole == "Blip2Model":
        config = transformers.Blip2Config(
            vision_config=VISION_SHAPE,
            qformer_config={**TEXT_SHAPE, "encoder_hidden_size": 16},
            text_config={"model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16, **TEXT_SHAPE},
        )
    else:
        config = getattr(transformers, whole.replace("Model", "Config"))(
            vision_config=VISION_SHAPE, text_config=TEXT_SHAPE
        )
    model = tiny(whole, config)
    model.save_pretrained(tmp_path)
    encoder, pixel_values = frozen.load_vision(str(tmp_path)), torch.randn(1, 3, 32, 32)
    assert type(encoder.network).__name__ == tower_class
    alone = tiny(tower_class, config.vision_config)
    weights = model.vision_model.state_dict()
    alone.load_state_dict({name.removeprefix("vision_model."): tensor for name, tensor in weights.items()})
    torch.testing.assert_close(encoder(pixel_values), HuggingFaceVision(alone, name="alone")(pixel_values))


def test_the_colours_of_a_checkpoint_are_normalised_as_it_says(tmp_path):
    tiny("ViTModel", transformers.ViTConfig(**VISION_SHAPE)).save_pretrained(tmp_path)
    assert frozen.load_vision(str(tmp_path)).image_mean == (0.5, 0.5, 0.5)
    normalisation = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(normalisation))
    assert frozen.load_vision(str(tmp_path)).image_mean == (0.1, 0.2, 0.3)


def test_a_model_that_does_not_see_is_no_image_encoder(tmp_path):
    tiny("BertModel", transformers.BertConfig(**TEXT_SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match="is a bert, no vision tower we can read: clip"):
        frozen.load_vision(str(tmp_path))


@pytest.mark.parametrize("load", [frozen.load_vision, frozen.load_language, frozen.load_text_init])
@pytest.mark.parametrize("name", ["no such model", "/nowhere/at/all", "smollm2/../x"])
def test_a_name_that_cannot_be_a_model_is_refused_at_once(load, name):
    with pytest.raises(UnknownModel, match=r"nor a folder\. Check the spelling"):
        load(name)


def test_a_misspelt_name_is_answered_with_the_right_one():
    with pytest.raises(UnknownModel, match=r"Did you mean smollm2-135m-instruct\?"):
        frozen.load_language("smollm2-135m")


def test_a_folder_without_a_config_is_no_model(tmp_path):
    with pytest.raises(UnknownModel, match=r"has no config\.json"):
        frozen.load_vision(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path):
    tower = tiny("ViTModel", transformers.ViTConfig(**VISION_SHAPE))
    tower.config.save_pretrained(tmp_path)
    with pytest.raises(MissingFile, match="has no weights"):
        frozen.load_vision(str(tmp_path))
    torch.save(tower.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(Untrusted, match="weights as pickles only"):
        frozen.load_vision(str(tmp_path))


def test_a_model_that_brings_its_own_code_is_refused(tmp_path):
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.EvilConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(Untrusted, match="needs Python code from its own folder"):
        frozen.load_language(str(tmp_path))


def test_weights_that_would_be_left_random_are_an_error(tmp_path):
    tiny("CLIPVisionModel", transformers.CLIPVisionConfig(**VISION_SHAPE)).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    removed = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    del weights[removed]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadData, match=r"lacks 1 weights of CLIPVisionModel, the first is .*fc1"):
        frozen.load_vision(str(tmp_path))


@pytest.mark.parametrize("model_class", ["LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_decoders_and_encoder_decoders_load_frozen_with_their_tokenizer(model_class, tmp_path):
    if model_class == "LlamaForCausalLM":
        config = transformers.LlamaConfig(**TEXT_SHAPE)
    else:
        config = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=30)
    model = tiny(model_class, config)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    loaded, tokenizer = frozen.load_language(str(tmp_path), torch.bfloat16)
    assert type(loaded).__name__ == model_class and loaded.dtype == torch.bfloat16
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert tokenizer("a red cat", add_special_tokens=False).input_ids == [3, 4, 5]
    assert frozen.fingerprint(loaded) == frozen.fingerprint(model.to(torch.bfloat16))


@pytest.mark.parametrize("model_class", ["BertModel", "BertForMaskedLM"])
def test_a_bert_is_the_same_start_with_or_without_its_head(model_class, tmp_path):
    bert = tiny(model_class, transformers.BertConfig(**TEXT_SHAPE))
    bert.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    start = frozen.load_text_init(str(tmp_path))
    encoder = bert if model_class == "BertModel" else bert.bert
    names = {name for name in start.state_dict if not name.startswith("cls.")}
    assert names == set(encoder.state_dict())
    assert all(torch.equal(start.state_dict[name], encoder.state_dict()[name]) for name in names)
    assert ("cls.predictions.transform.dense.weight" in start.state_dict) == (model_class == "BertForMaskedLM")
    assert start.tokenizer_file.name == "vocab.txt" and start.config.hidden_size == 16


def test_berts_old_names_of_norms_are_understood(tmp_path):
    bert = tiny("BertModel", transformers.BertConfig(**TEXT_SHAPE))
    bert.config.save_pretrained(tmp_path)
    old = {}
    for name, tensor in bert.state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        old[f"bert.{name}"] = tensor.contiguous()
    save_file(old, tmp_path / "model.safetensors")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    assert set(frozen.load_text_init(str(tmp_path)).state_dict) == set(bert.state_dict())


def test_a_q_former_does_not_start_from_something_else_than_a_bert(tmp_path):
    tiny("ViTModel", transformers.ViTConfig(**VISION_SHAPE)).save_pretrained(tmp_path)
    with pytest.raises(UnknownModel, match="is a vit, and a Q-Former can start from a BERT only"):
        frozen.load_text_init(str(tmp_path))


def test_a_fingerprint_tells_weights_apart_and_nothing_else():
    torch.manual_seed(0)
    linear, copy = nn.Linear(3, 2), nn.Linear(3, 2)
    copy.load_state_dict(linear.state_dict())
    original = frozen.fingerprint(linear)
    assert frozen.fingerprint(copy.train().requires_grad_(False)) == original
    assert frozen.fingerprint(copy.to(torch.float64)) != original
    with torch.no_grad():
        linear.bias[1] += 1e-6
    assert frozen.fingerprint(linear) != original


def test_a_folder_made_once_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))

    def fail_half_way(target):
        (target / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        packaged.made_once("model", fail_half_way)
    assert list(paths.models_dir().iterdir()) == []
    folder = packaged.made_once("model", lambda target: (target / "weights").write_text("all"))
    assert packaged.made_once("model", fail_half_way) == folder and (folder / "weights").read_text() == "all"


def need_package(key: str) -> None:
    """Skips unless the package lies in the cache: a test must not download."""
    if not (paths.packages_dir() / registry.PACKAGES[key].filename).is_file():
        pytest.skip(f"{key} is not in the cache; blip2 data fetch brings it")


def test_the_minis_image_encoder_loads_by_name():
    need_package("efficientnet-lite2")
    encoder = frozen.load_vision("efficientnet-lite2", torch.bfloat16)
    assert (encoder.name, encoder.image_size, encoder.width) == ("efficientnet-lite2", 256, 512)
    assert encoder(torch.randn(1, 3, 64, 64)).dtype == torch.bfloat16
    with pytest.raises(UnknownModel, match="no transformer layer to drop"):
        frozen.load_vision("efficientnet-lite2", drop_last_layer=True)


def test_the_minis_text_start_loads_by_name():
    need_package("minilm-l6-v2")
    start = frozen.load_text_init("minilm-l6-v2")
    bert = transformers.BertModel(start.config)
    bert.load_state_dict(start.state_dict, strict=True)
    assert (start.config.hidden_size, start.config.num_hidden_layers, start.config.vocab_size) == (384, 6, 30522)
    tokens = Tokenizer.from_file(str(start.tokenizer_file)).encode("a cat").tokens  # the file asks to pad to 128
    assert tokens[:4] == ["[CLS]", "a", "cat", "[SEP]"]


def test_the_minis_language_model_loads_by_name_and_answers():
    if not (paths.models_dir() / "smollm2-135m-instruct").is_dir():
        pytest.skip("SmolLM2 is not converted yet; the first use of the mini model does it")
    model, tokenizer = frozen.load_language("smollm2-135m-instruct")
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.all_special_tokens
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=10, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_gguf_converts_to_the_same_model_each_time(tmp_path, monkeypatch):
    need_package("smollm2-135m-instruct")
    packages, cached = paths.packages_dir(), frozen.load_language("smollm2-135m-instruct")[0]
    monkeypatch.setenv("BLIP2_HOME", str(tmp_path))
    tmp_path.joinpath("packages").symlink_to(packages)
    assert frozen.fingerprint(frozen.load_language("smollm2-135m-instruct")[0]) == frozen.fingerprint(cached)
