"""Methods whose layers compute in integers: W8A8, with SmoothQuant before it, W4A4, and LLM.int8()."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from quantlab.arguments import check_choice, check_int, check_number, kind
from quantlab.clipping import quantize_clipped
from quantlab.granularity import PerAxis, QTensor
from quantlab.hessian import Hessian
from quantlab.linear import DynamicInt8Linear, Int8Linear, StaticInt8Linear
from quantlab.methods.base import IntegerMethod
from quantlab.methods.gptq import GPTQ
from quantlab.observers import MinMax
from quantlab.outliers import LLMInt8Linear


@dataclass(frozen=True, kw_only=True)
class W8A8(IntegerMethod):
    """int8 weights, one scale a row, and activations on a grid whose range comes from `per`.

    >>> W8A8(per="token").label, W8A8(per="static").label
    ('w8a8_dynamic', 'w8a8_static')
    """

    per: str = "tensor"  # the range of "tensor": each input; "token": each row of it; "static": what the observer saw
    observer: Callable = MinMax  # called for each layer, for per="static"
    activation_bits: int = 8
    weight_bits: int = 8
    rounding: str = "nearest"  # of the weights; "clip": the best of eight ranges a row; "gptq"

    def __post_init__(self):
        check_choice(self.per, "per", ("tensor", "token", "static"))
        check_choice(self.rounding, "rounding", ("nearest", "clip", "gptq"))
        for name in ("activation_bits", "weight_bits"):
            vars(self)[name] = check_int(getattr(self, name), name, 2, 8)
        if not callable(self.observer):
            raise ValueError(f"observer is called for each layer: pass MinMax, not MinMax(); got {kind(self.observer)}")

    @property
    def name(self) -> str:
        return "w8a8_static" if self.observes else "w8a8_dynamic"

    @property
    def observes(self) -> bool:
        return self.per == "static"

    @property
    def needs_data(self) -> bool:
        return self.observes or self.rounding == "gptq"

    @property
    def ledger_group(self) -> str:
        return self.per

    @property
    def ledger_bits(self) -> int:
        return self.weight_bits

    def round(self, weights: list[Tensor], hessian: Hessian | None) -> list[QTensor]:
        if self.rounding == "gptq":
            return GPTQ(bits=self.weight_bits, group_size=None, symmetric=True).round(weights, hessian)
        return [quantize_clipped(w, bits=self.weight_bits, granularity=PerAxis(0), steps=7) for w in weights]

    def layer(self, linear: nn.Linear, observer=None, rows: QTensor | None = None) -> Int8Linear:
        options = {"activation_bits": self.activation_bits, "weight_bits": self.weight_bits, "rows": rows}
        if self.observes:
            return StaticInt8Linear.from_linear(linear, observer, **options)
        return DynamicInt8Linear.from_linear(linear, per=self.per, **options)


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(W8A8):
    """W8A8 after the activations' outliers were moved into the weights (quantlab.outliers.smooth)."""

    alpha: float = 0.5  # 0: all stays in the activations, 1: all of it moves into the weights

    name, needs_data = "smoothquant", True

    def __post_init__(self):
        super().__post_init__()
        vars(self).update(alpha=check_number(self.alpha, "alpha", low=0, high=1))


@dataclass(frozen=True, kw_only=True)
class W4A4(W8A8):
    """4-bit weights, one scale a row, and 4-bit activations, one scale a token: for models that were rotated.

    >>> W4A4().label, W4A4(rounding="gptq").label
    ('w4a4', 'w4a4 rounding=gptq')
    """

    per: str = "token"
    activation_bits: int = 4
    weight_bits: int = 4

    name = "w4a4"


@dataclass(frozen=True, kw_only=True)
class LLMInt8(IntegerMethod):
    """LLM.int8(): columns of the input with outliers stay in float, all else in int8, vector by vector."""

    threshold: float = 6.0  # |x| from which a column is an outlier

    name, needs_data, ledger_group = "llm_int8", False, "split"

    def __post_init__(self):
        vars(self).update(threshold=check_number(self.threshold, "threshold", above=0, infinite=True))

    def layer(self, linear: nn.Linear, observer=None, rows=None) -> Int8Linear:
        return LLMInt8Linear.from_linear(linear, threshold=self.threshold)
