"""Runs the original code (LAVIS) on tiny random models and keeps what it gave: the golden file of tests/parity.

LAVIS needs an old transformers, so this runs apart from the project, in an environment of its own, and imports nothing
of it. None of LAVIS is kept but numbers. To repeat it:

    git clone https://github.com/salesforce/LAVIS && python -m venv lavis-env
    lavis-env/bin/pip install torch "transformers==4.33.2" "tokenizers==0.13.3" "huggingface-hub<1.0" "numpy<2"
    lavis-env/bin/python benchmarks/lavis_golden.py LAVIS tests/parity/golden/lavis_stage1.safetensors

The file holds the model's state dict under LAVIS's own names, the inputs, the three losses of stage 1, the features of
contrast, and gradients. Negatives are the most similar wrong pairs (LAVIS draws them by torch.multinomial, which is
replaced by argmax here); dropout is off.
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
GRADIENTS = ("query_tokens", "ln_vision.weight", "temp", "itm_head.weight", "vision_proj.weight", "text_proj.weight")


def main() -> None:
    """Builds LAVIS's stage-1 model, runs one forward and backward, writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("lavis", type=Path, help="a checkout of LAVIS")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    stand_in(args.lavis / "lavis")
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in found.items()}, args.out)
    print(*(f"{name} {found[name].item():.6f}" for name in ("itc", "itm", "itg")), sep="\n")


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
    qformer = importlib.import_module("lavis.models.blip2_models.Qformer")
    model_class = importlib.import_module("lavis.models.blip2_models.blip2_qformer").Blip2Qformer
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
    model = model_class.__new__(model_class)
    nn.Module.__init__(model)
    model.tokenizer, model.max_txt_len = texts, LONGEST
    model.visual_encoder = nn.Identity()  # image features are given ready
    model.ln_vision = nn.LayerNorm(VISION_WIDTH)
    model.Qformer = qformer.BertLMHeadModel(config)
    model.query_tokens = nn.Parameter(torch.zeros(1, NUM_QUERIES, WIDTH))
    model.vision_proj, model.text_proj = nn.Linear(WIDTH, EMBED_DIM), nn.Linear(WIDTH, EMBED_DIM)
    model.itm_head, model.temp = nn.Linear(WIDTH, 2), nn.Parameter(torch.tensor(0.07))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
        elif name.endswith("weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif name != "temp":
            nn.init.normal_(parameter, std=0.2)
    model.Qformer.tie_weights()
    return model.eval()


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
