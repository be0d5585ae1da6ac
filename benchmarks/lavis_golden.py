"""Runs the original code (LAVIS) on tiny random models and keeps what it gave: the golden file of tests/parity.

LAVIS needs an old transformers, so this runs apart from the project, in an environment of its own, and imports nothing
of it. None of LAVIS is kept but numbers. To repeat it:

    git clone https://github.com/salesforce/LAVIS && python -m venv lavis-env
    lavis-env/bin/pip install torch "transformers==4.33.2" "tokenizers==0.13.3" "huggingface-hub<1.0" "numpy<2"
    lavis-env/bin/python benchmarks/lavis_golden.py LAVIS tests/parity/golden

lavis_stage1.safetensors holds the model's state dict under LAVIS's own names, the inputs, the three losses of stage 1,
the features of contrast, and gradients. Negatives are the most similar wrong pairs (LAVIS draws them by
torch.multinomial, which is replaced by argmax here); dropout is off. lavis_stage2.safetensors holds the like for the
four classes that speak: state dict, LLM included, inputs, the loss and the gradient of the queries and the projection.
"""

import argparse
import importlib
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

SEED = 20
NUM_PAIRS, NUM_IMAGE_TOKENS, VISION_WIDTH = 6, 7, 24
NUM_QUERIES, WIDTH, EMBED_DIM = 5, 32, 16
VOCABULARY, LONGEST = 60, 12
PAD, CLS, SEP, DEC = 0, 2, 3, 59
BEGIN, END = 1, 2  # of the LLMs
GRADIENTS = ("query_tokens", "ln_vision.weight", "temp", "itm_head.weight", "vision_proj.weight", "text_proj.weight")


def main() -> None:
    """Builds LAVIS's stage-1 model, runs one forward and backward, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lavis", type=Path, help="a checkout of LAVIS")
    parser.add_argument("out", type=Path, help="the folder of golden files")
    args = parser.parse_args()
    stand_in(args.lavis / "lavis")
    args.out.mkdir(parents=True, exist_ok=True)
    write_stage2(args.out / "lavis_stage2.safetensors")
    write_stage1(args.out / "lavis_stage1.safetensors")


def write_stage1(out: Path) -> None:
    """Blip2Qformer's file."""
    torch.manual_seed(SEED)
    texts = Texts()
    model = stage1(texts)
    images = torch.randn(NUM_PAIRS, NUM_IMAGE_TOKENS, VISION_WIDTH)
    torch.multinomial = lambda weights, count: weights.argmax(dim=-1, keepdim=True)  # the hardest negative
    output = model({"image": images, "text_input": ["any"] * NUM_PAIRS})
    output.loss.backward()
    features = model.extract_features({"image": images, "text_input": ["any"] * NUM_PAIRS}, mode="image")
    words = model.extract_features({"image": images, "text_input": ["any"] * NUM_PAIRS}, mode="text")
    found = {
        "images": images,
        "input_ids": texts.input_ids,
        "attention_mask": texts.attention_mask,
        "itc": output.loss_itc,
        "itm": output.loss_itm,
        "itg": output.loss_lm,
        "image_embeds": features.image_embeds_proj,
        "text_embeds": words.text_embeds_proj[:, 0],
    }
    named = dict(model.named_parameters())
    found |= {f"gradient.{name}": named[name].grad for name in GRADIENTS}
    found |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    save(found, out)
    print(*(f"{name} {found[name].item():.6f}" for name in ("itc", "itm", "itg")), sep="\n")


