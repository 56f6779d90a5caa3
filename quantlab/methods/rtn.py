"""Rounding to nearest."""

from dataclasses import dataclass

from torch import Tensor

from quantlab.arguments import check_flag
from quantlab.blocks import rows_or_groups
from quantlab.clipping import quantize_clipped
from quantlab.granularity import QTensor, quantize_tensor
from quantlab.methods.base import GridMethod


@dataclass(frozen=True, kw_only=True)
class RTN(GridMethod):
    """Each weight to the nearest point of its group's grid. It looks at no data.

    >>> RTN(bits=3, clip_search=True).label
    'rtn clip'
    """

    clip_search: bool = False  # cut each group's range where that lowers its error

    name, needs_data, words = "rtn", False, GridMethod.words | {"clip_search": "clip"}

    def __post_init__(self):
        super().__post_init__()
        vars(self).update(clip_search=check_flag(self.clip_search, "clip_search"))

    def round(self, weights: list[Tensor], hessian=None) -> list[QTensor]:
        quantizer = quantize_clipped if self.clip_search else quantize_tensor
        settings = {"granularity": rows_or_groups(self.group_size), "symmetric": self.symmetric}
        return [quantizer(weight, bits=self.bits, **settings) for weight in weights]
