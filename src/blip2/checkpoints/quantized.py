"""A frozen part with few bits a weight, in a folder of its own that stands for it wherever a name or folder does.

    quantization.json        how many bits, in what groups, and which weights are one and the same
    quantized.safetensors    what `model.quantized` made of the linear layers; everything else as it was
    config.json, generation_config.json, tokenizer   as the part had them

`checkpoints.frozen` reads such a folder. Weights are mapped and stay on disk until they are used. Those of an image
encoder are let go again layer by layer, since they are used once a picture; those of a language model are read when
they are laid out for the processor's kernel.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blip2.checkpoints.mapped import CAN_LET_GO, MappedFile
from blip2.errors import BadData, MissingFile, Untrusted, UserError
from blip2.model.quantized import GROUP_SIZES, Int4Linear, Int8Embedding, Int8Linear
from blip2.model.rotation import block_of

MARK = "quantization.json"
WEIGHTS = "quantized.safetensors"
FORMAT, FORMAT_TURNED = 1, 2  # the second one tells which weights were turned
AGAIN = "Write the folder again with blip2 quantize."


class Mark(NamedTuple):
    """What quantization.json tells of the weights.

    Attributes:
        shared: names of weights and the ones they are.
        group_size: of weights of four bits; None where it was not told.
        turned: which weights were turned before they were rounded, "int8" or "int4" or both.
    """

    shared: dict[str, str]
    group_size: int | None
    turned: frozenset[str]


def is_quantized(folder: Path) -> bool:
    """Whether a folder holds a quantised part."""
    return (folder / MARK).is_file()


def group_size(folder: Path) -> int | None:
    """Weights of four bits that share a scale; None where there are none, and where the folder does not tell.

    Raises:
        BadData: the folder's mark is broken.
    """
    return _read_mark(folder).group_size


def save(network: Any, bits: str, folder: Path, *, group_size: int | None = None) -> None:
    """Writes a network that `model.quantized.quantize` has been through.

    Args:
        network: a Hugging Face model or tower.
        bits: what it was quantised to.
        folder: where; made if need be.
        group_size: that weights of four bits were quantised with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network.config.save_pretrained(folder)
    if getattr(network, "generation_config", None) is not None:
        network.generation_config.save_pretrained(folder)
    weights: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in network.state_dict().items():
        owner = first.setdefault(tensor.data_ptr(), name)
        if owner == name:
            weights[name] = tensor.detach().cpu().contiguous()
        else:
            shared[name] = owner
    try:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} could not be written: {error}.") from error
    grouped = {} if group_size is None else {"group_size": group_size}
    layers = [layer for layer in network.modules() if isinstance(layer, Int4Linear | Int8Linear) and layer.turned_block]
    turned = sorted({"int4" if isinstance(layer, Int4Linear) else "int8" for layer in layers})
    told = {"format": FORMAT_TURNED, "turned": turned} if turned else {"format": FORMAT}
    mark = told | {"bits": bits, **grouped, "shared": shared}
    (folder / MARK).write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")


def load(
    make: Callable[[], Any], folder: Path, dtype: torch.dtype | Literal["auto"], *, is_vision: bool = False
) -> Any:
    """The network in a quantised folder, frozen.

    Args:
        make: builds it without weights, of its configuration.
        folder: as `save` wrote it.
        dtype: of what was not quantised, and so of what flows between the layers; "auto": float32.
        is_vision: it is an image encoder, whose layers round their inputs and let their weights' memory go after use.

    Raises:
        MissingFile: there are no weights.
        Untrusted: the weights are no whole safetensors file.
        BadData: they do not fit config.json, or a newer version wrote them.
    """
    dtype = torch.float32 if dtype == "auto" else dtype
    mark = _read_mark(folder)
    mapped, weights = _read(folder / WEIGHTS, mark.shared, lets_go=is_vision and CAN_LET_GO)
    with init_empty_weights(include_buffers=False):
        network = make()
    quantized, misshapen = [], set()
    for place in sorted({name.rpartition(".")[0] for name in weights}):
        layer = _layer(place, weights, network, dtype, rounds_inputs=is_vision, turned=mark.turned)
        if layer is not None:
            misshapen |= set() if _sizes(layer) == _sizes(network.get_submodule(place)) else {place}
            network.set_submodule(place, layer)
            quantized.append(f"{place}.")
            if mapped is not None and isinstance(layer, Int8Linear):
                mapped.let_go_after(layer, f"{place}.weight")
    own = network.state_dict()
    misshapen |= {name for name in weights.keys() & own.keys() if weights[name].shape != own[name].shape}
    if wrong := sorted((weights.keys() ^ own.keys()) | misshapen):
        raise BadData(f"{folder / WEIGHTS} does not fit the config.json beside it ({', '.join(wrong[:3])}). {AGAIN}")
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(tuple(quantized))}
    floats = {name: tensor.to(dtype) for name, tensor in rest.items() if tensor.is_floating_point()}
    network.load_state_dict(rest | floats, strict=False, assign=True)
    return network.requires_grad_(False).eval()


