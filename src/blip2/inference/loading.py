"""load(): the name of a model, or its folder -> Blip2.

Names are looked for in BLIP2_HOME/models and then, where the package runs from a checkout of the repository, in its
weights/ folder; "owner/model" is one of the Hugging Face hub. A folder is ours (blip2.json) or in Hugging Face's
layout. A .pth of LAVIS is followed by the names of its frozen parts ("x.pth,vision=NAME,llm=NAME") and converted once,
into BLIP2_HOME/converted. Frozen parts come from their packages or folders (`checkpoints.frozen`).
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from transformers import LlamaForCausalLM

from blip2 import paths
from blip2.checkpoints import convert, frozen, huggingface, native
from blip2.errors import BadData, MissingFile, MissingPart, UnknownModel, Untrusted, UserError
from blip2.inference import heap
from blip2.inference.blip2 import Blip2
from blip2.inference.generation import Generator
from blip2.inference.retrieval import Retriever
from blip2.model.drafting import Drafter
from blip2.model.efficientnet import EfficientNetTokens
from blip2.model.language import DecoderLM, EncoderDecoderLM, LanguageModel
from blip2.model.low_bit_products import is_avx2
from blip2.model.packed import pack
from blip2.model.quantized import Bits, arrange, has_few_bits, quantize
from blip2.model.stage1 import Blip2Stage1, load_text_weights
from blip2.model.stage2 import Blip2Stage2
from blip2.model.vision import ImageEncoder
from blip2.preprocessing.text import LanguageTokenizer, QFormerTokenizer
from blip2.registry import PACKAGES

__all__ = ["Blip2", "find_model", "load", "model_names"]

MOST_FLOATS = 2 << 30  # bytes of an LLM whose float32 products LiteRT may have: they are written down twice
ROOM_FOR_FLOATS = 2.2  # times those bytes
REPOSITORY_WEIGHTS = Path(__file__).parents[3] / "weights"  # beside src/ in a checkout; elsewhere it is not there


def load(
    name: str | Path = "mini",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    parts: Collection[str] | None = None,
    device_map: str | dict[str, int | str] | None = None,
    quantize: Bits | None = None,
    drafts: bool = True,
) -> Blip2:
    """A model ready to use.

    Args:
        name: of a model here or on the Hugging Face hub, or the path of a model folder, ours or Hugging Face's, or of a
            .pth with the names of its frozen parts (see `find_model`).
        device: where it computes.
        dtype: of the frozen parts. The trained parts are small and stay float32, as the paper keeps them; on a GPU
            whose frozen parts are in bfloat16 so is the Q-Former that speaks, which otherwise takes as long as the LLM.
        parts: which of "stage1" (to embed and match) and "generation" (to caption and answer) to load; None: all that
            the model has.
        device_map: spreads the language model over several places as accelerate does it ("auto": over all GPUs), the
            rest staying on `device`; None: all on `device`.
        quantize: round the language model's weights to "int8" or "int4", and the image encoder's to "int8", as they are
            loaded; `blip2 quantize` does it once for all. None: as they are.
        drafts: whether a text that is written alone may be guessed ahead by a four-bit copy of the language model
            (model/drafting.py). It says the same and sooner; the copy takes memory, a sixth of the language model's.
            Where LiteRT computes the language model (with AVX2 alone), nothing is guessed.

    Raises:
        UnknownModel: no model goes by that name.
        UserError: quantize beside a device_map, or of a model that is quantised already.
        MissingPart: the model lacks a part in `parts`.
        Untrusted: a file is not the one that the model was saved with.
    """
    folder = find_model(name)
    settings = read_settings(folder)
    if isinstance(parts, str) or (parts is not None and not set(parts) <= native.PARTS.keys()):
        raise UserError(f"parts is {parts!r}. Give a list of: {', '.join(native.PARTS)}.")
    if quantize not in (None, *get_args(Bits)):
        raise UserError(f"quantize is {quantize!r}. Give one of {', '.join(get_args(Bits))}, or None.")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {str(device)!r}, and PyTorch finds no GPU here. Leave it out, or give cpu.")
    wanted = set(settings.parts if parts is None else parts)
    for part in sorted(wanted - settings.parts.keys()):
        raise MissingPart(
            f"The model {str(name)!r} lacks {native.PARTS[part]}. "
            "Use one that has it (`blip2 info` lists the models and their parts), such as mini."
        )
    if quantize is not None and device_map is not None:
        raise UserError("A model is quantised on one device. Leave device_map out, or run blip2 quantize first.")
    loader = _Loader(folder, settings, torch.device(device), dtype, device_map, quantize, drafts)
    vision_model = loader.vision_model()
    model = Blip2(
        settings,
        vision_model,
        retriever=loader.retriever() if "stage1" in wanted else None,
        generator=loader.generator() if "generation" in wanted else None,
    )
    heap.give_back()  # what weights went through while they were laid out
    return model


def read_settings(folder: Path) -> native.ModelSettings:
    """The settings of a model folder, ours or Hugging Face's.

    Raises:
        UnknownModel, BadData, Untrusted: no such folder, a broken one, or one that needs code of its own.
    """
    return huggingface.read_settings(folder) if huggingface.is_checkpoint(folder) else native.read_settings(folder)


def find_model(name: str | Path) -> Path:
    """The folder of a model by its name, path or name on the Hugging Face hub ("owner/model", fetched if need be).

    Args:
        name: that, or the path of a .pth of LAVIS and, after commas, what it does not say, as in
            "x.pth,vision=NAME,llm=NAME". Also text_init (bert-base-uncased) and image_size (224) may follow.

    Raises:
        UnknownModel: there is none.
        UserError: a .pth that lacks the name of a part, or has one of no known part.
        MissingFile, BadData, Untrusted: a .pth that cannot be read, or not safely.
    """
    file, suffix, told = str(name).partition(".pth")
    if suffix and (not told or told.startswith(",")):
        return _converted(Path(file + suffix).expanduser(), told.removeprefix(","))
    as_path = Path(name).expanduser()
    if as_path.is_dir():
        return as_path
    if as_path.name == str(name):
        for place in (paths.models_dir(), REPOSITORY_WEIGHTS):
            if (place / name / native.SETTINGS_FILE).is_file():
                return place / name
    known = ", ".join(model_names()) or "none here yet"
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return frozen.hub_folder(str(name), f"{str(name)!r} is neither a model here ({known}) nor a folder")
    raise UnknownModel(
        f"No model is called {str(name)!r} and no such folder exists. Models: {known}. Give one of them or a model "
        f"folder, copy the repository's weights/mini to {paths.models_dir() / 'mini'}, or train one: "
        "blip2 train mini/stage1."
    )


def _converted(path: Path, told: str) -> Path:
    """The model folder of a .pth, made on first use, and again where the file or the names have changed."""
    pairs = [part.partition("=") for part in told.split(",") if part]
    given = {name: value for name, _, value in pairs}
    known = ("vision", "llm", "text_init", "image_size")
    if unknown := given.keys() - set(known):
        raise UserError(
            f"A .pth has no part {', '.join(sorted(unknown))}. Known: {', '.join(known)}; as in vision=NAME."
        )
    if not given.get("image_size", "1").isdecimal():
        raise UserError(f"image_size={given['image_size']} is no number of pixels.")
    if not path.is_file():
        raise MissingFile(f"There is no file {path}.")
    size = int(given.get("image_size", convert.FrozenNames.image_size))
    names = convert.FrozenNames(given.get("vision"), given.get("llm"), given.get("text_init", convert.BERT), size)
    stat = path.stat()
    key = json.dumps([str(path.resolve()), stat.st_size, stat.st_mtime_ns, sorted(given.items())])
    folder = paths.home() / "converted" / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / native.SETTINGS_FILE).is_file():
        convert.write_folder(convert.read(path, str(path), names), folder)
    return folder


def model_names() -> list[str]:
    """Names of the models that `load` finds."""
    found = {
        path.parent.name
        for place in (paths.models_dir(), REPOSITORY_WEIGHTS)
        for path in place.glob(f"*/{native.SETTINGS_FILE}")
    }
    return sorted(found)


class _Loader:
    """Builds the modules of one model folder; what two parts share is read once."""

    def __init__(
        self,
        folder: Path,
        settings: native.ModelSettings,
        device: torch.device,
        dtype: torch.dtype,
        device_map: str | dict[str, int | str] | None,
        quantize: Bits | None,
        drafts: bool,
    ) -> None:
        self.quantize: Bits | None = quantize
        self.drafts = drafts
        self.folder = folder
        self.settings = settings
        self.device = device
        self.dtype = dtype
        self.device_map = device_map
        self.is_hugging_face = huggingface.is_checkpoint(folder)
        self._text_init: frozen.TextInit | None = None

    def vision_model(self) -> ImageEncoder:
        vision_model = frozen.load_vision(
            self.settings.vision.place(self.folder), dtype=self.dtype, image_size=self.settings.image_size
        )
        self._check(self.settings.vision, vision_model)
        self._lighten(vision_model, "int8", rounds_inputs=True)
        if self.device.type == "cpu" and has_few_bits(vision_model):
            _take_over(vision_model.network)
        elif self.device.type == "cpu" and isinstance(vision_model, EfficientNetTokens) and is_avx2():
            _hasten(vision_model)
        vision_model.to(self.device).eval()
        if self.device.type == "cuda":
            vision_model.record()
        return vision_model

    def retriever(self) -> Retriever:
        with torch.device("meta"):
            model = Blip2Stage1(None, self.settings.qformer)
        self._fill(model, "stage1")
        return Retriever(model, self._text_tokenizer(), self.settings.max_text_tokens)

    def generator(self) -> Generator:
        settings = self.settings
        if settings.language is None:
            raise MissingPart(f"{self.folder} names no language model, so it cannot speak. It was saved incompletely.")
        language_model, tokenizer = self._language_model(settings.language)
        with torch.device("meta"):
            model = Blip2Stage2(
                None,
                settings.qformer,
                None,
                language_width=language_model.width,
                instruction_aware=settings.instruction_aware,
            )
        self._fill(model, "generation")
        if language_model.reads_prefix_apart or language_model.prompts is not None:
            # The fifth digit of others' numbers is promised neither of what was rounded nor of what LiteRT computes.
            pack(model)
        if self.device.type == "cuda" and self.dtype == torch.bfloat16:
            model.to(self.dtype)
        model.language_model = language_model
        model.eval()
        instruction_tokenizer = self._text_tokenizer() if settings.instruction_aware else None
        return Generator(model, tokenizer, instruction_tokenizer, settings.max_text_tokens)

    def _language_model(self, part: native.FrozenPart) -> tuple[LanguageModel, LanguageTokenizer]:
        name = part.place(self.folder)
        network, hf_tokenizer = frozen.load_language(name, dtype=self.dtype, device_map=self.device_map)
        if self.device_map is None:
            self._check(part, network)
        self._lighten(network, self.quantize)
        on_cpu = self.device.type == "cpu" and self.device_map is None
        rounds_inputs = on_cpu and has_few_bits(network)
        if rounds_inputs or (on_cpu and _is_faster_taken_over(network)):
            _take_over(network)
        arrange(network, self.device)  # what no graph took
        if on_cpu:
            pack(network)
        padding = "right" if network.config.is_encoder_decoder else "left"
        tokenizer = LanguageTokenizer(hf_tokenizer, prompt_padding=padding)
        language_model = wrap_language_model(network, tokenizer, stop=self.settings.stop)
        language_model.reads_prefix_apart = rounds_inputs
        parts: list[Any] = list(network.modules())
        if rounds_inputs:
            language_model.attends_apart = next((part for part in parts if hasattr(part, "apart")), None)
        language_model.prompts = next((part.prompts for part in parts if hasattr(part, "prompts")), None)
        language_model.replay = next((part.words for part in parts if hasattr(part, "words")), None)
        if self.device_map is None:
            language_model.to(self.device)
            if self.device.type == "cuda":
                language_model.replay_steps()
            if self.drafts and Drafter.can_take(network):
                language_model.drafter = Drafter(network)
        return language_model, tokenizer

    def _lighten(self, network: nn.Module, bits: Bits | None, *, rounds_inputs: bool = False) -> None:
        """Quantises a frozen part where that was asked for."""
        if self.quantize is not None and bits is not None:
            quantize(network, bits, rounds_inputs=rounds_inputs)

    def _text_start(self) -> frozen.TextInit:
        """The text initialisation's weights."""
        if self.settings.text_init is None:
            raise BadData(f"{self.folder} names no text_init, and takes weights from it. Save the model again.")
        if self._text_init is None:
            self._text_init = frozen.load_text_init(self.settings.text_init.name)
        return self._text_init

    def _text_tokenizer(self) -> QFormerTokenizer:
        own = huggingface.tokenizer_folder(self.folder)
        if self.is_hugging_face or own != self.folder:
            return QFormerTokenizer(own)
        if self.settings.text_init is None:
            raise BadData(f"{self.folder} names no text_init, so the Q-Former has no tokenizer. Save the model again.")
        return QFormerTokenizer(frozen.text_init_folder(self.settings.text_init.name))

    def _fill(self, model: nn.Module, part: str) -> None:
        """Gives a module built on the meta device its weights: the stored ones, and those of the text start."""
        if self.is_hugging_face:
            state = huggingface.read_part(self.folder, self.settings)
        else:
            state = native.load_part(self.folder, self.settings, part)
        own = model.state_dict()
        for name in sorted(state.keys() & own.keys()):
            if state[name].shape != own[name].shape:
                raise BadData(
                    f"{self.folder}: {name} has shape {tuple(state[name].shape)} and by its settings should have "
                    f"{tuple(own[name].shape)}. Fetch or write the model folder again."
                )
        from_text = set(self.settings.from_text_init) & own.keys()
        lacking = from_text | huggingface.lacks(model, state)
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)  # no second copy
        if unexpected or set(missing) != lacking:
            wrong = sorted({*unexpected, *(set(missing) ^ lacking)})
            first = ", ".join(wrong[:3])
            raise BadData(f"{self.folder}: the weights of {part!r} do not fit its settings; wrong are {first}.")
        model.load_state_dict({name: torch.zeros(own[name].shape) for name in lacking}, strict=False, assign=True)
        if from_text:
            load_text_weights(model, self._text_start().state_dict, only=from_text)
        huggingface.start_untrained(model, lacking)
        model.to(self.device).eval().requires_grad_(False)

    def _check(self, part: native.FrozenPart, network: nn.Module) -> None:
        """Whether a frozen part is the one the model was trained with. Packages were checked when they were fetched."""
        if part.sha256 is None or self.dtype != torch.float32:  # hashes are of float32 weights
            return
        found = PACKAGES[part.name].sha256 if part.name in PACKAGES else frozen.fingerprint(network)
        if found != part.sha256:
            raise Untrusted(
                f"{part.name!r} has other weights than the ones {self.settings.name!r} was trained with (its sha256 "
                "differs), so its answers would be noise. Put the original back."
            )


