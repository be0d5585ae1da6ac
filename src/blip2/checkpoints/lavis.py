"""Checkpoints of the original code (LAVIS): .pth files that hold the bridge alone.

    {"model": {"query_tokens", "ln_vision.*", "Qformer.*", "vision_proj.*" ... or "opt_proj.*"}}

The frozen image encoder and LLM lie elsewhere and are named by the caller. Such a file is a pickle; it is read with
weights_only, which builds tensors and nothing else, and there is no other way in.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip2.checkpoints import eva
from blip2.checkpoints.names import Names, check_pooling
from blip2.checkpoints.native import ModelSettings, Prompts
from blip2.errors import BadData, MissingFile, UnknownModel, Untrusted, UserError
from blip2.model.config import QFormerConfig

HEAD_WIDTH = 64  # of every published Q-Former; the weights alone do not tell
PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")
SAME_TWICE = "Qformer.cls.predictions.decoder."  # the LM head's matrix is that of the word embeddings
BUFFER = "Qformer.bert.embeddings.position_ids"
INSTRUCT_CAPTION = "Write a short description for the image."  # one of InstructBLIP's (appendix)


@dataclass(frozen=True)
class Bridge:
    """What a .pth holds, by our names.

    Attributes:
        part: "stage1" or "generation".
        weights: as stored, in their own dtype.
        config: the Q-Former's shape, read from the weights.
        instruction_aware: whether the generating part's Q-Former reads the instruction.
        prompts: those of the paper for the kind of LLM; a stage-1 model has the captions' prompt only.
        projection: LAVIS's name of the linear map to the LLM; None in stage 1.
        vision: an image encoder that was fine-tuned, by LAVIS's names without visual_encoder.; else empty.
    """

    part: str
    weights: dict[str, Tensor]
    config: QFormerConfig
    instruction_aware: bool
    prompts: Prompts
    projection: str | None
    vision: dict[str, Tensor]

    @property
    def stop(self) -> str:
        """What ends a text besides the LLM's own end: OPT was trained to end with a new line."""
        return "\n" if self.projection == "opt_proj" else ""


def read(path: Path) -> Bridge:
    """The bridge in a .pth of LAVIS.

    Raises:
        MissingFile: there is no such file.
        Untrusted: it holds more than tensors and plain values.
        BadData: it is no checkpoint of BLIP-2.
    """
    state = _state(path)
    if "query_tokens" not in state or not any(name.startswith("Qformer.bert.encoder.") for name in state):
        raise BadData(f"{path} is no checkpoint of BLIP-2: it has no query_tokens and Qformer.")
    way, weights, unknown = Names("lavis", "blip2"), {}, []
    vision: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = way.translate(name)
        if ours is not None:
            weights[ours] = tensor
        elif name.startswith(eva.PREFIX):
            vision[name[len(eva.PREFIX) :]] = tensor
        elif name != BUFFER and not name.startswith(SAME_TWICE):
            unknown.append(name)
    if unknown:
        raise BadData(f"{path} holds {len(unknown)} weights of no known name, the first is {unknown[0]}.")
    projection = next((name for name in PROJECTIONS if f"{name}.weight" in state), None)
    reads_text = "embeddings.word_embeddings.weight" in weights
    is_instruct = projection is not None and reads_text
    return Bridge(
        part="generation" if projection else "stage1",
        weights=weights,
        config=_config(weights, path),
        instruction_aware=is_instruct,
        prompts=original_prompts(is_instruct=is_instruct, is_encoder_decoder=projection == "t5_proj"),
        projection=projection,
        vision=vision,
    )


