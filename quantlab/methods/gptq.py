"""GPTQ: column by column, the columns still to come absorb the error."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_flag, check_number
from quantlab.gptq import gptq_quantize
from quantlab.granularity import QTensor, split_rows
from quantlab.hessian import Hessian
from quantlab.methods.base import GridMethod


@dataclass(frozen=True, kw_only=True)
class GPTQ(GridMethod):
    """gptq_quantize for each layer, on what it reads while the blocks before it are quantized already.

    >>> GPTQ(bits=3, act_order=True).label
    'gptq act-order'
    """

    act_order: bool = False  # columns by falling diagonal of H, not from left to right
    damping: float = 0.01  # the fraction of mean(diag H) that is added to the diagonal

    name, needs_data, words = "gptq", True, GridMethod.words | {"act_order": "act-order"}

    def __post_init__(self):
        super().__post_init__()
        vars(self).update(
            act_order=check_flag(self.act_order, "act_order"),
            damping=check_number(self.damping, "damping", low=0, high=1000),
        )

    def round(self, weights: list[Tensor], hessian: Hessian) -> list[QTensor]:
        """Rows never speak to each other, so q, k and v are rounded as one tall matrix: fewer and larger steps."""
        tall = gptq_quantize(torch.cat(weights), hessian, **self.settings)
        return split_rows(tall, [len(weight) for weight in weights])
