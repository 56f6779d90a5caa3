"""quantlab's codes in torchao's tensors and back: a layer, or a model, that torchao computes with."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantlab.affine import QParams
from quantlab.arguments import check_choice, check_flag, check_int, check_kind, check_model, kind
from quantlab.blocks import PerAxis, PerGroup
from quantlab.export.engines import engine
from quantlab.granularity import QTensor, code_range
from quantlab.modules import check_codes_fit, check_linear, linears_in, weight_of

__all__ = ["from_torchao", "quantized_by_torchao", "to_torchao", "torchao_model"]

ACTIVATIONS = {"float": None, "int8": "int8_asym_per_token"}  # torchao's words


def to_torchao(q: QTensor, *, activations: str = "float") -> Tensor:
    """torchao's IntxUnpackedToInt8Tensor (out, in) with q's codes, scales and zero points as they are.

    It stands for the weight of an nn.Linear: F.linear computes with it. Each code takes a byte, whatever its bits are.
    activations: "int8" has torchao round the inputs as well, asymmetric, one scale a token.

    Raises: ValueError if q is no matrix of signed codes with one scale a row, or groups that divide the inputs, in the
    order of the columns; ModuleNotFoundError if torchao is not here.
    """
    how, activations = _check_fits(q), check_choice(activations, "activations", ACTIVATIONS)
    engine("torchao")
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block = (1, q.shape[1] if how == PerAxis(0) else how.group_size)
    scale, zero = q.qparams.scale.to(q.dtype), q.qparams.zero_point.to(torch.int8)
    if not torch.equal(scale.float(), q.qparams.scale):
        raise ValueError(f"torchao keeps scales in the weight's dtype, and {q.dtype} would round them; pass float32")
    return IntxUnpackedToInt8Tensor(
        q.codes, scale, zero, getattr(torch, f"int{q.bits}"), block, q.dtype, ACTIVATIONS[activations]
    )


def from_torchao(weight: Tensor) -> QTensor:
    """The QTensor of a weight of torchao: of an IntxUnpackedToInt8Tensor, or of an Int8Tensor with scales of rows.

    symmetric says whether all zero points are 0. A weight that also rounds activations gives its codes alike.

    Raises: ValueError for another kind of tensor, or blocks of several rows; ModuleNotFoundError if torchao is not
    here.
    """
    engine("torchao")
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    if not isinstance(weight, IntxUnpackedToInt8Tensor | Int8Tensor):
        raise ValueError(f"weight must be an IntxUnpackedToInt8Tensor or an Int8Tensor of torchao, got {kind(weight)}")
    codes, scale, block = weight.qdata, weight.scale.float(), tuple(weight.block_size)
    if codes.ndim != 2 or block[0] != 1:
        raise ValueError(
            f"need a matrix whose scales are of rows or groups, got blocks {block} of {tuple(codes.shape)}"
        )
    bits = int(str(getattr(weight, "target_dtype", torch.int8)).removeprefix("torch.int"))
    zero = torch.zeros_like(scale) if weight.zero_point is None else weight.zero_point
    how = PerAxis(0) if block[1] == codes.shape[1] else PerGroup(block[1])
    qp = QParams(scale.view(len(codes), -1), zero.to(torch.int32).view(len(codes), -1), *code_range(bits))
    return QTensor(codes, qp, bits, how, not bool(zero.any()), weight.dtype)


def quantized_by_torchao(
    layer: nn.Module, *, bits: int = 8, group_size: int | None = None, symmetric: bool = True
) -> nn.Linear:
    """A copy of a linear layer as torchao's own quantize_ leaves it: weights rounded to nearest, inputs in floats.

    from_torchao(its weight) has quantize_tensor's codes and scales where the grid is symmetric; with zero points, its
    scales may differ in the last digit, and a code with them next to a tie.

    Raises: ValueError if bits is not 2..8 or group_size does not divide the inputs; ModuleNotFoundError if torchao is
    not here.
    """
    weight, bits = weight_of(check_linear(layer)), check_int(bits, "bits", 2, 8)
    size = None if group_size is None else check_int(group_size, "group_size", 1)
    if size is not None and weight.shape[1] % size:
        raise ValueError(f"group_size {size} does not divide {weight.shape[1]} inputs")
    engine("torchao")
    from torchao.quantization import IntxWeightOnlyConfig, granularity, quantize_
    from torchao.quantization.quant_primitives import MappingType

    mapping = MappingType.SYMMETRIC if check_flag(symmetric, "symmetric") else MappingType.ASYMMETRIC
    how = granularity.PerAxis(0) if size is None else granularity.PerGroup(size)
    new = nn.Sequential(_linear(weight.clone(), layer.bias))
    quantize_(new, IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), how, mapping))
    return new[0]


def torchao_model(model, qtensors: Mapping, *, activations: str = "float"):
    """A copy of a model whose linear layers have quantlab's codes in torchao's tensors (see to_torchao).

    qtensors: what quantize_weights gave, or the report of quantize_lm has; the other layers stay as they are.

    Raises: ValueError if a name is no linear layer of the model, or its codes do not fit; ModuleNotFoundError if
    torchao is not here.
    """
    new = copy.deepcopy(check_model(model))
    layers = linears_in(new)
    for name, q in check_kind(qtensors, "qtensors", Mapping, "the report of quantize_lm has").items():
        if not isinstance(layers.get(name), nn.Linear):
            raise ValueError(f"the model has no nn.Linear {name!r}; linear_layers(model) lists its layers")
        check_codes_fit(name, check_kind(q, name, QTensor), layers[name].weight)
        layers[name].weight = nn.Parameter(to_torchao(q, activations=activations), requires_grad=False)
    return new


def _check_fits(q: QTensor):
    """The granularity of q; ValueError that names the rule if torchao has no such tensor."""
    how = check_kind(q, "q", QTensor, "quantize_tensor gives").granularity
    grouped = isinstance(how, PerGroup) and not q.shape[-1] % how.group_size
    if len(q.shape) != 2 or q.group_index is not None or not (how == PerAxis(0) or grouped):
        raise ValueError(
            "torchao takes a matrix with one scale a row, or groups that divide the inputs, in the order of the "
            f"columns; got {tuple(q.shape)}, {how}{', act-order' if q.group_index is not None else ''}"
        )
    if q.codes.dtype != torch.int8 or q.qparams.qmin != -(2 ** (q.bits - 1)):
        raise ValueError(f"torchao takes signed codes, got {q.qparams.qmin}..{q.qparams.qmax}; pass signed=True")
    return how


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return new.eval()
