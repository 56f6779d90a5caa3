"""GPTQ: column by column, the columns still to come absorb the error."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_flag, check_number
from quantlab.gptq import Hessian, gptq_quantize
from quantlab.granularity import QTensor, split_rows
from quantlab.methods.base import WeightMethod, check_bits, check_group_size


@dataclass(frozen=True, kw_only=True)
class GPTQ(WeightMethod):
    """gptq_quantize for each layer, on what it reads while the blocks before it are quantized already.

    >>> GPTQ(bits=3, act_order=True).label
    'gptq act-order'
    """

    bits: int | Mapping[str, int] = 4  # of a code; or {layer: bits} for mixed precision
    group_size: int | None = 128  # weights in a row that share a scale; None: one a row
    symmetric: bool = False  # no zero points: the grid reaches equally far on both sides of 0
    act_order: bool = False  # columns by falling diagonal of H, not from left to right
    damping: float = 0.01  # the fraction of mean(diag H) that is added to the diagonal

    name, needs_data, words = "gptq", True, {"symmetric": "symmetric", "act_order": "act-order"}

    def __post_init__(self):
        vars(self).update(
            symmetric=check_flag(self.symmetric, "symmetric"),
            act_order=check_flag(self.act_order, "act_order"),
            group_size=check_group_size(self.group_size),
            damping=check_number(self.damping, "damping", low=0, high=1000),
        )
        vars(self).update(bits=check_bits(self.bits, 2 if self.symmetric else 1))

    def round(self, weights: list[Tensor], hessian: Hessian) -> list[QTensor]:
        """Rows never speak to each other, so q, k and v are rounded as one tall matrix: fewer and larger steps."""
        tall = gptq_quantize(torch.cat(weights), hessian, **self.settings)
        return split_rows(tall, [len(weight) for weight in weights])
