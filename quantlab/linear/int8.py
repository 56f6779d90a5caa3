"""Linear layers that compute in integers: dynamic and static int8 (or fewer bits), and the integer product under them.

The exact integers are the definition. The fast kernel (oneDNN's, which ships in torch) is used only where it gives the
same integers; simulating the layer in floating point gives the same outputs up to float rounding.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.affine import QParams, choose_qparams, fake_quantize, quantize
from quantlab.arguments import check_choice, check_codes, check_int, check_kind, check_real, check_tensor, kind
from quantlab.granularity import PerAxis, QTensor, quantize_tensor
from quantlab.linear.packed import KeepsScales
from quantlab.modules import check_linear, weight_of


def int_linear(x_codes: Tensor, x_zero, w_codes: Tensor, w_zero=0) -> Tensor:
    """The accumulators of an integer linear layer, exact, (tokens, out), int32.

        Σ (qx - zx)(qw - zw)  =  Σ qx qw  -  zx Σ qw  -  zw Σ qx  +  K zx zw        Jacob et al. 2018, eq. 7

    Only the first sum is a product of matrices; Σ qw is known before any input comes, and symmetric weights (zw = 0)
    leave two terms.

    Shapes: x_codes (tokens, K), x_zero a number or (tokens, 1); w_codes (out, K), w_zero a number or (out,).
    Raises: ValueError if codes are not integers, the two K differ, or an accumulator does not fit 32 bits.

    >>> int_linear(torch.tensor([[3, 1]]), 1, torch.tensor([[2, -4]])).tolist()   # (3 - 1) * 2 + (1 - 1) * -4
    [[4]]
    """
    for name, codes in (("x_codes", x_codes), ("w_codes", w_codes)):
        if check_codes(codes, name).ndim != 2:
            raise ValueError(f"{name} must be a matrix of integers, got {codes.dtype} {tuple(codes.shape)}")
    if x_codes.shape[1] != w_codes.shape[1]:
        raise ValueError(f"x_codes has {x_codes.shape[1]} features, w_codes {w_codes.shape[1]}")
    _check_zero(x_zero, "x_zero", (len(x_codes), 1))
    _check_zero(w_zero, "w_zero", (len(w_codes),))
    # Whole numbers far below 2**53, which float64 adds exactly; torch's own product of int32 matrices is slow.
    x, w = x_codes.double(), w_codes.double()
    zeros = x_zero * w_zero * x.shape[1]
    total = x @ w.T - x_zero * w.sum(1) - w_zero * x.sum(1, keepdim=True) + zeros
    if total.numel() and not -(2**31) <= total.min() <= total.max() < 2**31:
        raise ValueError(f"an accumulator of {total.abs().max():.0f} does not fit 32 bits; K is {x.shape[1]}")
    return total.to(torch.int32)


def _check_zero(zero, name: str, shape: tuple) -> None:
    if not isinstance(zero, Tensor):
        check_int(zero, name)
    elif check_codes(zero, name).numel() != 1 and zero.shape != shape:
        raise ValueError(
            f"{name} must be a whole number, or whole numbers {shape}, got {zero.dtype} {tuple(zero.shape)}"
        )


class Int8Linear(KeepsScales):
    """int8 weight, one symmetric scale a row; a subclass says which QParams its input gets. It has no gradient.

    rows: the weight, rounded already to weight_bits, on symmetric grids, one a row; None: it is rounded to the nearest
    code here. Codes of fewer than 8 bits are computed with as int8, and counted as packed.
    """

    def __init__(
        self, linear: nn.Linear, activation_bits: int = 8, weight_bits: int = 8, rows: QTensor | None = None
    ):  # fmt: skip
        super().__init__()
        weight = weight_of(check_linear(linear))
        self.weight_bits = check_int(weight_bits, "weight_bits", 2, 8)
        codes, scale = self.quantized_rows(weight) if rows is None else _of_rows(rows, weight, self.weight_bits)
        self.activation_bits = check_int(activation_bits, "activation_bits", 2, 8)
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.contiguous())  # the kernel reads them row by row
        self.register_buffer("weight_scale", scale)
        bias = _bias(linear)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._prepacked = (None, None, None)  # the weight in the kernel's own order, and of which codes it was made

    def quantized_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """int8 codes (out, in) and scales (out,) of the weight."""
        q = quantize_tensor(weight, bits=self.weight_bits, granularity=PerAxis(0))
        return q.codes, q.qparams.scale.flatten()

    def input_qparams(self, x: Tensor) -> QParams:
        """The map of an input (tokens, in): scale and zero_point of one element, or (tokens, 1)."""
        raise NotImplementedError

    def _one_map(self, x: Tensor) -> tuple[float, int] | None:
        """input_qparams as two numbers, where there is one map for all of x; None if there is one a token."""
        raise NotImplementedError

    def dequantized_weight(self) -> Tensor:
        """The float weight that the codes stand for, (out, in)."""
        return self.weight_scale[:, None] * self.codes.float()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight: packed codes and scales."""
        return -(-self.codes.numel() * self.weight_bits // 8) + self.weight_scale.nbytes

    @property
    def kernel(self) -> str:
        """Which way forward() goes on this CPU: "oneDNN", or "exact integers" where oneDNN would not be exact."""
        safe = kernel_status() == "exact" or (kernel_status() == "saturates" and self.activation_bits < 8)
        fits = self.in_features * 255 * 128 < 2**31  # the kernel's accumulators would wrap without a word
        return "oneDNN" if safe and fits and self.codes.device.type == "cpu" else "exact integers"

    def forward(self, x: Tensor) -> Tensor:
        """y = scale_x * scale_w * accumulators + bias, in the dtype of x, by the fast kernel where that is exact."""
        return self._layer(x, self._fast if self.kernel == "oneDNN" else self._exact)

    def exact(self, x: Tensor) -> Tensor:
        """The same by exact integers: the definition."""
        return self._layer(x, self._exact)

    def simulate(self, x: Tensor) -> Tensor:
        """The same with floats on the grid (fake quantization) and a float product: equal up to float rounding."""
        return self._layer(x, self._simulated)

    def _layer(self, x: Tensor, way) -> Tensor:
        if check_tensor(x).shape[-1:] != (self.in_features,) or x.numel() == 0 or not x.is_floating_point():
            raise ValueError(f"x must be floats of {self.in_features} features, got {x.dtype} {tuple(x.shape)}")
        y = way(x.reshape(-1, self.in_features).float())
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)

    def _exact(self, x: Tensor) -> Tensor:
        qp = self.input_qparams(x)
        sums = int_linear(quantize(x, qp), qp.zero_point, self.codes)
        return self._with_bias(sums.float() * (qp.scale * self.weight_scale))

    def _simulated(self, x: Tensor) -> Tensor:
        return self._with_bias(F.linear(fake_quantize(x, self.input_qparams(x)), self.dequantized_weight()))

    def _fast(self, x: Tensor) -> Tensor:
        weight, bias = self._kernel_weight(), None if self.bias is None else self.bias.float()
        one = self._one_map(x)
        if one is not None:
            scale, zero = one
            codes = x.mul(1.0 / scale).round_().add_(zero).clamp_(0, 2**self.activation_bits - 1)
            return _onednn(codes.to(torch.uint8), scale, zero, weight, self.weight_scale, bias)
        # One scale a token: the kernel knows only one for all, so it gets 1, and the tokens' scales come after it.
        qp = self.input_qparams(x)
        codes = quantize(x, qp).to(torch.uint8)
        zero = int(qp.zero_point[0])  # symmetric: the same for every token
        y = _onednn(codes, 1.0, zero, weight, self.weight_scale, None)
        return self._with_bias(y * qp.scale)

    def _kernel_weight(self) -> Tensor:
        version = None if self.codes.is_inference() else self.codes._version  # load_state_dict writes into codes
        packed, codes, then = self._prepacked
        if codes is not self.codes or then != version:
            packed = torch.ops.onednn.qlinear_prepack(self.codes, None)
            self._prepacked = packed, self.codes, version
        return packed

    def __getstate__(self) -> dict:
        return self.__dict__ | {
            "_prepacked": (None, None, None)
        }  # the kernel's own order can be neither copied nor saved

    def _with_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        bits = f"activation_bits={self.activation_bits}, weight_bits={self.weight_bits}"
        return f"{self.in_features}, {self.out_features}, {bits}"