def save(found: dict[str, torch.Tensor], out: Path) -> None:
    """Tensors to a file, each with memory of its own."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, out)


def write_stage2(out: Path) -> None:
    """The file of the classes that speak."""
    found: dict[str, torch.Tensor] = {}
    for name in SPEAKERS:
        torch.manual_seed(SEED)
        model, read = speaker(name)
        images = torch.randn(NUM_PAIRS, NUM_IMAGE_TOKENS, VISION_WIDTH)
        sample = {"image": images, "text_input": ["in"] * NUM_PAIRS, "text_output": ["out"] * NUM_PAIRS}
        loss = model(sample)["loss"]
        loss.backward()
        print(f"{name} {loss.item():.6f}")
        projection = SPEAKERS[name][1]
        told = {"images": images, "loss": loss, **{k: v for r in read.values() for k, v in r.tensors.items()}}
        told |= {f"model.{k}": v for k, v in model.state_dict().items()}
        told["gradient.query_tokens"] = model.query_tokens.grad
        told[f"gradient.{projection}.weight"] = getattr(model, projection).weight.grad
        found |= {f"{name}.{k}": v for k, v in told.items()}
    save(found, out)


# What LAVIS calls the class, its module, its projection, and its LLM.
SPEAKERS = {
    "Blip2OPT": ("blip2_opt", "opt_proj", "opt_model"),
    "Blip2T5": ("blip2_t5", "t5_proj", "t5_model"),
    "Blip2T5Instruct": ("blip2_t5_instruct", "t5_proj", "t5_model"),
    "Blip2VicunaInstruct": ("blip2_vicuna_instruct", "llm_proj", "llm_model"),
}


def speaker(name: str) -> tuple[nn.Module, dict[str, "Reader"]]:
    """One of the classes that speak, at tiny size, and what stands for its tokenizers."""
    module, projection, language = SPEAKERS[name]
    model_class = getattr(importlib.import_module(f"lavis.models.blip2_models.{module}"), name)
    is_aware = name.endswith("Instruct")
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.visual_encoder, model.ln_vision = nn.Identity(), nn.LayerNorm(VISION_WIDTH)
    model.Qformer = qformer_network()
    model.Qformer.cls = None
    if not is_aware:
        model.Qformer.bert.embeddings.word_embeddings = None
        model.Qformer.bert.embeddings.position_embeddings = None
        for layer in model.Qformer.bert.encoder.layer:
            layer.output = layer.intermediate = None
    model.query_tokens = nn.Parameter(torch.zeros(1, NUM_QUERIES, WIDTH))
    setattr(model, projection, nn.Linear(WIDTH, WIDTH))
    setattr(model, language, language_model(name))
    wake(model)
    getattr(model, language).requires_grad_(False)
    read = {
        "qformer": Reader("qformer", CLS, SEP) if is_aware else None,
        "language": Reader("language", *((None, END) if "T5" in name else (BEGIN, None))),
        "output": Reader("output", *((None, END) if "T5" in name else (BEGIN, END))),
    }
    model.tokenizer = read["qformer"]
    both = Both(read["language"], read["output"])
    for attribute in ("opt_tokenizer", "t5_tokenizer", "t5_output_tokenizer", "llm_tokenizer"):
        setattr(model, attribute, both)
    model.max_txt_len = model.max_output_txt_len = LONGEST
    model.prompt, model.few_shot_prob, model.qformer_text_input = "", 0, is_aware
    return model.eval(), {name: reader for name, reader in read.items() if reader is not None}


def language_model(name: str) -> nn.Module:
    """The LLM of a class: LAVIS's own copy where it has one."""
    own = "lavis.models.blip2_models.modeling_"
    shape = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    ends = {"bos_token_id": BEGIN, "eos_token_id": END, "pad_token_id": PAD}
    if "OPT" in name:
        transformers = importlib.import_module("transformers")
        config = transformers.OPTConfig(**shape, **ends, ffn_dim=64, word_embed_proj_dim=WIDTH)
        return transformers.OPTForCausalLM(config)
    if "T5" in name:
        t5 = importlib.import_module(f"{own}t5")
        config = t5.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            feed_forward_proj="gated-gelu", decoder_start_token_id=PAD, tie_word_embeddings=False, **ends,
        )  # fmt: skip
        config.dense_act_fn = "gelu"
        return t5.T5ForConditionalGeneration(config)
    llama = importlib.import_module(f"{own}llama")
    config = importlib.import_module("transformers").LlamaConfig(**shape, **ends, intermediate_size=64)
    return llama.LlamaForCausalLM(config)


