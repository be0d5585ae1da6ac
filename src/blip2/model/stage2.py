"""Blip2Stage2: frozen image encoder + Q-Former + one linear layer + frozen LLM (paper, section 3.2).

With `instruction_aware` the Q-Former keeps its text half, and the instruction attends together with the queries, so
that they look for what is asked (InstructBLIP).
"""

import torch
from torch import Tensor, nn

from blip2.model.config import QFormerConfig
from blip2.model.language import LanguageModel
from blip2.model.masks import together_mask
from blip2.model.qformer import QFormer, TextEmbeddings, initialise
from blip2.model.stage1 import Text


class Blip2Stage2(nn.Module):
    """The generating model.

    Args:
        vision_model: frozen image encoder, or None when image features are given ready.
        config: the Q-Former's shape.
        language_model: frozen LLM behind the common interface, or None to count or convert the bridge alone.
        language_width: Dl; read from the LLM when that is given.
        instruction_aware: whether the Q-Former reads the instruction.
    """

    def __init__(
        self,
        vision_model: nn.Module | None,
        config: QFormerConfig,
        language_model: LanguageModel | None,
        *,
        language_width: int | None = None,
        instruction_aware: bool = False,
    ) -> None:
        super().__init__()
        width = language_model.width if language_model is not None else language_width
        assert width is not None, "give a language model or its width"
        self.config = config
        self.instruction_aware = instruction_aware
        self.vision_model = vision_model
        self.vision_layernorm = nn.LayerNorm(config.encoder_hidden_size, eps=config.encoder_layer_norm_eps)
        if instruction_aware:
            self.embeddings = TextEmbeddings(config)
            initialise(self.embeddings, config)
        self.qformer = QFormer(config, has_text=instruction_aware)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.language_projection = nn.Linear(config.hidden_size, width)
        self.language_model = language_model
        for part in (self.qformer, self.language_projection):
            initialise(part, config)
        nn.init.normal_(self.query_tokens, std=config.initializer_range)

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Frozen image features (B, N, Dv) of `pixel_values` (B, 3, H, W); no gradient."""
        assert self.vision_model is not None, "this model was built for ready image features"
        return self.vision_model(pixel_values)

    def query_output(self, image_features: Tensor, instruction: Text | None = None) -> Tensor:
        """The Q-Former's output at the queries.

        Args:
            image_features: (B, N, Dv).
            instruction: what is asked of image b; only for an instruction-aware model.

        Returns:
            (B, Q, D).
        """
        image = self.qformer.project_image(image_features, self.vision_layernorm)
        queries = self.query_tokens.expand(image_features.shape[0], -1, -1)
        if instruction is None:
            output = self.qformer(queries=queries, image=image).queries
        else:
            assert self.instruction_aware, "this model's Q-Former has no text half"
            mask = together_mask(self.config.num_query_tokens, instruction.attention_mask)
            text = self.embeddings(instruction.input_ids)
            is_real = instruction.attention_mask
            # The last layer's text is computed though nothing reads it: its gradient of zero lets weight decay reach
            # that layer on any number of processes, as in the original.
            output = self.qformer(queries=queries, text=text, image=image, mask=mask, text_is_real=is_real).queries
        assert output is not None
        return output

    def visual_prompt(self, image_features: Tensor, instruction: Text | None = None) -> Tensor:
        """The soft visual prompt (B, Q, Dl); arguments as in `query_output`."""
        return self.language_projection(self.query_output(image_features, instruction))