def _layer(
    place: str,
    weights: Mapping[str, Tensor],
    network: nn.Module,
    dtype: torch.dtype,
    *,
    rounds_inputs: bool,
    turned: frozenset[str],
) -> nn.Module | None:
    """The quantised layer at a place, of the weights found there; None where they are not of one."""
    names = ("weight", "scale", "packed", "scale_and_zero", "bias")
    weight, scale, packed, scale_and_zero, bias = (weights.get(f"{place}.{name}") for name in names)
    try:
        was = network.get_submodule(place)
    except AttributeError:
        return None  # `load` tells of weights that have no place
    if packed is not None and scale_and_zero is not None:
        block = block_of(2 * packed.shape[1]) if "int4" in turned else 0
        return Int4Linear(packed, scale_and_zero, bias, turned_block=block)
    if weight is None or scale is None or weight.dtype != torch.int8:
        return None
    block = block_of(weight.shape[1]) if "int8" in turned else 0
    if isinstance(was, nn.Embedding):
        return Int8Embedding(weight, scale, dtype, turned_block=block)
    return Int8Linear(weight, scale, bias, rounds_inputs=rounds_inputs, turned_block=block)


def _sizes(layer: Any) -> tuple[int, ...]:
    """What must agree between a layer and the one it stands for: rows, columns, and as many biases and scales."""
    bias = getattr(layer, "bias", None)
    num_rows, num_columns = layer.weight.shape if layer.weight is not None else (layer.out_features, layer.in_features)
    if type(layer).__name__ == "Conv1D":
        num_rows, num_columns = num_columns, num_rows
    scales = layer.scale_and_zero.shape[1] if isinstance(layer, Int4Linear) else len(getattr(layer, "scale", ()))
    return num_rows, num_columns, num_rows if bias is None else len(bias), scales or num_rows


def _read_mark(folder: Path) -> Mark:
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        if mark["format"] not in (FORMAT, FORMAT_TURNED):
            raise BadData(f"{folder / MARK} has a format that this version does not know. Update blip2.")
        shared = {str(name): str(owner) for name, owner in mark["shared"].items()}
        turned = frozenset(map(str, mark["turned"] if mark["format"] == FORMAT_TURNED else ()))
        if mark.get("group_size") is None:
            return Mark(shared, None, turned)
        if mark["group_size"] not in GROUP_SIZES:
            told = f"has groups of {mark['group_size']!r}, which are not among {GROUP_SIZES}"
            raise BadData(f"{folder / MARK} {told}. {AGAIN}")
        return Mark(shared, int(mark["group_size"]), turned)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadData(f"{folder / MARK} is broken ({error!r}). {AGAIN}") from None


def _read(path: Path, shared: Mapping[str, str], *, lets_go: bool) -> tuple[MappedFile | None, dict[str, Tensor]]:
    """All weights, mapped: as one file whose parts can be let go and read again, or each with a mapping of its own, so
    that what is read once frees its memory. Of a matrix that is shared words are looked up, a few pages of it, while
    the whole is laid out for the processor: so these are two mappings as well."""
    if not path.is_file():
        raise MissingFile(f"{path} is missing. {AGAIN}")
    try:
        if lets_go:
            mapped = MappedFile(path)
            weights = mapped.tensors()
            return mapped, weights | {name: weights[owner] for name, owner in shared.items() if owner in weights}
        with safe_open(path, framework="pt") as file:
            names = {name: name for name in file.keys()}  # noqa: SIM118
        names |= {name: owner for name, owner in shared.items() if owner in names}
        weights = {}
        for name, stored in names.items():
            with safe_open(path, framework="pt") as file:
                weights[name] = file.get_tensor(stored)
        return None, weights
    except SafetensorError as error:
        raise Untrusted(f"{path} is no whole safetensors file ({error}). {AGAIN}") from None
