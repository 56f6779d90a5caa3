"""A LiteRT file (.tflite) put together tensor by tensor with the schema that ai-edge-litert ships, and read again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from quantlab.export.engines import engine
from quantlab.files import write_whole

KINDS = {"float32": "FLOAT32", "int8": "INT8", "int32": "INT32", "int4": "INT4", "float16": "FLOAT16"}


class Graph:
    """A model of one subgraph. tensor() and op() add to it, save() writes it."""

    def __init__(self):
        engine("ai_edge_litert")
        from ai_edge_litert import schema_py_generated as schema

        self.schema, self.model, self.sub = schema, schema.ModelT(), schema.SubGraphT()
        self.model.version, self.model.description = 3, "quantlab"
        self.model.operatorCodes, self.model.buffers = [], [schema.BufferT()]  # buffer 0 is empty: no constant
        self.model.subgraphs, self.sub.tensors, self.sub.operators = [self.sub], [], []

    def tensor(self, name: str, shape, kind: str = "float32", data=None, **quantization) -> int:
        """Add a tensor, a constant if it has data (numpy); returns its number. quantization: see _quantization."""
        t = self.schema.TensorT()
        t.name, t.shape, t.type, t.buffer = name, list(shape), getattr(self.schema.TensorType, KINDS[kind]), 0
        if data is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            t.buffer = len(self.model.buffers) - 1
        if quantization:
            t.quantization = self._quantization(**quantization)
        self.sub.tensors.append(t)
        return len(self.sub.tensors) - 1

    def _quantization(self, scale: Tensor | None = None, zero: int = 0, block: int | None = None, scales: int = -1):
        """Scales along the first dimension, with one zero point; or blocks, whose scales are tensor number `scales`."""
        q = self.schema.QuantizationParametersT()
        if block is None:
            q.scale, q.zeroPoint = scale.flatten().numpy(), np.full(scale.numel(), zero, np.int64)
            q.quantizedDimension = 0
        else:
            q.details, q.detailsType = (
                self.schema.BlockwiseQuantizationT(),
                self.schema.QuantizationDetails.BlockwiseQuantization,
            )
            q.details.blockSize, q.details.scales, q.details.zeroPoints = block, scales, -1
        return q

    def op(self, name: str, inputs: list[int], output: int) -> None:
        """Add an operator by the schema's name."""
        code, op = self.schema.OperatorCodeT(), self.schema.OperatorT()
        code.builtinCode = getattr(self.schema.BuiltinOperator, name)
        code.deprecatedBuiltinCode, code.version = min(code.builtinCode, 127), 1
        self.model.operatorCodes.append(code)
        op.opcodeIndex, op.inputs, op.outputs = len(self.model.operatorCodes) - 1, inputs, [output]
        if name == "FULLY_CONNECTED":
            op.builtinOptions = self.schema.FullyConnectedOptionsT()
            op.builtinOptionsType = self.schema.BuiltinOptions.FullyConnectedOptions
        self.sub.operators.append(op)

    def save(self, x: int, y: int, path, check: Callable[[Path], None] | None = None) -> int:
        """Write the file, whole or not at all; returns its size. check(path) may raise before it takes its place."""
        import flatbuffers

        self.sub.inputs, self.sub.outputs = [x], [y]
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return write_whole(path, bytes(builder.Output()), check)
