"""How llama.cpp chooses the scale of a block: many starts, for each the least-squares answer, the best is kept.

Written from ggml-quants.c (make_qx_quants, make_qkx2_quants, make_qkx3_quants, make_qp_quants), for all blocks at once.
The last dimension of a tensor is a block. Halves are rounded to even, as there.
"""

import torch
from torch import Tensor

_TENTH = torch.tensor(0.1, dtype=torch.float32)
NOTHING = 1e-15  # a block whose largest magnitude is below this is all zeros


def fit_scale(x: Tensor, weights: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """(codes, scale) that make Σ weights (x - scale (code - half))² small, codes 0..2·half - 1.

    19 starts: the largest magnitude is put on -half, or up to 0.9 of a step beside it. With the codes fixed, the best
    scale is Σ w x q / Σ w q², which leaves Σ w x² - (Σ w x q)² / Σ w q²; the start that leaves least is kept.
    """
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    empty = largest.abs() < NOTHING
    largest = largest.masked_fill(empty, 1.0)
    codes, scale, explained = torch.zeros_like(x), torch.zeros_like(largest), torch.full_like(largest, -1.0)
    for k in (0, *range(-9, 0), *range(1, 10)):
        q = (x * (-(half + _TENTH * k) / largest)).round().clamp(-half, half - 1)
        xq, qq = (weights * x * q).sum(-1, keepdim=True), (weights * q * q).sum(-1, keepdim=True)
        better = (qq > 0) & (xq * xq > explained * qq) | (k == 0)
        best = torch.where(qq > 0, xq / qq, 0.0)
        codes, scale = torch.where(better, q, codes), torch.where(better, best, scale)
        explained = torch.where(better, best * xq, explained)
    return torch.where(empty, 0.0, codes + half), scale.masked_fill(empty, 0.0)


def fit_affine(x: Tensor, weights: Tensor, top: int, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, offset) that make Σ weights (x - scale code + offset)² small, codes 0..top, offset ≥ 0.

    The first try spans from the block's least value (0, if that is positive) to its largest. Each start then rounds
    with top + start steps from the best offset so far to the largest value, and solves two equations in two unknowns
    for the scale and offset that are best for these codes.
    """
    high = x.amax(-1, keepdim=True)
    offset = -x.amin(-1, keepdim=True).clamp(max=0.0)
    flat = high + offset <= 0
    per = torch.where(flat, 0.0, top / (high + offset))  # steps per unit
    codes, scale = ((x + offset) * per).round().clamp(0, top), torch.where(flat, 0.0, 1 / per)
    error = (weights * (scale * codes - offset - x).square()).sum(-1, keepdim=True)
    w, wx = weights.sum(-1, keepdim=True), (weights * x).sum(-1, keepdim=True)
    for start in starts:
        q = ((x + offset) * ((start + top) / (high + offset))).nan_to_num(0.0).round().clamp(0, top)
        s, o = _solve(x, q, weights, w, wx)
        left = (weights * (s * q - o - x).square()).sum(-1, keepdim=True)
        better = (left < error) & ~flat  # never where s is no number: all codes alike
        codes, error = torch.where(better, q, codes), torch.where(better, left, error)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return codes, scale, offset


def _solve(x: Tensor, q: Tensor, weights: Tensor, w: Tensor, wx: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset that least squares gives for codes q; offset 0, where it would be negative."""
    wq, wqq, wxq = ((weights * v).sum(-1, keepdim=True) for v in (q, q * q, x * q))
    determinant = w * wqq - wq * wq
    determinant = torch.where(determinant > 0, determinant, torch.nan)
    scale, offset = (w * wxq - wx * wq) / determinant, (wq * wxq - wqq * wx) / determinant
    return torch.where(offset < 0, wxq / wqq, scale), offset.clamp(min=0.0)


def ladder(values: Tensor, top: int = 63) -> tuple[Tensor, Tensor]:
    """(codes 0..top, unit) of positive values: the largest is top units."""
    largest = values.amax(-1, keepdim=True).clamp(min=0.0)
    inverse = torch.where(largest > 0, top / largest, 0.0)
    return (inverse * values).round().clamp(max=top), largest / top


def fit_ladder(values: Tensor, weights: Tensor, top: int = 63) -> tuple[Tensor, Tensor]:
    """The same with weights: nine starts, then one code after the other moved where that lowers the weighted error."""
    largest = values.amax(-1, keepdim=True)
    empty = largest < NOTHING
    largest = largest.masked_fill(empty, 1.0)
    inverse, error = torch.zeros_like(largest), torch.full_like(largest, torch.inf)
    for k in (0, *range(-4, 0), *range(1, 5)):
        tried = (_TENTH * k + top) / largest
        left = (weights * (values - (tried * values).round().clamp(max=top) / tried).square()).sum(-1, keepdim=True)
        inverse, error = torch.where(left < error, tried, inverse), torch.minimum(left, error)
    codes = (inverse * values).round().clamp(max=top)
    for _ in range(5):
        if not _move_codes(codes, values, weights, top):
            break
    sums = (weights * values * codes).sum(-1, keepdim=True), (weights * codes * codes).sum(-1, keepdim=True)
    return codes.masked_fill(empty, 0.0), torch.where(empty, 0.0, sums[0] / sums[1])


def _move_codes(codes: Tensor, values: Tensor, weights: Tensor, top: int) -> bool:
    """Each code in turn, in place: to the nearest for the unit that the others want, if that explains more."""
    xq, qq = (weights * values * codes).sum(-1), (weights * codes * codes).sum(-1)
    moved = False
    for i in range(codes.shape[-1]):
        x, w, code = values[..., i], weights[..., i], codes[..., i]
        rest_xq, rest_qq = xq - w * x * code, qq - w * code * code
        usable = (rest_xq > 0) & (rest_qq > 0)
        new = (x * rest_qq / torch.where(usable, rest_xq, 1.0)).round().clamp(max=top)
        new_xq, new_qq = rest_xq + w * x * new, rest_qq + w * new * new
        better = usable & (new != code) & (new_xq * new_xq * qq > xq * xq * new_qq)
        codes[..., i] = torch.where(better, new, code)
        xq, qq = torch.where(better, new_xq, xq), torch.where(better, new_qq, qq)
        moved |= bool(better.any())
    return moved
