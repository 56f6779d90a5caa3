"""LiteRT files read and run: the codes in them, and LiteRT's own answers."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantlab.arguments import check_file, check_real
from quantlab.export.engines import engine
from quantlab.export.parts import check_close, check_same_codes
from quantlab.packing import unpack


def litert_session(path):
    """A function x (tokens, in) -> y (tokens, out), float32 tensors, by LiteRT's interpreter on one thread.

    tokens is what the file was written for. Raises: FileNotFoundError if there is no file, ModuleNotFoundError if
    ai-edge-litert is not here; the function ValueError if x has another shape or dtype.
    """
    data = _bytes(path)
    engine("ai_edge_litert")
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=data, num_threads=1)
    interpreter.allocate_tensors()
    first, last = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def run(x: Tensor) -> Tensor:
        if tuple(check_real(x).shape) != tuple(first["shape"]) or x.dtype != torch.float32:
            raise ValueError(
                f"x must be float32 {tuple(map(int, first['shape']))}, got {x.dtype} {tuple(x.shape)}; a file has one "
                "number of tokens"
            )
        interpreter.set_tensor(first["index"], x.detach().numpy())
        interpreter.invoke()
        return torch.from_numpy(interpreter.get_tensor(last["index"]).copy())

    return run


def weight_codes(path) -> Tensor:
    """The integer codes (out, in) of the weight in a file of one fully connected layer, int8.

    Raises: ValueError if the file holds no such layer; ModuleNotFoundError if ai-edge-litert is not here.
    """
    data = _bytes(path)
    engine("ai_edge_litert")
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    tensors = model.subgraphs[0].tensors
    found = [t for t in tensors if t.name == b"w"]
    if not found:
        raise ValueError(f"{path} holds no weight named w; save_litert_int8 and save_litert_weights write one")
    raw, shape = torch.from_numpy(np.array(model.buffers[found[0].buffer].data, np.uint8)), tuple(found[0].shape)
    if found[0].type == schema.TensorType.INT4:
        raw = (unpack(raw, bits=4, count=shape[0] * shape[1]) ^ 8).to(torch.int8) - 8  # with a sign again
    return raw.view(torch.int8).reshape(shape)


def check_layer(path: Path, codes: Tensor, x: Tensor, y: Tensor, allowed: float) -> None:
    """ValueError unless a file holds these codes (out, in), and LiteRT answers x by y, as far apart as is allowed."""
    check_same_codes(weight_codes(path), codes)
    check_close(litert_session(path)(x), y, allowed, "LiteRT")


def _bytes(path) -> bytes:
    data = check_file(path).read_bytes()
    if data[4:8] != b"TFL3":
        raise ValueError(f"{path} is no LiteRT file: bytes 4 to 8 of one are TFL3")
    return data
