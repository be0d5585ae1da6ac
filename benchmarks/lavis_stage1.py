"""One side of stage1_step.py: a training step of the original code (LAVIS) as its runner makes it, at any size.

The class Blip2Qformer and its Q-Former are read from a checkout and run as they are. What they would import besides is
stood in for: of transformers' `PreTrainedModel` of 2021 a forward pass uses two masks, of timm the ViT uses three small
functions. None of LAVIS is kept here.
"""

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from lavis_golden import stand_in
from torch import Tensor, nn

from blip2.model.config import QFormerConfig

LONGEST = 32  # LAVIS pads every text to this (max_txt_len)
FROZEN = "visual_encoder."
TIED = "Qformer.cls.predictions.decoder."  # the LM head's matrix and bias, under a second name


class PretrainedStandIn(nn.Module):
    """What LAVIS's Q-Former needs of transformers' PreTrainedModel."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def init_weights(self) -> None:
        """Nothing: the weights are given."""

    def invert_attention_mask(self, mask: Tensor) -> Tensor:
        """(B, S), 1 = may be attended to -> (B, 1, 1, S), to be added to scores."""
        return (1.0 - mask[:, None, None].to(self.dtype)) * torch.finfo(self.dtype).min

    def get_head_mask(self, mask: None, num_layers: int) -> list[None]:
        """No head is masked."""
        return [mask] * num_layers


class ReadyFeatures(nn.Identity):
    """In the image encoder's place: features are given ready."""

    def get_num_layer(self, name: str = "") -> int:
        """Layers whose learning rates LAVIS scales; here are none."""
        return 0


class Tokens:
    """Where LAVIS calls its tokenizer: ready ids, padded to LONGEST as it does."""

    pad_token_id = 0

    def __init__(self, input_ids: Tensor, attention_mask: Tensor, bos_token_id: int) -> None:
        padding = (0, LONGEST - input_ids.shape[1])
        self.input_ids = nn.functional.pad(input_ids, padding)
        self.attention_mask = nn.functional.pad(attention_mask, padding)
        self.bos_token_id = bos_token_id

    def __call__(self, texts: list[str], **options: object) -> "Tokens":
        return self

    def to(self, device: torch.device) -> "Tokens":
        """The batch is on its device already."""
        return self


