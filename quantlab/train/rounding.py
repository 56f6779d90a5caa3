"""What a fake-quantized layer rounds: its weight on a grid of its own, and its input on a range old or new."""

import torch
from torch import Tensor, nn

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.arguments import check_choice, check_int
from quantlab.blocks import Granularity, from_blocks, to_blocks
from quantlab.granularity import code_range, quantize_tensor
from quantlab.linear import DynamicInt8Linear, Int8Linear, StaticInt8Linear
from quantlab.quantized import Quantized
from quantlab.train.few_levels import binary, quantize_binary, quantize_ternary, ternary

# --- weights ----------------------------------------------------------------------------------------------------


class Rounding(nn.Module):
    """How the weight of a layer is rounded: a module, because what it learns is trained with the layer.

    forward(weight) is the rounded weight as floats, in the weight's dtype, with a gradient; quantized(weight) the same
    values as codes: forward(w) equals quantized(w).dequantize() bit by bit, in every float dtype.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight as floats, with its straight-through gradient."""
        raise NotImplementedError

    def quantized(self, weight: Tensor) -> Quantized:
        """The same values as codes and scales."""
        raise NotImplementedError


class MinMaxRounding(Rounding):
    """Rounds to the grid that quantize_tensor lays over the minimum and maximum of each block, anew in each call.

    The gradient of the rounded weight is 1 where the code lies in qmin..qmax and 0 where it was clamped. The range is
    taken as a constant: no gradient flows into the minimum and maximum through the scale.

    Raises: ValueError if bits is not 1..8 (2..8 if symmetric).
    """

    def __init__(self, *, bits: int, granularity: Granularity, symmetric: bool = False):
        super().__init__()
        self.qmin, self.qmax = code_range(bits, symmetric=symmetric)
        self.bits, self.granularity, self.symmetric = int(bits), granularity, bool(symmetric)

    def forward(self, weight: Tensor) -> Tensor:
        blocks = to_blocks(weight, self.granularity)
        low, high = torch.aminmax(blocks.detach(), dim=1, keepdim=True)
        qp = choose_qparams(low, high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric)
        return from_blocks(fake_quantize(blocks, qp), self.granularity, weight.shape)

    def quantized(self, weight: Tensor) -> Quantized:
        return quantize_tensor(weight, bits=self.bits, granularity=self.granularity, symmetric=self.symmetric)


class FewLevels(Rounding):
    """ternary() or binary(), by its name, as a rounding of weights."""

    functions = {"ternary": (ternary, quantize_ternary), "binary": (binary, quantize_binary)}

    def __init__(self, method: str, *, granularity: Granularity):
        super().__init__()
        self.method, self.granularity = check_choice(method, "method", self.functions), granularity

    def forward(self, weight: Tensor) -> Tensor:
        return self.functions[self.method][0](weight, self.granularity)

    def quantized(self, weight: Tensor) -> Quantized:
        return self.functions[self.method][1](weight, self.granularity)


# --- activations ------------------------------------------------------------------------------------------------


class InputRounding(nn.Module):
    """Rounds the input of a layer on a grid 0..2**bits - 1 over a range, beyond which it clamps: the gradient is 0."""

    symmetric = False

    def __init__(self, bits: int):
        super().__init__()
        self.bits = check_int(bits, "activation_bits", 2, 8)

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high) of the grid for this input."""
        raise NotImplementedError

    def integer_layer(self, linear: nn.Linear) -> Int8Linear:
        """The layer that computes in integers what linear computes with inputs rounded like this."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.range_of(x.detach())
        return fake_quantize(x, choose_qparams(low, high, qmin=0, qmax=2**self.bits - 1, symmetric=self.symmetric))


class DynamicInput(InputRounding):
    """A range from each input itself: per "tensor", asymmetric, or per "token", symmetric."""

    def __init__(self, per: str, bits: int = 8):
        super().__init__(bits)
        self.per, self.symmetric = per, per == "token"

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.aminmax(x, dim=-1, keepdim=True) if self.per == "token" else torch.aminmax(x)

    def integer_layer(self, linear: nn.Linear) -> DynamicInt8Linear:
        return DynamicInt8Linear.from_linear(linear, per=self.per, activation_bits=self.bits)


class StaticInput(InputRounding):
    """The range that an observer has seen, for every input."""

    def __init__(self, observer, bits: int = 8):
        super().__init__(bits)
        low, high = observer.min_max()
        choose_qparams(low, high, qmin=0, qmax=1)  # a range that is none is refused here
        self.register_buffer("low", low.detach().clone())
        self.register_buffer("high", high.detach().clone())

    def min_max(self) -> tuple[Tensor, Tensor]:
        """The range, as an observer gives it."""
        return self.low, self.high

    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.low, self.high

    def integer_layer(self, linear: nn.Linear) -> StaticInt8Linear:
        return StaticInt8Linear.from_linear(linear, self, activation_bits=self.bits)