def _is_faster_taken_over(network: Any) -> bool:
    """Whether LiteRT has an LLM's float32 products sooner than PyTorch: so measured for a Llama of 135 million weights
    where there is AVX2 alone, whose words came as fast as memory is read. Each weight is laid out in two temporary
    files, for which there must be room."""
    if type(network) is not LlamaForCausalLM or network.dtype != torch.float32 or not is_avx2():
        return False
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    num_bytes = sum(layer.weight.nbytes for layer in layers)
    return num_bytes <= MOST_FLOATS and _has_room(num_bytes)


def _hasten(vision_model: EfficientNetTokens) -> None:
    """Has LiteRT compute the stages of EfficientNet, where temporary files have room for its weights twice."""
    from blip2.model.graphs.convolutions import Stages  # here, since the runtime takes a fifth of a second to import

    network: Any = vision_model.network
    num_bytes = sum(weight.nbytes for weight in network.parameters())
    if Stages.can_take(network) and _has_room(num_bytes):
        vision_model.faster = Stages(network, vision_model.image_size)


def _has_room(num_bytes: int) -> bool:
    """Whether temporary files have room for weights twice: as they come and as they are laid out."""
    return shutil.disk_usage(tempfile.gettempdir()).free >= ROOM_FOR_FLOATS * num_bytes


def _take_over(network: Any) -> None:
    from blip2.model.graphs.taking_over import take_over  # here, since the runtime takes a fifth of a second to import

    take_over(network)


def wrap_language_model(network: Any, tokenizer: LanguageTokenizer, *, stop: str = "") -> LanguageModel:
    """A Hugging Face language model behind the common interface; what its generation settings call an end ends.

    So does `stop`, where it is one token; a longer one is refused, since text would be cut only after it.
    """
    stop_ids = {tokenizer.eos_id}
    configured = getattr(network.generation_config, "eos_token_id", None)
    stop_ids.update(configured if isinstance(configured, list) else [configured] if configured is not None else [])
    if stop:
        stop_ids.add(tokenizer.token_id(stop))
    kind = EncoderDecoderLM if network.config.is_encoder_decoder else DecoderLM
    return kind(network, stop_ids=sorted(stop_ids), pad_id=tokenizer.pad_id)