@contextmanager
def old_transformers() -> Iterator[None]:
    """Inside, names that transformers has dropped since 2021 can be imported from where they were."""
    module: Any = transformers.modeling_utils
    names = ("PreTrainedModel", "apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
    before = {name: vars(module)[name] for name in names if name in vars(module)}
    module.PreTrainedModel = PretrainedStandIn
    module.apply_chunking_to_forward = _whole
    module.find_pruneable_heads_and_indices = module.prune_linear_layer = None  # for pruning heads, which nobody does
    try:
        yield
    finally:
        for name in names:
            delattr(module, name)
        vars(module).update(before)


def _whole(function: Any, chunk_size: int, dimension: int, *inputs: Tensor) -> Tensor:
    assert chunk_size == 0, "BERT's default: no chunks"
    return function(*inputs)


def read_classes(checkout: Path) -> types.SimpleNamespace:
    """LAVIS's classes, from a checkout."""
    stand_in(checkout / "lavis")
    with old_transformers():
        stage1 = importlib.import_module("lavis.models.blip2_models.blip2_qformer")
        qformer = importlib.import_module("lavis.models.blip2_models.Qformer")
    return types.SimpleNamespace(
        stage1=stage1.Blip2Qformer,
        qformer=qformer.BertLMHeadModel,
        config=qformer.BertConfig,
        norm=importlib.import_module("lavis.models.blip2_models.blip2").LayerNorm,
        vision=partial(_vision_module, checkout / "lavis" / "models" / "eva_vit.py"),
    )


def _vision_module(path: Path) -> types.ModuleType:
    """LAVIS's ViT, with stand-ins for what it takes from timm."""
    for name in ("timm", "timm.models", "timm.models.layers", "timm.models.registry"):
        sys.modules.setdefault(name, types.ModuleType(name))
    layers: Any = sys.modules["timm.models.layers"]
    layers.drop_path, layers.to_2tuple = None, lambda one: (one, one)  # drop path is off in BLIP-2
    layers.trunc_normal_ = nn.init.trunc_normal_
    sys.modules["timm.models.registry"].register_model = lambda function: function  # pyright: ignore
    spec = importlib.util.spec_from_file_location("lavis_eva_vit", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(checkout: Path, config: QFormerConfig, weights: Mapping[str, Tensor], vision_layers: int) -> nn.Module:
    """LAVIS's Blip2Qformer with `weights` by its own names, without what its constructor would download.

    Args:
        checkout: of LAVIS.
        config: the Q-Former's shape.
        weights: all of them; those of the image encoder begin with visual_encoder.
        vision_layers: of its ViT-g; 0: features are given ready.
    """
    classes = read_classes(checkout)
    model = classes.stage1.__new__(classes.stage1)
    nn.Module.__init__(model)
    model.max_txt_len = LONGEST
    model.visual_encoder = _encoder(classes.vision(), vision_layers) if vision_layers else ReadyFeatures()
    model.ln_vision = classes.norm(config.encoder_hidden_size)
    model.Qformer = classes.qformer(_bert_config(classes.config, config))
    head, words = model.Qformer.cls.predictions, model.Qformer.bert.embeddings.word_embeddings
    head.decoder.weight = words.weight  # tied, as from_pretrained does
    model.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
    model.vision_proj = nn.Linear(config.hidden_size, config.embed_dim)
    model.text_proj = nn.Linear(config.hidden_size, config.embed_dim)
    model.itm_head = nn.Linear(config.hidden_size, 2)
    model.temp = nn.Parameter(torch.tensor(0.07))
    missing, unexpected = model.load_state_dict(dict(weights), strict=False)
    missing = [name for name in missing if not name.startswith(TIED) and not name.endswith(".position_ids")]
    assert not missing and not unexpected, (missing, unexpected)
    return model


def _encoder(module: Any, num_layers: int) -> nn.Module:
    """ViT-g as BLIP-2 has it, frozen."""
    encoder = module.VisionTransformer(
        img_size=224,
        patch_size=14,
        use_mean_pooling=False,
        embed_dim=1408,
        depth=num_layers,
        num_heads=16,
        mlp_ratio=4.3637,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    encoder.requires_grad_(False).eval()
    encoder.train = lambda mode=True: encoder
    encoder.to_half = partial(module.convert_weights_to_fp16, encoder)
    return encoder


def _bert_config(config_class: Any, config: QFormerConfig) -> Any:
    bert = config_class(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
    )
    bert.encoder_width, bert.add_cross_attention = config.encoder_hidden_size, True
    bert.cross_attention_freq, bert.query_length = config.cross_attention_frequency, config.num_query_tokens
    return bert


class Lavis:
    """Its model and optimizer, and a step as its runner makes it (runner_base.py, base_task.py)."""

    def __init__(self, model: nn.Module, tokens: Tokens, images: Tensor, rate: float) -> None:
        device = images.device
        self.model, self.is_gpu = model.to(device), device.type == "cuda"
        if self.is_gpu and not isinstance(model.visual_encoder, ReadyFeatures):
            model.visual_encoder.to_half()
        self.model.tokenizer = tokens
        self.samples = {"image": images, "text_input": [""] * len(images)}
        self.optimizer = torch.optim.AdamW(model.get_optimizer_params(0.05, 1), lr=rate, betas=(0.9, 0.98))
        self.scaler = torch.amp.GradScaler("cuda") if self.is_gpu else None

    def check(self) -> dict[str, float]:
        """The losses without dropout, with the hardest negatives, in full precision; and how long gradients are."""
        self.model.eval()
        drawn, torch.multinomial = torch.multinomial, lambda weights, count: weights.argmax(dim=-1, keepdim=True)
        encodes_half = self.is_gpu and not isinstance(self.model.visual_encoder, ReadyFeatures)
        try:
            with self._autocast() if encodes_half else nullcontext():
                output = self.model(self.samples)
            output.loss.backward()
        finally:
            torch.multinomial = drawn
        gradients = {
            "query_tokens": self.model.query_tokens,
            "vision norm": self.model.ln_vision.weight,
            "word embeddings": self.model.Qformer.bert.embeddings.word_embeddings.weight,
            "first layer": self.model.Qformer.bert.encoder.layer[0].attention.self.query.weight,
        }
        found = {"itc": output.loss_itc, "itm": output.loss_itm, "itg": output.loss_lm}
        found |= {f"gradient of {name}": one.grad.norm() for name, one in gradients.items()}
        self.optimizer.zero_grad()
        return {name: value.item() for name, value in found.items()}

    def step(self) -> None:
        """One step of training."""
        self.model.train()
        with self._autocast():
            output = self.model(self.samples)
        losses = {name: value for name, value in output.items() if "loss" in name}
        if self.scaler is None:
            losses["loss"].backward()
            self.optimizer.step()
        else:
            self.scaler.scale(losses["loss"]).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()
        assert all(math.isfinite(value.item()) for value in losses.values())  # told to its log

    def _autocast(self) -> Any:
        return torch.autocast("cuda", torch.float16) if self.is_gpu else nullcontext()
