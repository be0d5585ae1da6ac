"""Marian's own file of weights (.bin) -> the names of `model.marian_ssru`.

    16 bytes          version (1) and number of items
    32 bytes an item  length of its name, type, number of sides, bytes of data
    names, sides (int32), an offset, then the data of all items, each 256 bytes long or a multiple

Matrices of type int8 are followed by one float32, by which they are divided; but for the embeddings they are stored
transposed. *_QuantMultA is for integer arithmetic and ignored, like special:model.yml.
"""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip2.errors import BadData

FLOAT32, INT8 = 0x404, 0x4101
EMBEDDINGS = "Wemb"
_PARTS = {  # of a layer's weights, ours -> Marian's
    "encoder": {
        "own.q_proj": "self_{}q",
        "own.k_proj": "self_{}k",
        "own.v_proj": "self_{}v",
        "own.out_proj": "self_{}o",
        "fc1": "ffn_{}1",
        "fc2": "ffn_{}2",
    },
    "decoder": {
        "context.q_proj": "context_{}q",
        "context.k_proj": "context_{}k",
        "context.v_proj": "context_{}v",
        "context.out_proj": "context_{}o",
        "own.forget": "rnn_{}f",
        "fc1": "ffn_{}1",
        "fc2": "ffn_{}2",
    },
}
_NORMS = {
    "encoder": {"own_norm": "self_Wo_ln", "ffn_norm": "ffn_ffn_ln"},
    "decoder": {"own_norm": "rnn_ffn_ln", "context_norm": "context_Wo_ln", "ffn_norm": "ffn_ffn_ln"},
}


def read(path: Path) -> dict[str, Tensor]:
    """All weights of a Marian file by Marian's names, float32; matrices (out, in), vectors flat.

    Raises:
        BadData: the file is no such file, or of another version.
    """
    data = path.read_bytes()
    try:
        version, count = struct.unpack_from("<2Q", data)
        if version != 1:
            raise BadData(f"{path} is of version {version} of Marian's format; version 1 is read.")
        heads = [struct.unpack_from("<4Q", data, 16 + 32 * i) for i in range(count)]
        place, names, sides = 16 + 32 * count, [], []
        for length, *_ in heads:
            names.append(data[place : place + length - 1].decode())
            place += length
        for _, _, rank, _ in heads:
            sides.append(struct.unpack_from(f"<{rank}i", data, place))
            place += 4 * rank
        place += 8 + struct.unpack_from("<Q", data, place)[0]
        weights = {}
        for name, (_, kind, _, size), shape in zip(names, heads, sides, strict=True):
            if not name.endswith("_QuantMultA") and not name.startswith("special:"):
                weights[name] = _tensor(data[place : place + size], kind, shape, is_flipped=name != EMBEDDINGS)
            place += size
    except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
        raise BadData(f"{path} is no file of Marian's weights ({error}).") from None
    return weights


def translate(marian: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `MarianSsruForConditionalGeneration`."""
    embeddings, bias = marian[EMBEDDINGS], marian["decoder_ff_logit_out_b"]
    state = {
        "shared.weight": torch.cat([embeddings, embeddings.new_zeros(1, embeddings.shape[1])]),
        "final_logits_bias": torch.cat([bias, bias.new_zeros(1)]),
    }
    for side, place in (("encoder", "encoder.layers.{}"), ("decoder", "decoder.{}")):
        number = 1
        while f"{side}_l{number}_ffn_W1" in marian:
            ours, theirs = place.format(number - 1), f"{side}_l{number}_"
            for part, name in _PARTS[side].items():
                state[f"{ours}.{part}.weight"] = marian[theirs + name.format("W")]
                state[f"{ours}.{part}.bias"] = marian[theirs + name.format("b")]
            for part, name in _NORMS[side].items():
                state[f"{ours}.{part}.weight"] = marian[f"{theirs}{name}_scale"]
                state[f"{ours}.{part}.bias"] = marian[f"{theirs}{name}_bias"]
            if side == "decoder":
                state[f"{ours}.own.input.weight"] = marian[f"{theirs}rnn_W"]
            number += 1
    return state


def _tensor(data: bytes, kind: int, shape: tuple[int, ...], *, is_flipped: bool) -> Tensor:
    count = int(np.prod(shape))
    if kind == FLOAT32:
        flat = np.frombuffer(data, "<f4", count)
        return torch.from_numpy(flat.copy())
    if kind != INT8:
        raise ValueError(f"items of type {kind:#x}")
    scale = np.frombuffer(data, "<f4", 1, count)[0]
    rows, columns = (shape[1], shape[0]) if is_flipped else shape
    values = np.frombuffer(data, "i1", count).reshape(rows, columns)
    return torch.from_numpy(values.astype(np.float32) / scale)
