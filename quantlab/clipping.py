"""Clip search: a smaller range for each block, where the finer step gains more than the clipped ends lose."""

from dataclasses import replace

import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, dequantize, quantize
from quantlab.arguments import check_int, check_real
from quantlab.blocks import Granularity, to_blocks
from quantlab.granularity import QTensor, code_range, qtensor_of_blocks


def quantize_clipped(
    x: Tensor, *, bits: int, granularity: Granularity, symmetric: bool = True, signed: bool = True, steps: int = 20
) -> QTensor:  # fmt: skip
    """x rounded to nearest, each block on the grid, of steps + 1 tried, that leaves it the least squared error.

    The grids reach from r · min to r · max of the block, r = 1, 1 - 0.7/steps, ... 0.3. r = 1 is quantize_tensor's, so
    no block gets worse. No data are needed: it is the weight's own error that falls.

    Raises: ValueError for what quantize_tensor refuses, and steps < 1.

    >>> from quantlab import PerTensor
    >>> x = torch.tensor([1.0] * 20 + [4.0])
    >>> q = quantize_clipped(x, bits=2, granularity=PerTensor(), symmetric=False)
    >>> round(q.dequantize()[0].item(), 2), round(q.dequantize()[-1].item(), 2)   # 1.33 and 4 without
    (1.1, 3.3)
    """
    x, steps = check_real(x), check_int(steps, "steps", 1, 1000)
    qmin, qmax = code_range(bits, signed=signed, symmetric=symmetric)
    blocks = to_blocks(x.detach(), granularity)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    best = least = None
    for i in range(steps + 1):
        ratio = 1 - 0.7 * i / steps
        qp = choose_qparams(ratio * low, ratio * high, qmin=qmin, qmax=qmax, symmetric=symmetric)
        error = (dequantize(quantize(blocks, qp), qp).double() - blocks).square().sum(1, keepdim=True)
        best, least = (qp, error) if best is None else _better(best, least, qp, error)
    return qtensor_of_blocks(x, quantize(blocks, best), best, bits, granularity, symmetric)


def _better(best: QParams, least: Tensor, qp: QParams, error: Tensor) -> tuple[QParams, Tensor]:
    """For each block the grid with the smaller error; a tie keeps the wider one."""
    wins = error < least
    scale = torch.where(wins, qp.scale, best.scale)
    zero_point = torch.where(wins, qp.zero_point, best.zero_point)
    return replace(best, scale=scale, zero_point=zero_point), torch.where(wins, error, least)
