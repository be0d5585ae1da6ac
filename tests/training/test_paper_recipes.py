"""The built-in recipes hold the papers' numbers, each of them."""

from importlib import resources

import pytest

from blip2.training.recipe import read_recipe, shipped_recipes, to_settings

VIT_G, VIT_L = "Salesforce/blip2-opt-2.7b", "openai/clip-vit-large-patch14"
PRE_TRAINING = {
    "model.vision": VIT_G,
    "model.text_init": "bert-base-uncased",
    "model.num_query_tokens": 32,
    "model.embed_dim": 256,
    "model.dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.query_pooling": "max",
    "model.text_pooling": "cls",
    "model.freeze_word_embeddings": False,
    "model.train_vision": False,
    "model.image_size": None,  # 224, as both encoders were trained
    "data.augment": True,
    "data.cache_features": False,
    "data.max_text_length": 32,
    "data.image_token_share": 1.0,
    "optimizer.learning_rate": 1e-4,
    "optimizer.warmup_learning_rate": 1e-6,
    "optimizer.warmup_steps": 2000,
    "optimizer.betas": [0.9, 0.98],
    "optimizer.weight_decay": 0.05,
    "optimizer.max_grad_norm": 0.0,
    "optimizer.layer_decay": 1.0,
    "training.precision": "bfloat16",
}
STAGE1 = PRE_TRAINING | {
    "stage": "stage1",
    "model.language": None,
    "optimizer.min_learning_rate": 1e-5,
    "training.steps": 250_000,
    "training.label_smoothing": 0.1,
    "training.negatives": "paper",
    "training.itc_weight": 1.0,
    "training.itm_weight": 1.0,
    "training.itg_weight": 1.0,
    "training.sentence_weight": 0.0,
    "training.matched_share": 1.0,
    "training.accumulation": 1,  # a part would have fewer negatives
}
STAGE2 = PRE_TRAINING | {
    "stage": "stage2",
    "model.init_from": "paper-stage1-vit-g",
    "model.instruction_aware": False,
    "optimizer.min_learning_rate": 5e-5,
    "training.steps": 80_000,
    "training.label_smoothing": 0.0,
}
BARE = {"prompts.caption": ""}  # decoders; null is prefix language modelling, as encoder-decoders learn
FINE_TUNING = {
    "model.vision": VIT_G,
    "model.train_vision": True,
    "optimizer.warmup_steps": 1000,
    "optimizer.warmup_learning_rate": 1e-8,
    "optimizer.learning_rate": 1e-5,
    "optimizer.min_learning_rate": 0.0,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.05,
    "data.augment": True,
    "data.cache_features": False,
}
INSTRUCT = {
    "stage": "instruct",
    "model.vision": VIT_G,
    "model.instruction_aware": True,
    "model.train_vision": False,
    "data.max_text_length": 128,
    "data.max_answer_length": 256,
    "prompts.caption": "Write a short description for the image.",
    "prompts.caption_instruction": "Write a short description for the image.",
    "prompts.question": "{}",  # the instruction as it stands
    "optimizer.learning_rate": 1e-5,
    "optimizer.warmup_steps": 1000,
    "optimizer.warmup_learning_rate": 1e-8,
    "optimizer.min_learning_rate": 0.0,
    "optimizer.betas": [0.9, 0.999],
    "optimizer.weight_decay": 0.05,
    "training.steps": 60_000,
}
COCO_CAPTIONS, FLICKR30K_CAPTIONS = 566_747, 145_000
VQA_QUESTIONS, VISUAL_GENOME_QUESTIONS = 443_757 + 214_354, 1_445_322
TABLE = {
    "paper/stage1-vit-g": STAGE1 | {"training.batch_size": 1680},
    "paper/stage1-vit-l": STAGE1 | {"training.batch_size": 2320, "model.vision": VIT_L},
    "paper/stage2-opt-2.7b": STAGE2 | {"training.batch_size": 1920, "model.language": "facebook/opt-2.7b", **BARE},
    "paper/stage2-opt-6.7b": STAGE2 | {"training.batch_size": 1920, "model.language": "facebook/opt-6.7b", **BARE},
    "paper/stage2-flan-t5-xl": STAGE2 | {"training.batch_size": 1520, "model.language": "google/flan-t5-xl"},
    "paper/stage2-flan-t5-xxl": STAGE2 | {"training.batch_size": 1520, "model.language": "google/flan-t5-xxl"},
    "finetune/coco-caption": FINE_TUNING
    | {
        "stage": "stage2",
        "model.image_size": 364,
        "prompts.caption": "a photo of",
        "optimizer.layer_decay": 1.0,
        "training.batch_size": 256,
        "training.steps": round(5 * COCO_CAPTIONS / 256),
        "training.label_smoothing": 0.0,
    },
    "finetune/vqa": FINE_TUNING
    | {
        "stage": "instruct",
        "model.image_size": 490,
        "model.instruction_aware": True,
        "prompts.question": "Question: {} Answer:",
        "optimizer.layer_decay": 0.95,
        "training.batch_size": 128,
        "training.steps": round(5 * (VQA_QUESTIONS + VISUAL_GENOME_QUESTIONS) / 128),
    },
    "finetune/coco-retrieval": FINE_TUNING
    | {
        "stage": "stage1",
        "model.image_size": 364,
        "optimizer.layer_decay": 0.95,
        "training.batch_size": 224,
        "training.steps": round(5 * COCO_CAPTIONS / 224),
        "training.itc_weight": 1.0,
        "training.itm_weight": 1.0,
        "training.itg_weight": 1.0,
    },
    "finetune/flickr30k-retrieval": FINE_TUNING
    | {
        "model.init_from": "finetune-coco-retrieval",
        "training.batch_size": 224,
        "training.steps": round(5 * FLICKR30K_CAPTIONS / 224),
    },
    "instructblip/flan-t5-xl": INSTRUCT | {"training.batch_size": 192, "model.language": "google/flan-t5-xl"},
    "instructblip/flan-t5-xxl": INSTRUCT | {"training.batch_size": 128, "model.language": "google/flan-t5-xxl"},
    "instructblip/vicuna-7b": INSTRUCT | {"training.batch_size": 128, "model.language": "lmsys/vicuna-7b-v1.1"},
    "instructblip/vicuna-13b": INSTRUCT | {"training.batch_size": 64, "model.language": "lmsys/vicuna-13b-v1.1"},
}


