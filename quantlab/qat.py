"""Training with quantization in the loop: fake-quantized layers, learned steps, three values and two.

A layer keeps a float weight and computes with its quantized values; the gradient passes the rounding as if it were not
there (straight-through estimator, STE) and moves the float weight. convert() keeps the quantized values alone.
"""

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.affine import check_int, check_real, choose_qparams, fake_quantize
from quantlab.codebook import CodebookTensor
from quantlab.granularity import (
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    QTensor,
    code_range,
    from_blocks,
    quantize_tensor,
    to_blocks,
)
from quantlab.linear import DynamicInt8Linear, Int8Linear, StaticInt8Linear
from quantlab.lm import linear_layers, weight_of
from quantlab.lm.layers import put_weight

TINY = torch.finfo(torch.float32).tiny  # the least scale, so that 1 / scale stays finite


# --- weights: how they are rounded ------------------------------------------------------------------------------


class MinMaxRounding(nn.Module):
    """Rounds to the grid that quantize_tensor lays over the minimum and maximum of each block, anew in each call.

    The gradient of the rounded weight is 1 where the code lies in qmin..qmax and 0 where it was clamped. The range is
    taken as a constant: no gradient flows into the minimum and maximum through the scale.

    Raises: ValueError if bits is not 1..8 (2..8 if symmetric).
    """

    def __init__(self, *, bits: int, granularity: Granularity, symmetric: bool = False):
        super().__init__()
        self.qmin, self.qmax = code_range(bits, symmetric=symmetric)
        self.bits, self.granularity, self.symmetric = bits, granularity, symmetric

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight as floats, with the straight-through gradient."""
        blocks = to_blocks(weight, self.granularity)
        low, high = torch.aminmax(blocks.detach(), dim=1, keepdim=True)
        qp = choose_qparams(low, high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric)
        return from_blocks(fake_quantize(blocks, qp), self.granularity, weight.shape)

    def quantized(self, weight: Tensor) -> QTensor:
        """The same values as codes and scales."""
        return quantize_tensor(weight, bits=self.bits, granularity=self.granularity, symmetric=self.symmetric)


class LSQ(nn.Module):
    """Learned step size: the scale of each block is a parameter with a gradient of its own (Esser et al. 2020).

        v̂ = s * round(clamp(v / s, qmin, qmax))      qmin = -2**(bits-1), qmax = 2**(bits-1) - 1
        ∂v̂/∂s = round(v / s) - v / s  inside, qmin or qmax where clamped                       eq. 3
        ∂v̂/∂v = 1  inside, 0 where clamped                                                     eq. 5

    The gradient of s is multiplied by g = 1 / sqrt(N qmax), N the weights that share it (sec. 2.2), and s starts at
    2 mean|v| / sqrt(qmax) (sec. 2.1).

    What is inside? mask="value", the paper: qmin < v / s < qmax. mask="code", torch's
    _fake_quantize_learnable_per_tensor_affine: qmin <= round(v / s) <= qmax. They differ in the half step beyond each
    end, and at the end itself. There the paper calls v clamped (∂v̂/∂s = qmax), torch calls it rounded (-0.5..0): two
    gradients of opposite sign from one value.

    x is the tensor to start from; per tensor, axis or group of it. A step that training drives below zero counts by
    its magnitude. Raises: ValueError if bits is not 2..8, x is not finite, or mask is another word.

    >>> lsq = LSQ(torch.tensor([-1.0, 0.25, 0.75, 4.0]), bits=2)
    >>> lsq.step.item(), lsq(torch.tensor([-1.0, 0.25, 0.75, 4.0])).tolist()
    (3.0, [-0.0, 0.0, 0.0, 3.0])
    """

    def __init__(self, x: Tensor, *, bits: int, granularity: Granularity | None = None, mask: str = "value"):
        super().__init__()
        check_real(x)
        self.bits, self.granularity, self.mask = bits, granularity or PerTensor(), mask
        self.qmin, self.qmax = code_range(bits, symmetric=True)
        if mask not in ("value", "code"):
            raise ValueError(f'mask must be "value" (the paper) or "code" (torch), got {mask!r}')
        start = 2 * _mean_magnitude(x.detach(), self.granularity) / math.sqrt(self.qmax)
        keep = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.step = nn.Parameter(start.clamp(min=TINY).to(keep))
        sharing = _counts(x, self.granularity)
        self.register_buffer("gradient_scale", (sharing * self.qmax).rsqrt().to(keep))

    @property
    def scale(self) -> Tensor:
        """The steps in use, > 0, (blocks, 1)."""
        return self.step.abs().clamp(min=TINY)

    def forward(self, x: Tensor) -> Tensor:
        """x on the learned grid, as floats; gradients for x and for the steps."""
        blocks = self._blocks(x)
        ends = (self.qmin, self.qmax, self.mask == "code")
        rounded = _LearnedStep.apply(blocks, self.scale, self.gradient_scale, *ends)
        return from_blocks(rounded, self.granularity, x.shape)

    def quantized(self, x: Tensor) -> QTensor:
        """The same values as codes and scales."""
        scale = self.scale.detach().float()
        codes = torch.round(self._blocks(x.detach()) * (1 / scale)).clamp(self.qmin, self.qmax)
        return _symmetric_qtensor(x, codes, scale, self.bits, self.granularity)

    def _blocks(self, x: Tensor) -> Tensor:
        check_real(x)
        blocks = to_blocks(x, self.granularity)
        if len(blocks) != len(self.step):
            raise ValueError(f"there are {len(self.step)} steps, and x has {len(blocks)} blocks")
        return blocks


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, gradient_scale, qmin, qmax, by_code):
        ratio = x * (1 / scale).to(x.dtype)
        codes = torch.round(ratio)
        if by_code:
            low, high = codes < qmin, codes > qmax
        else:
            low, high = ratio <= qmin, ratio >= qmax
        inside = ~(low | high)
        ctx.save_for_backward(
            inside, torch.where(inside, codes - ratio, qmin * low + qmax * high), gradient_scale
        )
        return (scale * codes.clamp(qmin, qmax)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inside, of_scale, gradient_scale = ctx.saved_tensors
        into_scale = (grad * of_scale).sum(1, keepdim=True) * gradient_scale
        return grad * inside, into_scale, None, None, None, None


def ternary(x: Tensor, granularity: Granularity | None = None) -> Tensor:
    """x with three values in each block, -s, 0 and s, as floats (default: one s for the tensor).

        s = mean |x|      x̂ = s * clamp(round(x / s), -1, 1)      BitNet b1.58, Ma et al. 2024, eq. 1-3

    The gradient passes unchanged everywhere, as there: nothing is masked, and none flows through s.

    Raises: ValueError if x is not floating point, is empty or holds NaN or infinity.

    >>> ternary(torch.tensor([0.1, -0.9, 0.4, 1.0])).tolist()
    [0.0, -0.6000000238418579, 0.6000000238418579, 0.6000000238418579]
    """
    granularity = granularity or PerTensor()
    codes, scale = _ternary_codes(x.detach() if isinstance(x, Tensor) else x, granularity)
    return _PassThrough.apply(x, from_blocks(scale * codes, granularity, x.shape).to(x.dtype))


def quantize_ternary(x: Tensor, granularity: Granularity | None = None) -> QTensor:
    """The values of ternary(x) as codes -1, 0, 1 and scales. nbytes counts 2 bits a code, as they are stored.

    Five codes fit a byte (pack_ternary, 1.6 bits); the least possible is log2(3) = 1.585 bits if all are as frequent.

    >>> quantize_ternary(torch.tensor([0.1, -0.9, 0.4, 1.0])).codes.tolist()
    [0, -1, 1, 1]
    """
    granularity = granularity or PerTensor()
    codes, scale = _ternary_codes(x.detach() if isinstance(x, Tensor) else x, granularity)
    return _symmetric_qtensor(x, codes, scale, 2, granularity)


def _ternary_codes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    check_real(x)
    scale = _mean_magnitude(x, granularity).clamp(min=TINY).float()
    return torch.round(to_blocks(x, granularity).float() * (1 / scale)).clamp(-1, 1), scale


def pack_ternary(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 at five in a byte, 1.6 bits each: byte = Σ (code_i + 1) 3**i, uint8; the last is filled up.

    >>> pack_ternary(torch.tensor([-1, 0, 1, 1, 0, 1])).tolist()      # 0 + 3 + 18 + 54 + 81, 2 + 3 + 9 + 27 + 81
    [156, 122]
    """
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers, got {getattr(codes, 'dtype', type(codes).__name__)}")
    digits = codes.reshape(-1).to(torch.int64)
    if digits.numel() and digits.abs().max() > 1:
        raise ValueError(f"ternary codes are -1, 0 and 1, got {digits.min().item()}..{digits.max().item()}")
    digits = F.pad(digits, (0, -len(digits) % 5)).view(-1, 5) + 1
    return (digits * 3 ** torch.arange(5, device=codes.device)).sum(1).to(torch.uint8)


