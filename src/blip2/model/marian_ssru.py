"""Marian's small translation models (Bergamot's "tiny"): a transformer that reads, a recurrent network that writes.

    encoder layer   x = LN(x + attention(x)), x = LN(x + FFN(x))
    decoder layer   x = LN(x + SSRU(x)),      x = LN(x + attention(x, encoder)), x = LN(x + FFN(x))
    SSRU            f = sigmoid(Wf x + bf),   c_t = f_t c_(t-1) + (1 - f_t) W x_t,   y = relu(c)

transformers has Marian with self-attention in its decoder, not with the SSRU (Kim et al. 2019, "From Research to
Production and Back"). This class is one of transformers' own kind, so that everything that takes an encoder-decoder
takes it. Embeddings are scaled by sqrt(D), positions are sinusoids, sines first; the first thing the decoder reads is a
zero vector, which here is the embedding of the padding token, one more than the vocabulary.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

NEVER = -1e9  # logit of the padding token


class MarianSsruConfig(PreTrainedConfig):
    """Shapes of a model; token ids as transformers names them."""

    model_type = "marian_ssru"

    def __init__(
        self,
        vocab_size: int = 32_001,
        d_model: int = 256,
        ffn_dim: int = 1536,
        encoder_layers: int = 6,
        decoder_layers: int = 2,
        num_attention_heads: int = 8,
        **settings: Any,
    ) -> None:
        """`vocab_size` counts the padding token, which is the last and the one a text starts from."""
        self.vocab_size, self.d_model, self.ffn_dim = vocab_size, d_model, ffn_dim
        self.encoder_layers, self.decoder_layers = encoder_layers, decoder_layers
        self.num_attention_heads = num_attention_heads
        own = {"pad_token_id": vocab_size - 1, "decoder_start_token_id": vocab_size - 1, "eos_token_id": 0}
        fixed = {"is_encoder_decoder": True, "tie_word_embeddings": False, "use_cache": False}
        super().__init__(**{**own, **settings, **fixed})


class Attention(nn.Module):
    """Attention of H heads over keys that may be those of the encoder."""

    def __init__(self, config: MarianSsruConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(config.d_model, config.d_model) for _ in range(4)
        )

    def forward(self, x: Tensor, over: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) of x (B, T, D) and over (B, S, D); mask (B, 1, 1, S), true = seen."""
        q, k, v = (
            projection(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, part in ((self.q_proj, x), (self.k_proj, over), (self.v_proj, over))
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Ssru(nn.Module):
    """The simpler simple recurrent unit over a whole text."""

    def __init__(self, config: MarianSsruConfig) -> None:
        super().__init__()
        self.forget = nn.Linear(config.d_model, config.d_model)
        self.input = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) of x (B, T, D)."""
        keep = torch.sigmoid(self.forget(x))
        new = (1 - keep) * self.input(x)
        state, states = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = keep[:, step] * state + new[:, step]
            states.append(state)
        return F.relu(torch.stack(states, dim=1))


class Layer(nn.Module):
    """One layer of either side, normalised after each part."""

    def __init__(self, config: MarianSsruConfig, *, writes: bool) -> None:
        super().__init__()
        width = config.d_model
        self.own: Attention | Ssru = Ssru(config) if writes else Attention(config)
        self.own_norm = nn.LayerNorm(width, eps=1e-6)
        self.context = Attention(config) if writes else None
        self.context_norm = nn.LayerNorm(width, eps=1e-6) if writes else None
        self.fc1, self.fc2 = nn.Linear(width, config.ffn_dim), nn.Linear(config.ffn_dim, width)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor, encoded: Tensor | None = None) -> Tensor:
        """(B, T, D); `encoded` (B, S, D) for a layer that writes, whose mask is then of the encoder's side."""
        x = self.own_norm(x + (self.own(x) if isinstance(self.own, Ssru) else self.own(x, x, mask)))
        if self.context is not None and self.context_norm is not None:
            assert encoded is not None
            x = self.context_norm(x + self.context(x, encoded, mask))
        return self.ffn_norm(x + self.fc2(F.relu(self.fc1(x))))


class ScaledEmbedding(nn.Embedding):
    """Embeddings times sqrt(D)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * math.sqrt(self.embedding_dim)


class Encoder(nn.Module):
    """The reading side."""

    main_input_name = "input_ids"

    def __init__(self, config: MarianSsruConfig, embed_tokens: ScaledEmbedding) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(Layer(config, writes=False) for _ in range(config.encoder_layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **unused: Any,
    ) -> BaseModelOutput:
        """Hidden states (B, S, D) of token ids or embeddings; mask (B, S), 1 = real."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        mask = _seen(x, attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return BaseModelOutput(last_hidden_state=x)  # pyright: ignore[reportArgumentType]


class MarianSsruForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The whole model, as transformers has its encoder-decoders."""

    config_class = MarianSsruConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _tied_weights_keys: ClassVar = {"encoder.embed_tokens.weight": "shared.weight"}  # pyright: ignore
    _supports_sdpa = True
    reads_all_each_step = True  # for `language.EncoderDecoderLM`: there is no cache

    def __init__(self, config: MarianSsruConfig) -> None:
        super().__init__(config)
        self.shared = ScaledEmbedding(config.vocab_size, config.d_model, padding_idx=config.vocab_size - 1)
        self.encoder = Encoder(config, self.shared)
        self.decoder = nn.ModuleList(Layer(config, writes=True) for _ in range(config.decoder_layers))
        self.final_logits_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.d_model**-0.5)
        if isinstance(module, nn.Embedding):
            nn.init.zeros_(module.weight[-1])

    def prepare_inputs_for_generation(self, input_ids: Tensor, *unused: Any, **given: Any) -> dict[str, Any]:
        """The whole text at every step: a model this small needs no cache."""
        kept = {name: given.get(name) for name in ("encoder_outputs", "attention_mask")}
        return {"decoder_input_ids": input_ids, "use_cache": False, **kept}

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The reading side."""
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        """The embeddings, scaled, of both sides."""
        return self.shared

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **unused: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, T, V), and with labels (B, T; -100 = none) the loss, their mean cross-entropy."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds)
        encoded = encoder_outputs[0]
        if decoder_input_ids is None:
            assert labels is not None, "what to write: decoder_input_ids or labels"
            start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, labels[:, :-1].clamp_min(0)], dim=1)
        x = self.shared(decoder_input_ids)
        x = x + sinusoids(x.shape[1], x.shape[2]).to(x)
        mask = _seen(encoded, attention_mask)
        for layer in self.decoder:
            x = layer(x, mask, encoded)
        logits = F.linear(x, self.shared.weight, self.final_logits_bias)
        logits[..., -1] = NEVER
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        return Seq2SeqLMOutput(  # pyright: ignore[reportCallIssue]
            loss=loss, logits=logits, encoder_last_hidden_state=encoded
        )


def sinusoids(length: int, width: int) -> Tensor:
    """Positions (T, D): sines in the first half, cosines in the second."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000.0) / (width // 2 - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _seen(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, 1, 1, S), true = seen."""
    mask = x.new_ones(x.shape[:2]) if attention_mask is None else attention_mask
    return mask.bool()[:, None, None]


AutoConfig.register(MarianSsruConfig.model_type, MarianSsruConfig)
AutoModelForSeq2SeqLM.register(MarianSsruConfig, MarianSsruForConditionalGeneration)