def write(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    projection: str = "opt_proj",
    vision: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes a bridge by LAVIS's names, as LAVIS itself saves it, so that it can be loaded there.

    Args:
        path: the .pth; written beside its place and renamed.
        weights: by our names.
        projection: what the linear map to the LLM is called there: opt_proj, t5_proj or llm_proj.
        vision: an image encoder that was fine-tuned, by LAVIS's names.
    """
    way = Names("blip2", "lavis")
    state = {f"{eva.PREFIX}{name}": tensor for name, tensor in (vision or {}).items()}
    for name, tensor in weights.items():
        theirs = way.translate(name)
        assert theirs is not None, f"{name} has no name in LAVIS"
        state[theirs.replace("opt_proj", projection, 1) if theirs.startswith("opt_proj.") else theirs] = tensor
    words = state.get("Qformer.bert.embeddings.word_embeddings.weight")
    if words is not None and "Qformer.cls.predictions.bias" in state:
        state[f"{SAME_TWICE}weight"], state[f"{SAME_TWICE}bias"] = words, state["Qformer.cls.predictions.bias"]
    beside = path.with_name(f".{path.name}.writing")
    try:
        torch.save({"model": state}, beside)
        beside.replace(path)
    except RuntimeError as error:  # of torch's writer, which does not tell why
        raise UserError(f"{path} could not be written. Most likely the disk is full.") from error
    finally:
        beside.unlink(missing_ok=True)


def check_can_hold(settings: ModelSettings) -> None:
    """Raises UnknownModel where a model has what a .pth does not tell, so that it would be read as another one."""
    config = settings.qformer
    if config.hidden_size != config.num_attention_heads * HEAD_WIDTH:
        raise UnknownModel(
            f"This Q-Former has {config.num_attention_heads} heads for a width of {config.hidden_size}; LAVIS's format "
            f"does not tell, and is read as heads of {HEAD_WIDTH}. Keep the model folder."
        )
    check_pooling(config, "LAVIS knows max and cls only. Keep the model folder.")


def _state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.")
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise Untrusted(
            f"{path} is no plain checkpoint: it is broken or holds more than tensors, which is never run ({reason})."
        ) from None
    state = stored.get("model", stored) if isinstance(stored, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise BadData(f'{path} holds no weights under "model".')
    return state


def _config(weights: Mapping[str, Tensor], path: Path) -> QFormerConfig:
    """The shape, from the weights'."""
    _, num_queries, width = weights["query_tokens"].shape
    numbers = [re.match(r"qformer\.encoder\.layer\.(\d+)\.", name) for name in weights]
    layers = {int(found[1]) for found in numbers if found}
    looking = sorted(i for i in layers if f"qformer.encoder.layer.{i}.crossattention.attention.key.weight" in weights)
    if looking[:1] != [0] or width % HEAD_WIDTH:
        raise BadData(f"{path} has a Q-Former of an unknown make: width {width}, cross-attention in layers {looking}.")
    words, places = (weights.get(f"embeddings.{kind}_embeddings.weight") for kind in ("word", "position"))
    compared = weights.get("vision_projection.weight")
    default = QFormerConfig()
    return QFormerConfig(
        vocab_size=default.vocab_size if words is None else words.shape[0],
        hidden_size=width,
        num_hidden_layers=len(layers),
        num_attention_heads=width // HEAD_WIDTH,
        intermediate_size=weights["qformer.encoder.layer.0.intermediate_query.dense.weight"].shape[0],
        encoder_hidden_size=weights["vision_layernorm.weight"].shape[0],
        cross_attention_frequency=looking[1] if len(looking) > 1 else len(layers),
        num_query_tokens=num_queries,
        max_position_embeddings=default.max_position_embeddings if places is None else places.shape[0],
        embed_dim=default.embed_dim if compared is None else compared.shape[0],
    )


def original_prompts(*, is_instruct: bool, is_encoder_decoder: bool) -> Prompts:
    """The prompts of the originals: the paper's (section 4.1) for either kind of LLM, or InstructBLIP's."""
    if is_instruct:
        return Prompts(caption=INSTRUCT_CAPTION, caption_instruction=INSTRUCT_CAPTION, question="{}")
    question = "Question: {} Short answer:" if is_encoder_decoder else "Question: {} Answer:"
    return Prompts(caption="a photo of", caption_instruction="", question=question)