def unpack_ternary(packed: Tensor, *, count: int) -> Tensor:
    """The first `count` codes of pack_ternary, int8, (count,).

    >>> unpack_ternary(torch.tensor([156, 122], dtype=torch.uint8), count=6).tolist()
    [-1, 0, 1, 1, 0, 1]
    """
    if not isinstance(packed, Tensor) or packed.dtype != torch.uint8:
        raise ValueError(f"packed must be uint8, got {getattr(packed, 'dtype', type(packed).__name__)}")
    if packed.numel() and packed.max() > 242:
        raise ValueError(f"five ternary codes make 0..242, got {packed.max().item()}")
    check_int(count, "count", 0, 5 * packed.numel())
    digits = packed.reshape(-1, 1).to(torch.int64) // 3 ** torch.arange(5, device=packed.device) % 3
    return (digits - 1).to(torch.int8).view(-1)[:count]


def binary(x: Tensor, granularity: Granularity | None = None) -> Tensor:
    """x with two values in each block, -s and s, as floats (default: one s for the tensor).

        s = mean |x|      x̂ = s * sign(x), sign(0) = +1      XNOR-Net, Rastegari et al. 2016, eq. 6

    This s has the least ‖x - x̂‖. The gradient passes unchanged everywhere: nothing is masked, none flows through s.

    Raises: ValueError if x is not floating point, is empty or holds NaN or infinity.

    >>> binary(torch.tensor([0.0, -0.5, 1.0])).tolist()
    [0.5, -0.5, 0.5]
    """
    granularity = granularity or PerTensor()
    check_real(x)
    scale = _mean_magnitude(x.detach(), granularity).float()
    value = torch.where(to_blocks(x.detach(), granularity) < 0, -scale, scale)
    return _PassThrough.apply(x, from_blocks(value, granularity, x.shape).to(x.dtype))