def value(settings, path):
    """A setting by its path, such as optimizer.betas."""
    for name in path.split("."):
        settings = settings[name]
    return settings


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_holds_the_paper_s_numbers(name):
    settings = to_settings(read_recipe(name))
    assert {path: value(settings, path) for path in TABLE[name]} == TABLE[name]


def test_no_recipe_after_a_paper_is_left_out_of_the_table():
    named = [name for name in shipped_recipes() if name.partition("/")[0] in ("paper", "finetune", "instructblip")]
    assert sorted(named) == sorted(TABLE)


def test_a_run_that_another_starts_from_is_the_run_of_a_recipe():
    recipes = {name: read_recipe(name) for name in shipped_recipes()}
    runs = {recipe.name for recipe in recipes.values()}
    starts = {name: recipe.model.init_from for name, recipe in recipes.items() if recipe.model.init_from}
    assert {name: start for name, start in starts.items() if start not in runs} == {
        "own/caption": "Salesforce/blip2-opt-2.7b"  # of the hub
    }


def test_each_recipe_s_run_has_the_recipe_s_name():
    for name in shipped_recipes():
        family, _, kind = name.partition("/")
        assert read_recipe(name).name == f"{family}-{kind}"


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("instructblip/")])
def test_instructblip_draws_its_sets_by_the_root_of_their_size(name):
    weights = {item.source: item.weight for item in read_recipe(name).data.mixture}
    sizes = {
        "web-capfilt": 14_000_000,
        "coco:coco/annotations/captions_karpathy_train.json": 414_000,
        "textcaps/captions.jsonl": 109_765,
        "vqav2/instructions.jsonl": 443_757,
        "okvqa/instructions.jsonl": 9_009,
        "aokvqa/instructions.jsonl": 17_056,
        "ocr-vqa/instructions.jsonl": 801_579,
        "llava-instruct-150k/instructions.jsonl": 150_000,
    }
    for source, size in sizes.items():
        assert weights[source] == pytest.approx(size**0.5, abs=1)


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.startswith("own/")])
def test_a_template_is_short_and_says_what_to_change(name):
    text = resources.files("blip2").joinpath(f"recipes/{name}.yaml").read_text(encoding="utf-8")
    assert text.count("\n") <= 50 and text.count("  # ") >= 8
    assert f"blip2 train {name} --show" in " ".join(text.replace("# ", "").split())
