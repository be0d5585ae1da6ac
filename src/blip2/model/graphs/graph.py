"""A graph for ONNX Runtime, whose products have weights of four or eight bits.

PyTorch's own kernel for four bits on CPUs multiplies floats. `MatMulNBits` rounds a row's inputs to eight bits too,
in the groups in which the weights have their scales, and adds integers up: what stands out makes its own group coarse.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

import ctypes
import mmap
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from blip2.errors import UserError
from blip2.model.quantized import MIDDLE, Int4Linear, Int8Linear

MICROSOFT = "com.microsoft"
VERSIONS = {"": 21, MICROSOFT: 1}
SMALLEST_GROUP = 16  # of inputs that the kernel rounds together
AT_ONCE = 300 << 20  # bytes of weights that one graph holds, about
INT8_INPUTS = 4  # the kernel's `accuracy_level` that rounds inputs to eight bits
INT8_ZERO = 128  # what stands for 0 among eight bits without a sign
WHOLE = 0.05  # how far from a whole number of steps a zero may be that is one, but for bfloat16
WEIGHTS, CONSTANTS = "weights", "constants"  # files
ALIGNED = 64  # bytes that a constant begins at a multiple of
KINDS = {torch.float32: TensorProto.FLOAT, torch.uint8: TensorProto.UINT8, torch.int64: TensorProto.INT64}

QuantizedLinear = Int4Linear | Int8Linear


class Graph:
    """What is computed, written down step by step; names of results are given back. `session` ends it.

    What does not change goes through files: of a weight there the runtime keeps what it lays out for the processor
    alone, of one in memory a copy as well. It keeps a file open of which it reads anything later, hence two.

    Raises:
        UserError: no room where temporary files go.
    """

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._fetched: dict[str, str] = {}  # results and the names they are fetched by
        self._kept: list[Any] = []  # constants, most of them a mark of where they are
        self._count = 0
        self.num_bytes = 0  # of weights so far
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="blip2-", ignore_cleanup_errors=True)
            self._files = {name: (Path(self._folder.name) / name).open("wb") for name in (WEIGHTS, CONSTANTS)}
        except OSError as error:
            raise _no_room(error) from None

    def input(self, name: str, *shape: int | str, dtype: torch.dtype = torch.float32) -> str:
        """What is fed; a size with a name may differ from call to call."""
        self._inputs.append(helper.make_tensor_value_info(name, KINDS[dtype], shape))
        return name

    def output(self, name: str, result: str) -> None:
        """Gives a result a name to be fetched by."""
        self._fetched[result] = name
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def node(self, kind: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """The only result of one operation."""
        return self.nodes(kind, 1, *inputs, domain=domain, **attributes)[0]

    def nodes(self, kind: str, count: int, *inputs: str, domain: str = "", **attributes: Any) -> list[str]:
        """The results of one operation."""
        results = [self._name() for _ in range(count)]
        self._nodes.append(helper.make_node(kind, inputs, results, domain=domain, **attributes))
        return results

    def constant(self, tensor: Tensor) -> str:
        """A small tensor that does not change."""
        return self._write(CONSTANTS, tensor)

    def shape(self, *sizes: int) -> str:
        """What `Reshape` and `split` are given: for the one, 0 where a size stays."""
        name = self._name()
        self._kept.append(helper.make_tensor(name, TensorProto.INT64, [len(sizes)], sizes))
        return name

    def product(self, x: str, *layers: QuantizedLinear) -> list[str]:
        """(B, T, K) through linear layers: (B, T, N) for each. Those of one kind are one product."""
        group_size, length = input_groups(layers[0]), layers[0].in_features
        if len({(type(layer), input_groups(layer)) for layer in layers}) > 1:
            return [result for layer in layers for result in self.product(x, layer)]
        parts = [_stored(layer) for layer in layers]
        weight, scale, zero, added = (torch.cat([part[i] for part in parts]) for i in range(4))
        self.num_bytes += weight.nbytes
        biases = [layer.bias for layer in layers]
        bias = ""
        if any(one is not None for one in biases):
            sizes = [layer.out_features for layer in layers]
            both = zip(biases, sizes, strict=True)
            bias = self.constant(torch.cat([torch.zeros(size) if one is None else one.float() for one, size in both]))
        y = self.node(
            "MatMulNBits",
            *(x, self._write(WEIGHTS, weight), self.constant(scale), self.constant(zero), "", bias),
            domain=MICROSOFT,
            N=len(weight),
            K=length,
            bits=4 if isinstance(layers[0], Int4Linear) else 8,
            block_size=group_size,
            accuracy_level=INT8_INPUTS,
        )
        if bool(added.any()):  # to each weight of a group: so its sum of inputs, times that
            groups = self.node("Reshape", x, self.shape(0, 0, length // group_size, group_size))
            sums = self.node("ReduceSum", groups, self.shape(3), keepdims=0)  # (B, T, K / G)
            y = self.node("Add", y, self.node("MatMul", sums, self.constant(added.t())))
        if len(layers) == 1:
            return [y]
        return self.split(y, self.shape(*(layer.out_features for layer in layers)), len(layers))

    def split(self, x: str, sizes: str, count: int) -> list[str]:
        """Parts of the last dimension."""
        return self.nodes("Split", count, x, sizes, axis=-1)

    def session(self) -> Any:
        """The graph, ready to be run; as many threads as PyTorch has now, at rest between two runs."""
        try:
            for file in self._files.values():
                file.close()
        except OSError as error:
            raise _no_room(error) from None
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._fetched.get(name, name) for name in names]
        graph = helper.make_graph(self._nodes, "layers", self._inputs, self._outputs, self._kept)
        versions = [helper.make_opsetid(domain, version) for domain, version in VERSIONS.items()]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # else it warns of GPUs that it does not find
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.enable_cpu_mem_arena = False  # it keeps what the longest prompt took
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", self._folder.name)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        let_go_of_pages(Path(self._folder.name) / CONSTANTS)
        self._folder.cleanup()
        return session

    def _write(self, place: str, tensor: Tensor) -> str:
        name, file = self._name(), self._files[place]
        mark = TensorProto(name=name, data_type=KINDS[tensor.dtype], dims=tensor.shape)
        mark.data_location = TensorProto.EXTERNAL
        told = {"location": place, "offset": str(file.tell()), "length": str(tensor.nbytes)}
        for key, value in told.items():
            mark.external_data.add(key=key, value=value)
        self._kept.append(mark)
        try:
            file.write(tensor.detach().contiguous().numpy().data)
            file.write(bytes(-tensor.nbytes % ALIGNED))
        except OSError as error:
            raise _no_room(error) from None
        return name

    def _name(self) -> str:
        self._count += 1
        return f"t{self._count}"


def sessions(graphs: Iterable[Graph]) -> list[Any]:
    """Of graphs that are written down one after the other: while one is written, the one before is made ready."""
    with ThreadPoolExecutor(1) as pool:
        made: list[Future[Any]] = []
        for graph in graphs:
            if made:
                made[-1].result()  # two at most are there at once
            made.append(pool.submit(graph.session))
        return [future.result() for future in made]


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"Weights could not be laid out in a temporary file ({error.strerror}). Up to a gigabyte is needed, and a "
        "fifth of what the language model has on disk; the environment variable TMPDIR names another folder."
    )


def let_go_of_pages(path: Path) -> None:
    """Takes a file's pages out of this process's memory, where the system can: they are read again when they are used.
    Of the constants most are scales, which the kernel has copied."""
    maps = Path("/proc/self/maps")
    if not (hasattr(mmap, "MADV_DONTNEED") and maps.exists()):
        return
    system = ctypes.CDLL(None)
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith(f" {path.resolve()}"):
            begin, end = (int(number, 16) for number in line.partition(" ")[0].split("-"))
            system.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def can_take(layer: Any) -> bool:
    """Whether a layer is one that `Graph.product` takes."""
    return isinstance(layer, Int4Linear) or (isinstance(layer, Int8Linear) and not layer.rounds_inputs)


def input_groups(layer: QuantizedLinear) -> int:
    """How many inputs of a row the kernel rounds together: the layer's group, halved until a row has whole ones."""
    if isinstance(layer, Int4Linear):
        return layer.group_size
    size = layer.group_size
    while layer.in_features % size and size > SMALLEST_GROUP:
        size //= 2
    return size