def quantize_binary(x: Tensor, granularity: Granularity | None = None) -> CodebookTensor:
    """The values of binary(x) as one bit each and a scale a block.

    Two values without a 0 between them are no affine grid with an integer zero_point, so this is a codebook of -1 and
    1, in blocks of the flattened tensor. Raises: ValueError if a group does not divide the last dimension, or an axis
    other than the first is kept.

    >>> q = quantize_binary(torch.tensor([[0.0, -0.5, 1.0, 4.5]]), PerGroup(2))
    >>> q.codes.tolist(), q.absmax.tolist()
    ([[1, 0, 1, 1]], [0.25, 2.75])
    """
    granularity = granularity or PerTensor()
    check_real(x)
    size = to_blocks(x.detach(), granularity).shape[1]
    if isinstance(granularity, PerGroup) and x.shape[-1] % size:
        raise ValueError(
            f"binary blocks run on over the rows: group_size must divide {x.shape[-1]}, got {granularity.group_size}"
        )
    if isinstance(granularity, PerAxis) and granularity.axis % x.ndim:
        raise ValueError(f"binary blocks are rows: PerAxis(0), got {granularity}")
    scale = _mean_magnitude(x.detach(), granularity).float().flatten()
    levels = torch.tensor([-1.0, 1.0], device=x.device)
    return CodebookTensor((x.detach() >= 0).to(torch.uint8), scale, levels, size, x.dtype)