class DynamicInt8Linear(Int8Linear):
    """int8 weight and activations; the activations' scale and zero_point are computed anew from every input.

    per="tensor": one asymmetric map for the whole input. per="token": one symmetric map for each row of it.
    """

    def __init__(
        self, linear: nn.Linear, *, per: str = "tensor", activation_bits: int = 8, weight_bits: int = 8, rows=None
    ):  # fmt: skip
        super().__init__(linear, activation_bits, weight_bits, rows)
        self.per = check_choice(per, "per", ("tensor", "token"))

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, per: str = "tensor", **options) -> "DynamicInt8Linear":
        """A new layer with linear's weight in int8; linear itself is not changed. options: those of the class."""
        return cls(linear, per=per, **options)

    def input_qparams(self, x: Tensor) -> QParams:
        low, high = torch.aminmax(x) if self.per == "tensor" else torch.aminmax(x, dim=1, keepdim=True)
        return choose_qparams(low, high, qmin=0, qmax=2**self.activation_bits - 1, symmetric=self.per == "token")

    def _one_map(self, x: Tensor) -> tuple[float, int] | None:
        if self.per == "token" and len(x) > 1:
            return None
        low, high = (bound.item() for bound in torch.aminmax(x))
        return _choose_numbers(low, high, qmax=2**self.activation_bits - 1, symmetric=self.per == "token")


