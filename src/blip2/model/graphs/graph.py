"""A model for LiteRT, written down step by step: what an LLM's linear layers do to rows of numbers.

PyTorch has no kernel for CPUs that multiplies int8 by int4 or, for few rows, int8 by int8. LiteRT's (XNNPACK) round
each row to eight bits with one scale and add integers up. So that one scale will do, rows are turned first
(`rotation`). Products with weights in float32 round nothing.

    ModelFile            a file of several signatures, each with the weights that it needs
    Signature            rows (R, width) in, rows out; how many rows there are is told at each call

Source: https://github.com/tensorflow/tensorflow/blob/master/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import torch
from ai_edge_litert import schema_py_generated
from torch import Tensor, nn

from blip2.errors import UserError
from blip2.model.graphs.runtime import Runtime
from blip2.model.graphs.weights import Linear, kind_of, stored
from blip2.model.quantized import Int4Linear
from blip2.model.rotation import hadamard

schema: Any = schema_py_generated  # made by a program, with types that its own functions do not keep to
ALIGNED = 64  # bytes that a weight begins at a multiple of
RESERVED = 256 << 20  # bytes before the first weight, for the description: a hole in the file
MORE_ROOM = 1.1  # times the weights, that what is laid out of them takes
LARGEST_WEIGHT = 32 << 20  # bytes; LiteRT keeps as much memory as the largest takes
SPLITS = 4, 3, 2  # parts that XNNPACK makes at once
SMALL = 1024  # bytes up to which a constant stands in the description itself
FULLY_CONNECTED_VERSION = 13  # of the operation, with weights of four bits in groups
LEAST_SCALE = 2.0**-14  # that float16 holds without loss
MUCH_LARGER = 8  # scales of another layer, which has a product of its own then

KINDS = {
    np.dtype("float32"): schema.TensorType.FLOAT32,
    np.dtype("float16"): schema.TensorType.FLOAT16,
    np.dtype("int32"): schema.TensorType.INT32,
}
OPTIONS = {  # what an operation is told, by the name of what it is told in
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "BATCH_MATMUL": "BatchMatMulOptions",
    "CONCATENATION": "ConcatenationOptions",
    "CONV_2D": "Conv2DOptions",
    "DEPTHWISE_CONV_2D": "DepthwiseConv2DOptions",
    "FULLY_CONNECTED": "FullyConnectedOptions",
    "GELU": "GeluOptions",
    "MEAN": "ReducerOptions",
    "RESHAPE": "ReshapeOptions",
    "SLICE": "SliceOptions",
    "SOFTMAX": "SoftmaxOptions",
    "SPLIT": "SplitOptions",
    "SUM": "ReducerOptions",
    "TRANSPOSE": "TransposeOptions",
}

Shape = tuple[int, ...]


class ModelFile:
    """A file of signatures; `runtime` ends it. Weights go to the file as they come, so that none is held twice.

    Attributes:
        num_bytes: of weights so far.

    Raises:
        UserError: no room where temporary files go.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._buffers: list[Any] = [schema.BufferT()]
        self._codes: dict[str, int] = {}
        self._versions: list[Any] = []
        self._signatures: list[Signature] = []
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="blip2-", ignore_cleanup_errors=True)
            self._file = (Path(self._folder.name) / "model.tflite").open("wb")
            self._file.seek(RESERVED)
        except OSError as error:
            raise _no_room(error.strerror) from None

    def signature(self, name: str) -> "Signature":
        """A new one."""
        self._signatures.append(Signature(self, name))
        return self._signatures[-1]

    def buffer(self, array: np.ndarray) -> int:
        """The place among the buffers of numbers that do not change."""
        buffer = schema.BufferT()
        self._buffers.append(buffer)
        if array.nbytes <= SMALL:
            buffer.data = np.frombuffer(array.tobytes(), np.uint8)
            return len(self._buffers) - 1
        try:
            self._file.write(bytes(-self._file.tell() % ALIGNED))
            buffer.offset, buffer.size = self._file.tell(), array.nbytes
            self.num_bytes += array.nbytes
            self._file.write(np.ascontiguousarray(array).data)
        except OSError as error:
            raise _no_room(error.strerror) from None
        return len(self._buffers) - 1

    def code(self, kind: str) -> int:
        """The place among the operations that the file uses."""
        if kind not in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, kind)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = FULLY_CONNECTED_VERSION if kind == "FULLY_CONNECTED" else 1
            self._codes[kind] = len(self._versions)
            self._versions.append(code)
        return self._codes[kind]

    def runtime(self) -> Runtime:
        """What runs it, with as many threads as PyTorch has now."""
        shapes = {signature.name: signature.shapes() for signature in self._signatures}
        model = schema.ModelT()
        model.version, model.description = 3, "blip2"
        model.subgraphs = [signature.subgraph() for signature in self._signatures]
        model.signatureDefs = [signature.definition(i) for i, signature in enumerate(self._signatures)]
        model.buffers, model.operatorCodes = self._buffers, self._versions
        builder = flatbuffers.Builder(SMALL)
        builder.Finish(model.Pack(builder), b"TFL3")
        description = builder.Output()
        if len(description) > RESERVED:
            raise UserError("This model has too many layers to be quantised on a CPU. Load it unquantised.")
        try:
            self._file.seek(0)
            self._file.write(description)
            self._file.close()
            if shutil.disk_usage(self._folder.name).free < MORE_ROOM * self.num_bytes:
                raise _no_room(f"{self._folder.name} has too little space")  # LiteRT would end the process
            with self._folder:
                return Runtime(Path(self._file.name), shapes)
        except OSError as error:
            raise _no_room(error.strerror) from None


