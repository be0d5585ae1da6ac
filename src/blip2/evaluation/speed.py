"""How fast a model speaks, beside a peer, each in a process of its own, taking turns on the same pictures.

    "blip2"          `blip2.load`, as everybody uses it
    "transformers"   Hugging Face's class and processor, on a checkpoint in its layout
    "plain"          our modules one after the other and the LLM's own `generate`, as `PlainSpeaker` has it

Every picture is new, so that nothing is remembered of it but where that is the question (`second_question`). Times are
seconds of wall clock. Peak memory is what the process held at most: all of it, and without the pages of mapped files,
which the kernel takes back where memory is short.
"""

import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from PIL import Image

from blip2.errors import Blip2Error, UserError
from blip2.model.efficientnet import EfficientNetTokens
from blip2.model.quantized import Bits

Kind = Literal["blip2", "transformers", "plain"]
FIRST, SECOND = "a photo of", "question: how many cups are there? answer:"
START_SECONDS = 1800  # a model that takes longer to load is given up


@dataclass(frozen=True)
class Contender:
    """One way to run one model.

    Attributes:
        kind: see the module's docstring.
        model: name or folder.
        dtype: of the frozen parts.
        quantize: as in `blip2.load`.
        device: where it computes.
    """

    kind: Kind
    model: str
    dtype: str = "float32"
    quantize: Bits | None = None
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.kind} {Path(self.model).name} {self.quantize or self.dtype}"


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        runs: rounds; in each every contender takes its turn.
        num_tokens: words said, no more and no fewer.
        batch_sizes: pictures in one call; 1 is measured in any case.
    """

    runs: int = 5
    num_tokens: int = 17
    batch_sizes: tuple[int, ...] = ()


def compare(contenders: Sequence[Contender], plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures all contenders.

    Args:
        contenders: ours first; ratios are the last one's seconds over each one's.
        plan: what is measured.
        say: is told how far it is.

    Returns:
        `contenders`: for each its settings and measures, each with median, least, most and all values; `ratios` of
        medians to the last contender's; `same_text`: share of texts equal to the last contender's; `machine`.

    Raises:
        UserError: a contender could not be started; the reason is told.
    """
    measures: list[dict[str, list[float]]] = [{} for _ in contenders]
    texts: list[list[str]] = [[] for _ in contenders]
    with ExitStack() as stack:
        workers = []
        for contender, taken in zip(contenders, measures, strict=True):
            say(f"starting {contender}")
            worker, seconds = stack.enter_context(_worker(contender))
            taken["start"] = [seconds]
            workers.append(worker)
        for number in range(-1, plan.runs):  # the first round warms up
            say(f"round {number + 1} of {plan.runs}" if number >= 0 else "warming up")
            for worker, taken, said in zip(workers, measures, texts, strict=True):
                found, words = _ask(worker, (number, plan))
                for name, value in found.items() if number >= 0 else ():
                    taken.setdefault(name, []).append(value)
                said += words
        for worker, taken in zip(workers, measures, strict=True):
            taken |= {name: [value] for name, value in _ask(worker, None).items()}
    summaries = [{name: _summary(values) for name, values in taken.items()} for taken in measures]
    last = summaries[-1]
    return {
        "contenders": [
            asdict(contender) | {"name": str(contender), "measures": summary}
            for contender, summary in zip(contenders, summaries, strict=True)
        ],
        "ratios": {
            str(contender): {
                name: last[name]["median"] / found["median"] for name, found in summary.items() if name in last
            }
            for contender, summary in zip(contenders, summaries, strict=True)
        },
        "same_text": {
            str(contender): statistics.mean(a == b for a, b in zip(said, texts[-1], strict=True))
            for contender, said in zip(contenders, texts, strict=True)
        },
        "plan": asdict(plan),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What it ran on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values), "values": list(values)}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


# The process of a contender


