"""Training with quantization in the loop: fake-quantized layers, and models made of them.

A layer keeps a float weight and computes with its quantized values; the gradient passes the rounding as if it were not
there (straight-through estimator, STE) and moves the float weight. convert() keeps the quantized values alone.
"""

import copy
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.arguments import check_int
from quantlab.blocks import from_blocks, to_blocks
from quantlab.codebook import CodebookTensor
from quantlab.granularity import Granularity, PerAxis, PerTensor, QTensor, code_range, quantize_tensor, rows_or_groups
from quantlab.linear import DynamicInt8Linear, Int8Linear, StaticInt8Linear
from quantlab.lm import linear_layers
from quantlab.modules import check_linear, put_weight, weight_of
from quantlab.train.few_levels import binary, quantize_binary, quantize_ternary, ternary
from quantlab.train.lsq import LSQ

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
        check_linear(linear)
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
        check_linear(linear)
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
        if not (isinstance(of, MinMaxRounding) and of.bits == 8 and of.symmetric and of.granularity == PerAxis(0)):
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
        new.set_submodule(name, layer.train(modules[name].training))
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
        new.set_submodule(name, plain.eval())
    if not qtensors:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer; did prepare_qat make it?")
    return new, qtensors


def _granularity(group_size: int | str | None) -> Granularity:
    if isinstance(group_size, str):
        if group_size != "tensor":
            raise ValueError(f'group_size must be a number, None (a row) or "tensor", got {group_size!r}')
        return PerTensor()
    return rows_or_groups(group_size)


def _rounding(weight: Tensor, bits, group_size, symmetric, method) -> nn.Module:
    if callable(method):
        if (bits, symmetric) != (None, None):
            raise ValueError("bits and symmetric are up to the function that is given as method")
        return method(weight)
    granularity = _granularity(group_size)
    if method == "minmax":
        return MinMaxRounding(bits=4 if bits is None else bits, granularity=granularity, symmetric=bool(symmetric))
    if method not in ("lsq", "ternary", "binary"):
        raise ValueError(f"method must be minmax, lsq, ternary, binary or a function, got {method!r}")
    if symmetric is False:
        raise ValueError(f"{method} is symmetric; symmetric=False is for minmax")
    if method == "lsq":
        return LSQ(weight, bits=4 if bits is None else bits, granularity=granularity)
    if bits is not None:
        raise ValueError(f"{method} takes no bits: it has {3 if method == 'ternary' else 2} values, got {bits}")
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
