"""AWQ: the columns that matter are scaled up before they are rounded."""

from dataclasses import dataclass

from torch import Tensor

from quantlab.arguments import check_int
from quantlab.awq import ScaledQTensor, scale_and_round, search_scales
from quantlab.hessian import Hessian
from quantlab.methods.base import GridMethod


@dataclass(frozen=True, kw_only=True)
class AWQ(GridMethod):
    """The scaling exponent with the least output error of all layers that read one input, then rounding to nearest."""

    steps: int = 20  # exponents tried: 0, 1/steps, ... 1

    name, needs_data = "awq", True

    def __post_init__(self):
        super().__post_init__()
        vars(self).update(steps=check_int(self.steps, "steps", 1, 1000))

    def round(self, weights: list[Tensor], hessian: Hessian) -> list[ScaledQTensor]:
        scale = search_scales(weights, hessian, steps=self.steps, **self.grid).input_scale
        return [scale_and_round(weight, scale, **self.grid) for weight in weights]