class _PassThrough(torch.autograd.Function):
    """The given value; the gradient of x is that of the result."""

    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class TernaryRounding(nn.Module):
    """ternary() as a rounding of weights."""

    def __init__(self, granularity: Granularity):
        super().__init__()
        self.granularity = granularity

    def forward(self, weight: Tensor) -> Tensor:
        return ternary(weight, self.granularity)

    def quantized(self, weight: Tensor) -> QTensor:
        return quantize_ternary(weight, self.granularity)


class BinaryRounding(nn.Module):
    """binary() as a rounding of weights."""

    def __init__(self, weight: Tensor, granularity: Granularity):
        super().__init__()
        quantize_binary(weight, granularity)  # a granularity that cannot be stored is refused before training
        self.granularity = granularity

    def forward(self, weight: Tensor) -> Tensor:
        return binary(weight, self.granularity)

    def quantized(self, weight: Tensor) -> CodebookTensor:
        return quantize_binary(weight, self.granularity)


def _counts(x: Tensor, granularity: Granularity) -> Tensor:
    """How many elements each block has, (blocks, 1); a short last group counts only its own."""
    return to_blocks(torch.ones(x.shape, dtype=torch.float64, device=x.device), granularity).sum(
        1, keepdim=True
    )


def _mean_magnitude(x: Tensor, granularity: Granularity) -> Tensor:
    """mean |x| of each block, (blocks, 1), float64."""
    return to_blocks(x.double().abs(), granularity).sum(1, keepdim=True) / _counts(x, granularity)


def _symmetric_qtensor(
    x: Tensor, codes: Tensor, scale: Tensor, bits: int, granularity: Granularity
) -> QTensor:
    """Codes and scales of blocks as the QTensor of x: zero_point 0, and shapes as quantize_tensor has them."""
    q = quantize_tensor(x.detach(), bits=bits, granularity=granularity)
    qp = replace(q.qparams, scale=scale.reshape(q.qparams.scale.shape))
    return replace(q, codes=from_blocks(codes, granularity, x.shape).to(torch.int8), qparams=qp)


# --- activations: how they are rounded --------------------------------------------------------------------------


class DynamicInput(nn.Module):
    """Rounds an input on a grid from its own range: per "tensor", asymmetric, or per "token", symmetric."""

    def __init__(self, per: str, bits: int = 8):
        super().__init__()
        self.per, self.bits = per, check_int(bits, "activation_bits", 2, 8)

    def forward(self, x: Tensor) -> Tensor:
        token = self.per == "token"
        low, high = torch.aminmax(x.detach(), dim=-1, keepdim=True) if token else torch.aminmax(x.detach())
        return fake_quantize(x, choose_qparams(low, high, qmin=0, qmax=2**self.bits - 1, symmetric=token))


class StaticInput(nn.Module):
    """Rounds an input on the grid of a range that an observer has seen; beyond it, it clamps: the gradient is 0."""

    def __init__(self, observer, bits: int = 8):
        super().__init__()
        self.bits = check_int(bits, "activation_bits", 2, 8)
        low, high = observer.min_max()
        choose_qparams(low, high, qmin=0, qmax=1)  # a range that is none is refused here
        self.register_buffer("low", low.detach().clone())
        self.register_buffer("high", high.detach().clone())

    def min_max(self) -> tuple[Tensor, Tensor]:
        """The range, as an observer gives it."""
        return self.low, self.high

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, choose_qparams(self.low, self.high, qmin=0, qmax=2**self.bits - 1))


# --- the layer and the model ------------------------------------------------------------------------------------