class Signature:
    """Steps from rows to rows; a result is named by a number. All are (R, their width), unless it says otherwise."""

    def __init__(self, file: ModelFile, name: str) -> None:
        self.name = name
        self._file = file
        self._tensors: list[Any] = []
        self._shapes: list[Shape] = []
        self._operators: list[Any] = []
        self._inputs: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._given: dict[str, int] = {}  # inputs and outputs in their own shape
        self._results: dict[str, int] = {}
        self._widths: dict[str, int] = {}
        self._turned: dict[tuple[int, int, float], int] = {}

    def input(self, name: str, width: int, shape: Shape = ()) -> int:
        """Rows that are given, or numbers of another shape."""
        self._inputs[name], self._widths[name] = self._tensor((-1,)), width  # memory of the caller's has one dimension
        flat = self._inputs[name]
        self._given[name] = flat if shape == (-1,) else self.reshape(flat, shape or (-1, width))
        return self._given[name]

    def output(self, name: str, x: int) -> None:
        """Gives a result a name to be fetched by."""
        self.result(name, x)
        self._outputs[name], self._widths[name] = self.reshape(x, (-1,)), self._shapes[x][-1]

    def result(self, name: str, x: int) -> None:
        """Gives a result a name for signatures that include this one; it is not fetched."""
        self._results[name] = x

    def shapes(self) -> tuple[dict[str, int], dict[str, int]]:
        """The widths of inputs and outputs, by name."""
        given, taken = ({name: self._widths[name] for name in of} for of in (self._inputs, self._outputs))
        return given, taken

    def shape(self, x: int) -> Shape:
        """Of a result; -1 where it depends on how many rows there are."""
        return self._shapes[x]

    def include(self, other: "Signature", **given: int) -> dict[str, int]:
        """Does what another signature of the file does, with the same weights.

        Args:
            given: for each of its inputs, rows of this one.

        Returns:
            What it gives, by name.
        """
        places = {other._given[name]: x for name, x in given.items()} | {-1: -1}
        left_out = {*places, *other._outputs.values()}

        def place(there: int) -> int:
            if there not in places:
                tensor = copy.copy(other._tensors[there])
                if tensor.quantization is not None and tensor.quantization.details is not None:
                    tensor.quantization = copy.copy(tensor.quantization)
                    tensor.quantization.details = copy.copy(tensor.quantization.details)
                    tensor.quantization.details.scales = place(tensor.quantization.details.scales)
                places[there] = self._place(tensor, other._shapes[there])
            return places[there]

        for step in other._operators:
            if step.outputs[0] not in left_out:
                again = copy.copy(step)
                again.inputs, again.outputs = (
                    np.array([place(there) for there in ends], np.int32) for ends in (step.inputs, step.outputs)
                )
                self._operators.append(again)
        return {name: places[x] for name, x in other._results.items()}

    # Steps

    def product(self, x: int, *layers: Linear, relu: bool = False) -> int:
        """Through linear layers, whose results stand side by side."""
        kinds = [kind_of(layer) for layer in layers]
        largest = [float(layer.scale_and_zero.max()) for layer in layers if isinstance(layer, Int4Linear)]
        if len(set(kinds)) > 1 or (len(largest) > 1 and max(largest) > MUCH_LARGER * min(largest)):
            return self.side_by_side([self.product(x, layer, relu=relu) for layer in layers])
        bits, block = kinds[0]
        parts = [stored(layer, bits) for layer in layers]
        weight, scale = (torch.cat([one[i] for one in parts]) if len(parts) > 1 else parts[0][i] for i in range(2))
        power = 1.0
        if bits == 4:
            power = float(2.0 ** -torch.frexp(scale.max()).exponent)
            scale = (scale * power).clamp(min=LEAST_SCALE).half()
        bias = None
        if any(layer.bias is not None for layer in layers):
            biases = [torch.zeros(layer.out_features) if layer.bias is None else layer.bias.float() for layer in layers]
            bias = torch.cat(biases)
        x = self._turn(x, block, power)
        if scale.dim() > 1 and bits == 8:
            return self._product_in_parts(x, weight, scale, bias, relu=relu)
        at_once = max(1, LARGEST_WEIGHT * len(weight) // weight.nbytes)
        pieces = []
        for begin in range(0, len(weight), at_once):
            some = slice(begin, begin + at_once)
            bias_at = -1 if bias is None else self.constant(bias[some])
            weight_at = self._weight(weight[some], scale[some], bits)
            pieces.append(self._fully_connected(x, weight_at, len(weight[some]), bias_at, relu=relu))
        return pieces[0] if len(pieces) == 1 else self.side_by_side(pieces)

    def side_by_side(self, parts: list[int]) -> int:
        """Rows of several results, one after the other."""
        return self.step("CONCATENATION", parts, (-1, sum(self._shapes[part][-1] for part in parts)), axis=1)

    def add(self, x: int, y: int) -> int:
        """The sum."""
        return self.step("ADD", [x, y], self._shapes[x])

    def multiply(self, x: int, y: int) -> int:
        """Number by number."""
        return self.step("MUL", [x, y], self._shapes[x])

    def times(self, x: int, matrix: Tensor) -> int:
        """Rows times a matrix (width before, width after), in float32."""
        return self._fully_connected(x, self.constant(matrix.t().float()), matrix.shape[1])

    def silu(self, x: int) -> int:
        """x times its logistic function."""
        return self.multiply(x, self.logistic(x))

    def logistic(self, x: int, factor: float = 1.0) -> int:
        """The logistic function of x times a factor."""
        x = x if factor == 1 else self.multiply(x, self.constant(torch.tensor([factor])))
        return self.step("LOGISTIC", [x], self._shapes[x])

    def gelu(self, x: int, *, by_tanh: bool = False) -> int:
        """GELU, or its approximation by tanh."""
        return self.step("GELU", [x], self._shapes[x], approximate=by_tanh)

    def layer_norm(self, x: int, norm: nn.LayerNorm) -> int:
        """Normed over the width."""
        centred = self.step("SUB", [x, self._mean(x)], self._shapes[x])
        result = self._scaled(centred, norm.eps, norm.weight)
        return result if norm.bias is None else self.add(result, self.constant(norm.bias.float()))

    def rms_norm(self, x: int, norm: Any) -> int:
        """Divided by its root mean square, as Llama and T5 do it."""
        return self._scaled(x, norm.variance_epsilon, norm.weight)

    def constant(self, tensor: Tensor) -> int:
        """Numbers that do not change."""
        array = tensor.detach().contiguous().numpy()
        return self._tensor(array.shape, KINDS[array.dtype], self._file.buffer(array))

    def reshape(self, x: int, shape: Shape) -> int:
        """The same numbers; one size may be -1."""
        sizes = np.array(shape, np.int32)
        return self.step("RESHAPE", [x, self.constant(torch.from_numpy(sizes))], shape, newShape=sizes)

    def transpose(self, x: int, order: Shape, shape: Shape) -> int:
        """Dimensions in another order."""
        return self.step("TRANSPOSE", [x, self.constant(torch.tensor(order, dtype=torch.int32))], shape)

    def slice(self, x: int, begin: Shape, size: Shape) -> int:
        """What lies from somewhere on. XNNPACK takes it where all sizes are told."""
        told = [self.constant(torch.tensor(one, dtype=torch.int32)) for one in (begin, size)]
        return self.step("SLICE", [x, *told], size)

    def split(self, x: int, count: int) -> list[int]:
        """Rows in so many parts of the same width."""
        some = next((n for n in SPLITS if count % n == 0), count)
        axis, width = self.constant(torch.tensor(1, dtype=torch.int32)), self._shapes[x][1] // some
        parts = [self.step("SPLIT", [axis, x], (-1, width), numSplits=some)]
        parts += [self._tensor((-1, width)) for _ in range(some - 1)]
        self._operators[-1].outputs = np.array(parts, np.int32)
        return parts if some == count else [piece for part in parts for piece in self.split(part, count // some)]

    def sum(self, x: int, axis: int, *, keeps: bool = False) -> int:
        """Over an axis, which is left out or has size 1 then."""
        before, after = self._shapes[x][:axis], self._shapes[x][axis + 1 :]
        over = self.constant(torch.tensor([axis], dtype=torch.int32))
        return self.step("SUM", [x, over], (*before, 1, *after) if keeps else (*before, *after), keepDims=keeps)

    def step(self, kind: str, inputs: list[int], shape: Shape, **told: Any) -> int:
        """The result of any operation; -1 in its shape is what depends on how many rows there are."""
        operator, result = schema.OperatorT(), self._tensor(shape)
        operator.opcodeIndex = self._file.code(kind)
        operator.inputs, operator.outputs = np.array(inputs, np.int32), np.array([result], np.int32)
        if kind in OPTIONS:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, OPTIONS[kind])
            operator.builtinOptions = getattr(schema, OPTIONS[kind] + "T")()
            for name, value in told.items():
                setattr(operator.builtinOptions, name, value)
        self._operators.append(operator)
        return result

    # How it is stored

    def subgraph(self) -> Any:
        """As the schema has it."""
        graph = schema.SubGraphT()
        graph.name, graph.tensors, graph.operators = self.name, self._tensors, self._operators
        graph.inputs = np.array(list(self._inputs.values()), np.int32)
        graph.outputs = np.array(list(self._outputs.values()), np.int32)
        return graph

    def definition(self, place: int) -> Any:
        """Names of inputs and outputs, as the schema has them."""
        definition = schema.SignatureDefT()
        definition.signatureKey, definition.subgraphIndex = self.name, place
        definition.inputs, definition.outputs = _named(self._inputs), _named(self._outputs)
        return definition

    def _product_in_parts(self, x: int, weight: Tensor, scale: Tensor, bias: Tensor | None, *, relu: bool) -> int:
        """Of rows whose parts have scales of their own (N, P): the sum of a product for each."""
        count, result = scale.shape[1], -1
        pieces = zip(self.split(x, count), weight.chunk(count, dim=1), scale.unbind(dim=1), strict=True)
        for i, (inputs, part, one) in enumerate(pieces):
            bias_at = -1 if bias is None or i else self.constant(bias)
            weight_at = self._weight(part.contiguous(), one.contiguous(), 8)
            y = self._fully_connected(inputs, weight_at, len(weight), bias_at)
            result = self.add(result, y) if i else y
        return self.step("RELU", [result], self._shapes[result]) if relu else result

    def _turn(self, x: int, block: int, power: float) -> int:
        """x turned in blocks and divided by `power`, once for all that ask for it."""
        if block < 2:
            return x
        key = x, block, power
        if key not in self._turned:
            width = self._shapes[x][-1]
            rows = self.times(self.reshape(x, (-1, block)), hadamard(block) / power)
            self._turned[key] = self.reshape(rows, (-1, width))
        return self._turned[key]

    def _fully_connected(self, x: int, weight: int, width: int, bias: int = -1, *, relu: bool = False) -> int:
        kinds = schema.ActivationFunctionType
        told = {"asymmetricQuantizeInputs": True, "keepNumDims": True}
        activation = kinds.RELU if relu else kinds.NONE
        return self.step("FULLY_CONNECTED", [x, weight, bias], (-1, width), fusedActivationFunction=activation, **told)

    def _weight(self, weight: Tensor, scale: Tensor, bits: int) -> int:
        if bits == 32:
            return self.constant(weight)
        told = schema.QuantizationParametersT()
        if bits == 8:
            told.scale, told.zeroPoint = scale.numpy(), np.zeros(len(scale), np.int64)
            told.quantizedDimension = 0
            return self._tensor(tuple(weight.shape), schema.TensorType.INT8, self._file.buffer(weight.numpy()), told)
        groups, width = schema.BlockwiseQuantizationT(), 2 * weight.shape[1]
        groups.scales, groups.zeroPoints, groups.blockSize = self.constant(scale), -1, width // scale.shape[1]
        told.detailsType, told.details = schema.QuantizationDetails.BlockwiseQuantization, groups
        shape = len(weight), width
        return self._tensor(shape, schema.TensorType.INT4, self._file.buffer(weight.numpy()), told)

    def _scaled(self, x: int, epsilon: float, weight: Tensor | None) -> int:
        """Divided by the root of the mean square, and times a weight."""
        shape = self._shapes[x]
        square = self._mean(self.step("SQUARE", [x], shape))
        one = self._shapes[square]
        root = self.step("RSQRT", [self.step("ADD", [square, self.constant(torch.tensor([epsilon]))], one)], one)
        result = self.step("MUL", [x, root], shape)
        return result if weight is None else self.multiply(result, self.constant(weight.float()))

    def _mean(self, x: int) -> int:
        axis = self.constant(torch.tensor([len(self._shapes[x]) - 1], dtype=torch.int32))
        return self.step("MEAN", [x, axis], (*self._shapes[x][:-1], 1), keepDims=True)

    def _tensor(self, shape: Shape, kind: int = schema.TensorType.FLOAT32, buffer: int = 0, told: Any = None) -> int:
        tensor = schema.TensorT()
        tensor.type, tensor.buffer, tensor.quantization = kind, buffer, told
        tensor.hasRank, tensor.shape = True, np.array([max(size, 1) for size in shape], np.int32)
        if -1 in shape:
            tensor.shapeSignature = np.array(shape, np.int32)
        return self._place(tensor, shape)

    def _place(self, tensor: Any, shape: Shape) -> int:
        tensor.name = f"t{len(self._tensors)}"
        self._tensors.append(tensor)
        self._shapes.append(shape)
        return len(self._tensors) - 1


def _named(tensors: dict[str, int]) -> list[Any]:
    found = []
    for name, place in tensors.items():
        one = schema.TensorMapT()
        one.name, one.tensorIndex = name, place
        found.append(one)
    return found


def _no_room(reason: str | None) -> UserError:
    return UserError(
        f"Weights could not be laid out in a temporary file ({reason}). Up to three times what that part of the model "
        "has on disk is needed; the environment variable TMPDIR names another folder."
    )