@contextmanager
def _worker(contender: Contender):
    """A process that answers to a round, and the seconds until it had said its first word."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(contender, there), daemon=True)
    begin = time.perf_counter()
    process.start()
    there.close()
    try:
        if not here.poll(START_SECONDS):
            raise UserError(f"{contender} had not started after {START_SECONDS} s.")
        _received(here, contender)
        yield (here, contender), time.perf_counter() - begin
    finally:
        process.terminate()
        process.join()


def _ask(worker: tuple[Any, Contender], order: tuple[int, Plan] | None) -> Any:
    pipe, contender = worker
    pipe.send(order)
    return _received(pipe, contender)


def _received(pipe: Any, contender: Contender) -> Any:
    try:
        answer = pipe.recv()
    except EOFError:
        raise UserError(f"{contender} ended without a word; most likely memory was short.") from None
    if isinstance(answer, str):
        raise UserError(f"{contender}: {answer}")
    return answer


def _serve(contender: Contender, pipe: Any) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        speaker = SPEAKERS[contender.kind](contender)
        speaker.say([picture(-1)], FIRST, 1)
        pipe.send(None)
        while (order := pipe.recv()) is not None:
            pipe.send(_round(speaker, *order))
        pipe.send(_memory())
    except Blip2Error as error:
        pipe.send(str(error))
    except (OSError, ValueError, RuntimeError) as error:
        pipe.send(f"{type(error).__name__}: {error}")


@torch.inference_mode()
def _round(speaker: Any, number: int, plan: Plan) -> tuple[dict[str, float], list[str]]:
    """The measures of one round, and what was said in it."""
    seed = 1000 * (number + 2)
    asked, described = picture(seed), picture(seed + 1)
    taken, texts = {}, []
    taken["vision"], _ = _timed(lambda: speaker.see(picture(seed + 2)), speaker)
    taken["first_token"], _ = _timed(lambda: speaker.say([asked], FIRST, 1), speaker)
    taken["second_question"], _ = _timed(lambda: speaker.say([asked], SECOND, 1), speaker)
    taken["caption"], said = _timed(lambda: speaker.say([described], FIRST, plan.num_tokens), speaker)
    texts += said
    taken["token"] = (taken["caption"] - taken["first_token"]) / (plan.num_tokens - 1)
    for size in plan.batch_sizes:
        images = [picture(seed + 10 + i) for i in range(size)]
        seconds, said = _timed(lambda images=images: speaker.say(images, FIRST, plan.num_tokens), speaker)
        taken[f"image_of_{size}"] = seconds / size
        texts += said
    return taken, texts


def _timed(work: Callable[[], Any], speaker: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = work()
    if speaker.device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def picture(seed: int) -> Image.Image:
    """A picture of noise in patches, 320 by 240, the same for the same seed."""
    patches = np.random.default_rng(seed + 1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((320, 240), Image.Resampling.NEAREST)


def _memory() -> dict[str, float]:
    """Bytes this process held at most, and holds now without mapped files; of the GPU too, where there is one."""
    held = {}
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, rest = line.partition(":")
            held[name] = rest.split()[0] if rest.split() else ""
    found = {"peak_bytes": "VmHWM", "own_bytes": "RssAnon"}
    memory = {name: float(held[key]) * 1024 for name, key in found.items() if key in held}
    if torch.cuda.is_available():
        memory["gpu_bytes"] = float(torch.cuda.max_memory_allocated())
    return memory


class _Ours:
    """`blip2.load`, as everybody uses it."""

    def __init__(self, contender: Contender) -> None:
        from blip2.inference.loading import load

        self.device = contender.device
        self.model = load(
            contender.model,
            contender.device,
            getattr(torch, contender.dtype),
            parts=["generation"],
            quantize=contender.quantize,
        )
        self.model.batch_size = 1024

    def see(self, image: Image.Image) -> None:
        self.model.image_features(image)

    def say(self, images: list[Image.Image], prompt: str, count: int) -> list[str]:
        return self.model.generate(images, prompt, max_new_tokens=count, min_new_tokens=count)


class PlainSpeaker:
    """Our modules one after the other and the LLM's own `generate`, its layers as transformers has them, and those of
    EfficientNet as PyTorch does."""

    def __init__(self, contender: Contender) -> None:
        from blip2.checkpoints import frozen
        from blip2.inference.loading import find_model, load

        self.device = contender.device
        dtype: torch.dtype = getattr(torch, contender.dtype)
        self.model = load(contender.model, contender.device, dtype)
        self.model.batch_size = 1024
        self.model.image_cache.max_bytes = self.model.generator.image_cache.max_bytes = 0
        if isinstance(self.model.vision_model, EfficientNetTokens):
            self.model.vision_model.faster = None
        part = self.model.settings.language
        assert part is not None, "a model that speaks names its language model"
        self.network: Any = frozen.load_language(part.place(find_model(contender.model)), dtype=dtype)[0]
        self.network.eval().to(contender.device)

    def see(self, image: Image.Image) -> None:
        """Image features."""
        self.model.image_features(image)

    def say(self, images: list[Image.Image], prompt: str, count: int) -> list[str]:
        """Texts of `count` tokens."""
        return self.generate(images, prompt, prompt, max_new_tokens=count, min_new_tokens=count)

    @torch.inference_mode()
    def generate(self, images: Sequence[Any], prompt: str, instruction: str, **options: Any) -> list[str]:
        """Texts after pictures and one prompt; options are those of transformers."""
        generator = self.model.generator
        visual = generator.visual_prompt(self.model.image_features(images), [instruction] * len(images))
        prompts = generator.tokenizer.encode_prompts([prompt] * len(images)).to(visual.device)
        words = self.network.get_input_embeddings()(prompts.input_ids)
        embeds = torch.cat([visual.to(words.dtype), words], dim=1)  # prompts are equal, so there is no padding
        said = self.network.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            eos_token_id=generator.language_model.stop_ids,
            pad_token_id=generator.language_model.pad_id,
            **{"do_sample": False, "num_beams": 1} | options,
        )
        return generator.tokenizer.decode(said[:, 1:] if self.network.config.is_encoder_decoder else said)


class _Transformers:
    """Hugging Face's class and processor."""

    def __init__(self, contender: Contender) -> None:
        folder = Path(contender.model)
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        make = getattr(transformers, config.architectures[0])
        self.device, self.dtype = contender.device, getattr(torch, contender.dtype)
        self.processor: Any = transformers.AutoProcessor.from_pretrained(folder)
        self.model = make.from_pretrained(folder, dtype=self.dtype).to(contender.device).eval()

    def see(self, image: Image.Image) -> None:
        inputs = self.processor.image_processor(image, return_tensors="pt").to(self.device, self.dtype)
        self.model.vision_model(**inputs)

    def say(self, images: list[Image.Image], prompt: str, count: int) -> list[str]:
        inputs = self.processor(images=images, text=[prompt] * len(images), padding=True, return_tensors="pt")
        inputs = inputs.to(self.device, self.dtype)
        said = self.model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, num_beams=1)
        texts = self.processor.batch_decode(said[:, -count:], skip_special_tokens=True)
        return [text.strip() for text in texts]  # as ours are


SPEAKERS: Mapping[str, Callable[[Contender], Any]] = {
    "blip2": _Ours,
    "plain": PlainSpeaker,
    "transformers": _Transformers,
}
