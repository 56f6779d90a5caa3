"""A linear layer with quantlab's codes, or a whole model, as an ExecuTorch file (.pte) that XNNPACK computes.

torch.export writes the graph; ExecuTorch's partitioner hands XNNPACK what it knows, and the runtime's own operators do
the rest. Codes go in by way of torchao's tensors. XNNPACK itself rounds x to int8, asymmetric, one scale a token.
"""

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.arguments import check_flag, check_int, check_kind, check_model, check_path
from quantlab.export.engines import engine
from quantlab.export.executorch_run import check_weight, executorch_session, expected_executorch, holds_codes
from quantlab.export.parts import check_close, float_bias, meant_logits, some_ids, some_inputs
from quantlab.export.torchao import to_torchao, torchao_model
from quantlab.files import write_whole
from quantlab.granularity import QTensor
from quantlab.modules import as_linear, check_linear

__all__ = [
    "executorch_session", "expected_executorch", "holds_codes", "save_executorch", "save_executorch_float",
    "save_executorch_model",
]  # fmt: skip


def save_executorch(q: QTensor, path, *, bias: Tensor | None = None, tokens: int = 512, verify: bool = False) -> int:
    """Write a layer whose weight has codes, x (tokens, in) -> y (tokens, out) floats; returns the file's size in bytes.

    q: symmetric signed codes of 8 bits with a scale a row, or of 4 bits with one a row, or a group, of 32, 64, 96 ..
    inputs (kept in bfloat16: values move by up to 2⁻⁹). The file takes 1 to `tokens` tokens, at least 2. verify: the
    file must hold the same codes, and ExecuTorch's answer must be expected_executorch's, within a hundredth of the
    largest, before it takes its place.

    Raises: ValueError if q or the bias does not fit, or verify finds a difference; ModuleNotFoundError if ExecuTorch
    is not here.
    """
    check_weight(q)
    bias, path = float_bias(bias, q.shape[0]), check_path(path)
    tokens, verify = check_int(tokens, "tokens", 2, 2**16), check_flag(verify, "verify")
    engine("executorch")
    layer = nn.Linear(q.shape[1], q.shape[0], device="meta")
    layer.weight = nn.Parameter(to_torchao(q, activations="int8"), requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    content = _lowered(layer, torch.zeros(tokens, q.shape[1]), dim=0)
    return write_whole(path, content, partial(_check_layer, q, bias) if verify else None)


def save_executorch_float(layer: nn.Linear, path, *, tokens: int = 512) -> int:
    """Write a layer as it is, in float32, to set others beside: x (tokens, in) -> y; returns the file's size in bytes.

    Raises: ValueError if it is no linear layer; ModuleNotFoundError if ExecuTorch is not here.
    """
    layer, path, tokens = as_linear(check_linear(layer)), check_path(path), check_int(tokens, "tokens", 2, 2**16)
    engine("executorch")
    return write_whole(path, _lowered(copy.deepcopy(layer).float(), torch.zeros(tokens, layer.in_features), dim=0))


def save_executorch_model(
    model, path, *, qtensors: Mapping | None = None, tokens: int = 512, verify: bool = False
) -> int:  # fmt: skip
    """Write a language model, ids (1, tokens) int64 -> logits (1, tokens, vocabulary); returns its size in bytes.

    qtensors: codes of its linear layers, as quantize_weights and the report of quantize_lm have them, of a kind that
    save_executorch takes; None leaves all in float32. The file takes 2 to `tokens` tokens, at least 12. verify: the
    file must hold the codes, and the logits of twelve tokens must be those of the codes' values, within a thousandth of
    the largest in float32 and a tenth with codes, in front of which x is rounded, before it takes its place.

    Raises: ValueError if a name is no linear layer, its codes do not fit, or verify finds a difference;
    ModuleNotFoundError if ExecuTorch is not here.
    """
    codes = check_kind({} if qtensors is None else qtensors, "qtensors", Mapping, "the report of quantize_lm has")
    for q in codes.values():
        check_weight(q)
    check_model(model)
    path, tokens, verify = check_path(path), check_int(tokens, "tokens", 12, 2**16), check_flag(verify, "verify")
    engine("executorch")
    whole = torchao_model(model, codes, activations="int8").eval()
    content = _lowered(_Logits(whole), some_ids(model).repeat(1, tokens)[:, :tokens], dim=1)
    return write_whole(path, content, partial(_check_model, model, codes) if verify else None)


class _Logits(nn.Module):
    """A language model as a function of its tokens alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def _lowered(module: nn.Module, x: Tensor, *, dim: int) -> bytes:
    """The module as a .pte file for inputs like x, or shorter along dim."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    sizes = ({dim: torch.export.Dim("tokens", min=1 if dim == 0 else 2, max=x.shape[dim])},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and ExecuTorch's, about their own insides
        program = torch.export.export(module, (x,), dynamic_shapes=sizes)
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return bytes(lowered.to_executorch().buffer)


def _check_layer(q: QTensor, bias: Tensor, path: Path) -> None:
    x = some_inputs(2, q.shape[1], 1.0)
    y = expected_executorch(q, x, bias=bias)
    _check_holds(path, {"the layer": q})
    check_close(executorch_session(path)(x), y, 0.01 * y.abs().max().item(), "ExecuTorch")


def _check_model(model, codes: Mapping, path: Path) -> None:
    ids = some_ids(model)
    logits = meant_logits(model, codes, ids)
    _check_holds(path, codes)
    allowed = (0.1 if codes else 0.001) * logits.abs().max().item()
    check_close(executorch_session(path)(ids), logits, allowed, "ExecuTorch")


def _check_holds(path: Path, codes: Mapping) -> None:
    """ValueError unless a file holds the codes of each of these layers."""
    missing = [name for name, q in codes.items() if not holds_codes(path, q)]
    if missing:
        raise ValueError(f"the file holds other codes of {missing[0]} than were written; nothing was saved")
