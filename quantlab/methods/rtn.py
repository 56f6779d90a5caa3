"""Rounding to nearest."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from quantlab.arguments import check_flag
from quantlab.blocks import rows_or_groups
from quantlab.clipping import quantize_clipped
from quantlab.granularity import QTensor, quantize_tensor
from quantlab.methods.base import WeightMethod, check_bits, check_group_size


@dataclass(frozen=True, kw_only=True)
class RTN(WeightMethod):
    """Each weight to the nearest point of its group's grid. It looks at no data.

    >>> RTN(bits=3, clip_search=True).label
    'rtn clip'
    """

    bits: int | Mapping[str, int] = 4  # of a code; or {layer: bits} for mixed precision
    group_size: int | None = 128  # weights in a row that share a scale; None: one a row
    symmetric: bool = False  # no zero points: the grid reaches equally far on both sides of 0
    clip_search: bool = False  # cut each group's range where that lowers its error

    name, needs_data, words = "rtn", False, {"symmetric": "symmetric", "clip_search": "clip"}

    def __post_init__(self):
        vars(self).update(
            symmetric=check_flag(self.symmetric, "symmetric"),
            clip_search=check_flag(self.clip_search, "clip_search"),
            group_size=check_group_size(self.group_size),
        )
        vars(self).update(bits=check_bits(self.bits, 2 if self.symmetric else 1))

    def round(self, weights: list[Tensor], hessian=None) -> list[QTensor]:
        quantizer = quantize_clipped if self.clip_search else quantize_tensor
        settings = {"granularity": rows_or_groups(self.group_size), "symmetric": self.symmetric}
        return [quantizer(weight, bits=self.bits, **settings) for weight in weights]