class FakeQuantLinear(nn.Module):
    """A linear layer that trains a float weight and computes with its rounded values.

        y = x̂ Ŵᵀ + b      Ŵ = rounding(weight), x̂ = input_rounding(x), both with straight-through gradients

    weight is the float (master) weight, (out, in), also where the layer was GPT-2's Conv1D.
    """

    def __init__(self, linear: nn.Module, rounding: nn.Module, input_rounding: nn.Module | None = None):
        super().__init__()
        _check_linear(linear)
        self.weight = nn.Parameter(weight_of(linear).clone().contiguous())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().clone())
        self.rounding, self.input_rounding = rounding, input_rounding
        self.out_features, self.in_features = self.weight.shape
        # What convert() puts back: the same kind of layer, without memory of its own. A tuple, so no submodule.
        self._kind = (copy.deepcopy(linear).to("meta").requires_grad_(False),)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        bits: int | None = None,
        group_size: int | str | None = 128,
        symmetric: bool | None = None,
        method: str | Callable = "minmax",
        activations=None,
        activation_bits: int = 8,
    ) -> "FakeQuantLinear":
        """A new layer with a copy of linear's weight; linear is not changed. The settings are those of prepare_qat."""
        _check_linear(linear)
        rounding = _rounding(weight_of(linear), bits, group_size, symmetric, method)
        return cls(linear, rounding, _input_rounding(activations, activation_bits))

    def quantized_weight(self) -> Tensor:
        """The weight that forward() computes with, (out, in), with its straight-through gradient."""
        return self.rounding(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_rounding is not None:
            x = self.input_rounding(x)
        return F.linear(x, self.quantized_weight(), self.bias)

    def converted(self) -> tuple[nn.Module, QTensor | CodebookTensor | Int8Linear]:
        """(layer, quantized weight): a float layer that holds the quantized values, or an integer layer twice."""
        if self.input_rounding is not None:
            layer = self._integer_layer()
            return layer, layer
        layer, q = self._float_layer(), self.rounding.quantized(self.weight.detach())
        put_weight(layer, q.dequantize())
        return layer, q

    def _float_layer(self) -> nn.Module:
        """A layer of the kind it was made from, with the master weight and the bias."""
        layer = copy.deepcopy(self._kind[0]).to_empty(device=self.weight.device)
        put_weight(layer, self.weight.detach())
        if self.bias is not None:
            layer.bias.data.copy_(self.bias.detach())
        return layer

    def _integer_layer(self) -> Int8Linear:
        of = self.rounding
        if not (
            isinstance(of, MinMaxRounding) and of.bits == 8 and of.symmetric and of.granularity == PerAxis(0)
        ):
            raise ValueError(
                "a layer with rounded activations converts to an integer layer, whose weights have 8 bits, symmetric, "
                'one scale a row: prepare_qat(bits=8, group_size=None, symmetric=True, method="minmax")'
            )
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, self.weight.device)
        linear.load_state_dict({k: v for k, v in self.state_dict().items() if k in ("weight", "bias")})
        inputs = self.input_rounding
        if isinstance(inputs, StaticInput):
            return StaticInt8Linear.from_linear(linear, inputs, activation_bits=inputs.bits)
        return DynamicInt8Linear.from_linear(linear, per=inputs.per, activation_bits=inputs.bits)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def prepare_qat(
    model,
    *,
    bits: int | None = None,
    group_size: int | str | None = 128,
    symmetric: bool | None = None,
    method: str | Callable = "minmax",
    activations=None,
    activation_bits: int = 8,
    layers: Iterable[str] | None = None,
) -> nn.Module:
    """A new model to train: its linear layers compute with rounded weights. The given one is not changed.

    method: "minmax" (bits 4 unless given, symmetric False), "lsq" (bits 4, learned steps), "ternary", "binary", or a
    function that makes a rounding for a weight: lambda w: LSQ(w, bits=2, granularity=PerAxis(0), mask="code").
    group_size: weights in a row that share a scale; None: one a row; "tensor": one a layer.
    activations: None (floats), "tensor" or "token" (a range from each input), or {layer name: observer} (fixed ranges).
    layers: the names of the layers to round; by default all linear layers in the blocks of a language model.

    Only the float weights, biases and steps of these layers are left to train; set requires_grad to train more.
    Raises: ValueError for settings that a method does not take, a layer that is none, or a model without such layers.
    """
    new = copy.deepcopy(model).requires_grad_(False)
    modules = dict(new.named_modules())
    names = list(linear_layers(new) if layers is None else layers)
    if not names:
        raise ValueError(f"{type(model).__name__} has no float linear layers left; is it prepared already?")
    for name in names:
        if name not in modules:
            raise ValueError(f"the model has no layer {name!r}")
        seen = _of_layer(activations, name)
        settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "method": method}
        layer = FakeQuantLinear.from_linear(
            modules[name], **settings, activations=seen, activation_bits=activation_bits
        )
        _put_module(new, name, layer.train(modules[name].training))
    return new


