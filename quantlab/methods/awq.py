"""AWQ: the columns that matter are scaled up before they are rounded."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantlab.arguments import check_flag, check_int
from quantlab.awq import ScaledQTensor, scale_and_round, search_scales
from quantlab.gptq import Hessian
from quantlab.methods.base import WeightMethod, check_bits, check_group_size


@dataclass(frozen=True, kw_only=True)
class AWQ(WeightMethod):
    """The scaling exponent with the least output error of all layers that read one input, then rounding to nearest."""

    bits: int | Mapping[str, int] = 4  # of a code; or {layer: bits} for mixed precision
    group_size: int | None = 128  # weights in a row that share a scale; None: one a row
    symmetric: bool = False  # no zero points: the grid reaches equally far on both sides of 0
    steps: int = 20  # exponents tried: 0, 1/steps, ... 1

    name, needs_data, words = "awq", True, {"symmetric": "symmetric"}

    def __post_init__(self):
        vars(self).update(
            symmetric=check_flag(self.symmetric, "symmetric"),
            steps=check_int(self.steps, "steps", 1, 1000),
            group_size=check_group_size(self.group_size),
        )
        vars(self).update(bits=check_bits(self.bits, 2 if self.symmetric else 1))

    def round(self, weights: list[Tensor], hessian: Hessian) -> list[ScaledQTensor]:
        grid = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        scale = search_scales(weights, hessian, steps=self.steps, **grid).input_scale
        return [scale_and_round(weight, scale, **grid) for weight in weights]