def _stored(layer: QuantizedLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight (N, K / G, bytes of a group); scales (N, K / G) float32; what stands for 0, as many bits each; and
    what is added to all weights of a group, (N, K / G) float32."""
    if isinstance(layer, Int4Linear):
        scale, offset = layer.scale_and_zero.float().transpose(0, 1).unbind(dim=2)  # (N, K / G) each
        zero = whole_zeros(scale, offset)
        offset = offset if zero is None else torch.zeros_like(offset)
        zero = torch.full(scale.shape, MIDDLE, dtype=torch.uint8) if zero is None else zero
        zero = F.pad(zero, (0, zero.shape[1] % 2))
        zero = zero[:, ::2] | (zero[:, 1::2] << 4)
        return layer.packed.unflatten(1, (-1, layer.group_size // 2)), scale, zero, offset
    group_size = input_groups(layer)
    weight = layer.weight.view(torch.uint8) ^ INT8_ZERO
    if padding := -layer.in_features % group_size:
        weight = F.pad(weight, (0, padding), value=INT8_ZERO)
    weight = weight.unflatten(1, (-1, group_size))
    scale = layer.scale[:, None].float().expand(-1, weight.shape[1])
    return weight, scale, torch.full(scale.shape, INT8_ZERO, dtype=torch.uint8), torch.zeros(scale.shape)


def whole_zeros(scale: Tensor, zero: Tensor) -> Tensor | None:
    """The number of 0..15 that stands for 0 in each group, uint8; None where there is none in some.

    Args:
        scale, zero: as `Int4Linear` has them, of any one shape.
    """
    points = MIDDLE - zero / scale
    whole = points.round()
    is_one = ((points - whole).abs() <= WHOLE) & (whole >= 0) & (whole <= 15)
    return whole.to(torch.uint8) if bool(is_one.all()) else None