def fake_quant_layers(model) -> dict[str, FakeQuantLinear]:
    """The layers that prepare_qat put in, by full name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantLinear)}


def convert(model) -> tuple[nn.Module, dict[str, QTensor | CodebookTensor | Int8Linear]]:
    """(new model, quantized weights by layer name) of a model from prepare_qat, which is not changed.

    The new model is one that any code can read: layers of their first kind again, with weights exactly on the grid, so
    it gives the outputs of the prepared one. The quantized weights are what ledger.measure and save_quantized take.
    Where activations are rounded too, the layers compute in integers (quantlab.linear), and stand in both places; the
    weights must then have 8 bits, one symmetric scale a row.

    Raises: ValueError if there is no layer to convert, or its settings have no integer layer.
    """
    new, qtensors = copy.deepcopy(model).eval().requires_grad_(False), {}
    for name, layer in fake_quant_layers(new).items():
        plain, qtensors[name] = layer.converted()
        _put_module(new, name, plain.eval())
    if not qtensors:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer; did prepare_qat make it?")
    return new, qtensors


def _put_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check_linear(layer: nn.Module) -> None:
    """nn.Linear, or GPT-2's Conv1D, which is told by its name here: only quantlab.lm knows transformers."""
    if not isinstance(layer, nn.Linear) and type(layer).__name__ != "Conv1D":
        raise ValueError(f"need an nn.Linear or a Conv1D, got {type(layer).__name__}")


def _granularity(group_size: int | str | None) -> Granularity:
    if group_size is None:
        return PerAxis(0)
    if isinstance(group_size, str):
        if group_size != "tensor":
            raise ValueError(f'group_size must be a number, None (a row) or "tensor", got {group_size!r}')
        return PerTensor()
    return PerGroup(group_size)


def _rounding(weight: Tensor, bits, group_size, symmetric, method) -> nn.Module:
    if callable(method):
        if (bits, symmetric) != (None, None):
            raise ValueError("bits and symmetric are up to the function that is given as method")
        return method(weight)
    granularity = _granularity(group_size)
    if method == "minmax":
        return MinMaxRounding(
            bits=4 if bits is None else bits, granularity=granularity, symmetric=bool(symmetric)
        )
    if method not in ("lsq", "ternary", "binary"):
        raise ValueError(f"method must be minmax, lsq, ternary, binary or a function, got {method!r}")
    if symmetric is False:
        raise ValueError(f"{method} is symmetric; symmetric=False is for minmax")
    if method == "lsq":
        return LSQ(weight, bits=4 if bits is None else bits, granularity=granularity)
    if bits is not None:
        raise ValueError(
            f"{method} takes no bits: it has {3 if method == 'ternary' else 2} values, got {bits}"
        )
    return TernaryRounding(granularity) if method == "ternary" else BinaryRounding(weight, granularity)


def _input_rounding(activations, bits: int) -> nn.Module | None:
    if activations is None:
        return None
    if hasattr(activations, "min_max"):
        return StaticInput(activations, bits)
    if activations not in ("tensor", "token"):
        raise ValueError(f'activations must be None, "tensor", "token" or an observer, got {activations!r}')
    return DynamicInput(activations, bits)


def _of_layer(activations, name: str):
    """The setting of one layer."""
    if not isinstance(activations, dict):
        return activations
    if name not in activations:
        raise ValueError(f"activations holds no observer for the layer {name!r}")
    return activations[name]
