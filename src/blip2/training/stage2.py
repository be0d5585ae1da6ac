"""What one step of stage 2, and of instruction tuning, computes: the frozen LLM's loss on text after the visual prompt.

decoder LLM            [visual prompt | prompt] target         language modelling
encoder-decoder LLM    [visual prompt | prefix] -> suffix      prefix language modelling: batches bring the prefix
                                                               as the prompt and the suffix as the target
"""

from dataclasses import dataclass

from torch import Tensor, nn

from blip2.distributed import share_of
from blip2.model.stage1 import Text
from blip2.model.stage2 import Blip2Stage2
from blip2.objectives.language_modeling import mean_over_tokens
from blip2.training.seeing import seen


@dataclass(frozen=True)
class Stage2Batch:
    """B images with what the LLM reads and must say.

    Attributes:
        image_features: (B, N, Dv); or pixel_values (B, 3, H, W), which the step encodes.
        prompt: (B, P) tokens of the LLM, padded on the left; P may be 0.
        target: (B, T) tokens of the LLM with the end token, padded on the right.
        instruction: what the Q-Former reads, in its own tokens; None for a model that reads nothing.
    """

    image_features: Tensor
    prompt: Text
    target: Text
    instruction: Text | None = None


class Stage2Step(nn.Module):
    """The module whose forward is one step; the LLM inside is frozen, gradients pass through it.

    Args:
        model: the model being trained, with its LLM.
    """

    def __init__(self, model: Blip2Stage2) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Stage2Batch) -> dict[str, Tensor]:
        """The `loss`: mean cross-entropy over the target's tokens, of all ranks."""
        batch = seen(self.model, batch)
        language_model = self.model.language_model
        assert language_model is not None
        visual_prompt = self.model.visual_prompt(batch.image_features, batch.instruction)  # (B, Q, Dl)
        prompt, target = batch.prompt, batch.target
        token_losses = language_model.token_losses(
            visual_prompt, prompt.input_ids, prompt.attention_mask, target.input_ids, target.attention_mask
        )  # (B, T)
        count = share_of(target.attention_mask.sum())
        return {"loss": mean_over_tokens(token_losses, target.attention_mask, count)}