class StaticInt8Linear(Int8Linear):
    """int8 weight and activations; the activations' scale and zero_point were fixed by calibration (an observer)."""

    def __init__(self, linear: nn.Linear, observer, *, activation_bits: int = 8, weight_bits: int = 8, rows=None):
        super().__init__(linear, activation_bits, weight_bits, rows)
        if not hasattr(observer, "min_max"):
            raise ValueError(f"observer must have min_max(), as those of quantlab.observers, got {kind(observer)}")
        qp = choose_qparams(*observer.min_max(), qmin=0, qmax=2**self.activation_bits - 1)
        self.register_buffer("input_scale", qp.scale)
        self.register_buffer("input_zero_point", qp.zero_point)

    @classmethod
    def from_linear(cls, linear: nn.Linear, observer, **options) -> "StaticInt8Linear":
        """A new layer with linear's weight in int8 and the range that the observer has seen (quantlab.observers)."""
        return cls(linear, observer, **options)

    def input_qparams(self, x: Tensor) -> QParams:
        return QParams(self.input_scale, self.input_zero_point, 0, 2**self.activation_bits - 1)

    def _one_map(self, x: Tensor) -> tuple[float, int]:
        low, high = torch.aminmax(x)  # a tenth of the time that torch.isfinite takes
        if not math.isfinite(low.item() + high.item()):
            check_real(x)
        return self.input_scale.item(), self.input_zero_point.item()


@cache
def kernel_status() -> str:
    """What oneDNN's kernel does on this CPU with the largest products: "exact", "saturates", or "missing".

    x86 CPUs without VNNI add two products u8 * s8 in 16 bits, which hold at most 32767: 2 * 255 * 127 does not fit.
    Activations of 7 bits always fit: 2 * 127 * 128 = 32512.
    """
    if not hasattr(torch.ops.onednn, "qlinear_pointwise") or not torch.backends.mkldnn.is_available():
        return "missing"
    x, w = torch.full((1, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
    sums = _onednn(x, 1.0, 0, torch.ops.onednn.qlinear_prepack(w, None), torch.ones(16, dtype=torch.float32), None)
    return "exact" if (sums == 64 * 255 * 127).all() else "saturates"


def _onednn(codes: Tensor, scale: float, zero: int, weight: Tensor, weight_scale: Tensor, bias) -> Tensor:
    """scale * weight_scale * Σ (codes - zero) weight + bias, float32; the integers are added in 32 bits."""
    none = torch.zeros(len(weight_scale), dtype=torch.int32)  # the weight's zero points
    return torch.ops.onednn.qlinear_pointwise(
        codes, scale, zero, weight, weight_scale, none, bias, 1.0, 0, torch.float32, "none", [], ""
    )


def _choose_numbers(low: float, high: float, *, qmax: int, symmetric: bool) -> tuple[float, int]:
    """choose_qparams for one range and qmin = 0 in Python's floats: the same two numbers, without 20 tensor calls,
    which would take as long as the kernel."""
    if not math.isfinite(low + high):
        raise ValueError(f"x must be finite, got values from {low} to {high}")
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        high = max(-low, high)
        low = -high
    info = torch.finfo(torch.float32)
    scale = torch.tensor(min(max((high - low) / qmax, info.tiny), info.max), dtype=torch.float32).item()  # rounded
    return scale, (qmax + 1) // 2 if symmetric else min(max(-round(low / scale), 0), qmax)


def _of_rows(rows: QTensor, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight that somebody else has rounded."""
    rows = check_kind(rows, "rows", QTensor, "quantize_tensor gives")
    signed = rows.qparams.qmin == -(2 ** (rows.bits - 1))
    if rows.codes.shape != weight.shape or rows.granularity != PerAxis(0) or not rows.symmetric or not signed:
        raise ValueError(f"rows must hold signed codes {tuple(weight.shape)} on symmetric grids, one a row")
    if rows.bits != bits:
        raise ValueError(f"weight_bits must be the {rows.bits} bits of rows, got {bits}")
    return rows.codes, rows.qparams.scale.flatten()


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach().float().clone()