class Reader:
    """Random texts of unequal lengths as a tokenizer gives them, padded right."""

    pad_token_id, eos_token = PAD, ""

    def __init__(self, name: str, first: int | None, last: int | None) -> None:
        lengths = torch.randint(3, LONGEST, (NUM_PAIRS,))
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        ids = torch.randint(5, DEC, mask.shape) * mask
        if first is not None:
            ids[:, 0] = first
        if last is not None:
            ids[torch.arange(NUM_PAIRS), lengths - 1] = last
        self.input_ids, self.attention_mask = ids, mask
        self.tensors = {f"{name}_ids": ids, f"{name}_mask": mask}

    def __call__(self, texts: list[str], **options: object) -> "Reader":
        return self

    def to(self, device: torch.device) -> "Reader":
        return self


class Both:
    """A tokenizer that is called for the input and for the output."""

    pad_token_id, eos_token = PAD, ""

    def __init__(self, read: Reader, output: Reader) -> None:
        self.read, self.output = read, output

    def __call__(self, texts: list[str], **options: object) -> Reader:
        return self.output if texts[0].startswith("out") else self.read


def stand_in(package: Path) -> None:
    """Lets the few files that are wanted be imported without the packages that the rest of LAVIS needs."""

    def shell(name: str, **attributes: object) -> None:
        module = types.ModuleType(name)
        vars(module).update(attributes)
        sys.modules[name] = module

    for name in ("", ".common", ".models", ".models.blip2_models", ".models.blip_models"):
        shell(f"lavis{name}", __path__=[str(package.joinpath(*name.split(".")[1:]))])
    shell(
        "lavis.common.dist_utils",
        is_dist_avail_and_initialized=lambda: False,
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        is_main_process=lambda: True,
        main_process=lambda function: function,
        download_cached_file=None,
    )
    sys.modules["lavis.common"].dist_utils = sys.modules["lavis.common.dist_utils"]
    shell("lavis.common.utils", is_url=None, get_abs_path=None)
    shell("lavis.models.clip_vit", create_clip_vit_L=None)
    shell("lavis.models.eva_vit", create_eva_vit_g=None)
    shell("omegaconf", OmegaConf=None)
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)


def stage1(texts: "Texts") -> nn.Module:
    """LAVIS's Blip2Qformer at tiny size, without what its constructor would download; wide random weights."""
    model_class = importlib.import_module("lavis.models.blip2_models.blip2_qformer").Blip2Qformer
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len = texts, LONGEST
    model.visual_encoder = nn.Identity()  # image features are given ready
    model.ln_vision = nn.LayerNorm(VISION_WIDTH)
    model.Qformer = qformer_network()
    model.query_tokens = nn.Parameter(torch.zeros(1, NUM_QUERIES, WIDTH))
    model.vision_proj, model.text_proj = nn.Linear(WIDTH, EMBED_DIM), nn.Linear(WIDTH, EMBED_DIM)
    model.itm_head, model.temp = nn.Linear(WIDTH, 2), nn.Parameter(torch.tensor(0.07))
    wake(model)
    model.Qformer.tie_weights()
    return model.eval()


def qformer_network() -> nn.Module:
    """LAVIS's Q-Former with its head, tiny."""
    qformer = importlib.import_module("lavis.models.blip2_models.Qformer")
    config = qformer.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=LONGEST + 8,
    )
    config.encoder_width, config.add_cross_attention = VISION_WIDTH, True
    config.cross_attention_freq, config.query_length = 2, NUM_QUERIES
    return qformer.BertLMHeadModel(config)


def wake(model: nn.Module) -> None:
    """Wide random weights: published starts are zeros in places, which would hide a mistake."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name != "temp":
            nn.init.normal_(parameter, std=0.2)


class Texts:
    """Stands where LAVIS calls its tokenizer: random texts of unequal lengths, padded to the longest allowed."""

    pad_token_id, bos_token_id = PAD, DEC

    def __init__(self) -> None:
        lengths = torch.tensor([4, LONGEST, 5, 7, 3, 9])
        place = torch.arange(LONGEST)[None]
        self.attention_mask = (place < lengths[:, None]).long()
        self.input_ids = torch.randint(5, DEC, (NUM_PAIRS, LONGEST)) * self.attention_mask
        self.input_ids[:, 0] = CLS
        self.input_ids[torch.arange(NUM_PAIRS), lengths - 1] = SEP

    def __call__(self, texts: list[str], **options: object) -> "Texts":
        return self

    def to(self, device: torch.device) -> "Texts":
        return self


if __name__ == "__main__":
    main()
