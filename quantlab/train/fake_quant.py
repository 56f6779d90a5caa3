"""Training with quantization in the loop: fake-quantized layers, and models made of them.

A layer keeps a float weight and computes with its quantized values; the gradient passes the rounding as if it were not
there (straight-through estimator, STE) and moves the float weight. convert() keeps the quantized values alone.
"""

import copy
from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.arguments import check_int, check_kind, check_list, kind
from quantlab.blocks import Granularity, PerAxis, PerTensor, rows_or_groups
from quantlab.linear import Int8Linear
from quantlab.lm import linear_layers
from quantlab.modules import as_linear, check_linear, put_weight, weight_of
from quantlab.quantized import Quantized
from quantlab.train.lsq import LSQ
from quantlab.train.rounding import DynamicInput, FewLevels, InputRounding, MinMaxRounding, Rounding, StaticInput

METHODS = ("minmax", "lsq", "ternary", "binary")


class FakeQuantLinear(nn.Module):
    """A linear layer that trains a float weight and computes with its rounded values.

        y = x̂ Ŵᵀ + b      Ŵ = rounding(weight), x̂ = input_rounding(x), both with straight-through gradients

    weight is the float (master) weight, (out, in), also where the layer was GPT-2's Conv1D.
    """

    def __init__(self, linear: nn.Module, rounding: Rounding, input_rounding: InputRounding | None = None):
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
        cls, linear: nn.Module, *, bits: int | None = None, group_size: int | str | None = 128,
        symmetric: bool | None = None, method: str | Callable[[Tensor], Rounding] = "minmax", activations=None,
        activation_bits: int = 8,
    ) -> "FakeQuantLinear":  # fmt: skip
        """A new layer with a copy of linear's weight; linear is not changed. The settings are those of prepare_qat."""
        rounding = _rounding(weight_of(linear), bits, group_size, symmetric, method)
        return cls(linear, rounding, _input_rounding(activations, check_int(activation_bits, "activation_bits", 2, 8)))

    def quantized_weight(self) -> Tensor:
        """The weight that forward() computes with, (out, in), with its straight-through gradient."""
        return self.rounding(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_rounding is not None:
            x = self.input_rounding(x)
        return F.linear(x, self.quantized_weight(), self.bias)

    def converted(self) -> tuple[nn.Module, Quantized | Int8Linear]:
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
        return self.input_rounding.integer_layer(as_linear(self._float_layer()))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def prepare_qat(
    model, *, bits: int | None = None, group_size: int | str | None = 128, symmetric: bool | None = None,
    method: str | Callable[[Tensor], Rounding] = "minmax", activations=None, activation_bits: int = 8,
    layers: Iterable[str] | None = None,
) -> nn.Module:  # fmt: skip
    """A new model to train: its linear layers compute with rounded weights. The given one is not changed.

    method: "minmax" (bits 4 unless given, symmetric False), "lsq" (bits 4, learned steps), "ternary", "binary", or a
    function that makes a rounding for a weight: lambda w: LSQ(w, bits=2, granularity=PerAxis(0), mask="code").
    group_size: weights in a row that share a scale; None: one a row; "tensor": one a layer.
    activations: None (floats), "tensor" or "token" (a range from each input), or {layer name: observer} (fixed ranges).
    layers: the names of the layers to round; by default all linear layers in the blocks of a language model.

    Only the float weights, biases and steps of these layers are left to train; set requires_grad to train more.
    Raises: ValueError for settings that a method does not take, a layer that is none, or a model without such layers.
    """
    settings = {"bits": bits, "group_size": group_size, "symmetric": symmetric, "method": method}
    new = copy.deepcopy(check_kind(model, "model", nn.Module)).requires_grad_(False)
    modules = dict(new.named_modules())
    names = list(linear_layers(new)) if layers is None else check_list(layers, "layers")
    if not names:
        raise ValueError(f"{type(model).__name__} has no float linear layers left; is it prepared already?")
    for name in names:
        if not isinstance(name, str) or name not in modules:
            raise ValueError(f"the model has no layer {name!r}")
        inputs = {"activations": _of_layer(activations, name), "activation_bits": activation_bits}
        layer = FakeQuantLinear.from_linear(modules[name], **settings, **inputs)
        new.set_submodule(name, layer.train(modules[name].training))
    return new


def fake_quant_layers(model) -> dict[str, FakeQuantLinear]:
    """The layers that prepare_qat put in, by full name."""
    of = check_kind(model, "model", nn.Module)
    return {name: m for name, m in of.named_modules() if isinstance(m, FakeQuantLinear)}


def convert(model) -> tuple[nn.Module, dict[str, Quantized | Int8Linear]]:
    """(new model, quantized weights by layer name) of a model from prepare_qat, which is not changed.

    The new model is one that any code can read: layers of their first kind again, with weights exactly on the grid, so
    it gives the outputs of the prepared one. The quantized weights are what ledger.measure and save_quantized take.
    Where activations are rounded too, the layers compute in integers (quantlab.linear), and stand in both places; the
    weights must then have 8 bits, one symmetric scale a row.

    Raises: ValueError if there is no layer to convert, or its settings have no integer layer.
    """
    new, qtensors = copy.deepcopy(check_kind(model, "model", nn.Module)).eval().requires_grad_(False), {}
    for name, layer in fake_quant_layers(new).items():
        plain, qtensors[name] = layer.converted()
        new.set_submodule(name, plain.eval())
    if not qtensors:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer; did prepare_qat make it?")
    return new, qtensors


def _rounding(weight: Tensor, bits, group_size, symmetric, method) -> Rounding:
    if callable(method):
        if (bits, symmetric) != (None, None):
            raise ValueError("bits and symmetric are up to the function that is given as method")
        return method(weight)
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method must be {', '.join(METHODS)} or a function, got {kind(method)}")
    granularity, bits = _granularity(group_size), 4 if bits is None and method in ("minmax", "lsq") else bits
    if method == "minmax":
        return MinMaxRounding(bits=bits, granularity=granularity, symmetric=False if symmetric is None else symmetric)
    if symmetric is False:
        raise ValueError(f"{method} is symmetric; symmetric=False is for minmax")
    if method == "lsq":
        return LSQ(weight, bits=bits, granularity=granularity)
    if bits is not None:
        raise ValueError(f"{method} takes no bits: it has {3 if method == 'ternary' else 2} values, got {bits}")
    rounding = FewLevels(method, granularity=granularity)
    rounding.quantized(weight)  # a granularity that cannot be stored is refused before training
    return rounding


def _granularity(group_size: int | str | None) -> Granularity:
    if isinstance(group_size, str):
        if group_size != "tensor":
            raise ValueError(f'group_size must be a number, None (a row) or "tensor", got {group_size!r}')
        return PerTensor()
    return rows_or_groups(group_size)


def _input_rounding(activations, bits: int) -> InputRounding | None:
    if activations is None:
        return None
    if hasattr(activations, "min_max"):
        return StaticInput(activations, bits)
    if not isinstance(activations, str) or activations not in ("tensor", "token"):
        raise ValueError(f'activations must be None, "tensor", "token" or an observer, got {kind(activations)}')
    return DynamicInput(activations, bits)


def _of_layer(activations, name: str):
    """The setting of one layer."""
    if not isinstance(activations, dict):
        return activations
    if name not in activations:
        raise ValueError(f"activations holds no observer for the layer {name!r}")
    return activations[name]
