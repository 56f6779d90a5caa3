"""NF4: rounding to the nearest of 16 levels made for normal weights."""

from dataclasses import dataclass

from torch import Tensor

from quantlab.arguments import check_flag, check_int
from quantlab.codebook import CodebookTensor, nf4_levels, quantize_codebook
from quantlab.methods.base import WeightMethod


@dataclass(frozen=True, kw_only=True)
class NF4(WeightMethod):
    """Each weight to the nearest level of NF4 times its block's largest magnitude. It looks at no data."""

    group_size: int = 64  # weights, in the flattened matrix, that share an absmax
    double_quant: bool = False  # the absmax themselves in 8 bits

    name, needs_data, words, bits = "nf4", False, {"double_quant": "double"}, 4

    def __post_init__(self):
        vars(self).update(
            group_size=check_int(self.group_size, "group_size", 1),
            double_quant=check_flag(self.double_quant, "double_quant"),
        )

    def round(self, weights: list[Tensor], hessian=None) -> list[CodebookTensor]:
        settings = {"block_size": self.group_size, "double_quant": self.double_quant}
        return [quantize_codebook(weight, nf4_levels(), **settings) for weight in weights]
