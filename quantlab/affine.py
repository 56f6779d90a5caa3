"""The affine map between reals and integer codes: scale, zero_point, rounding, clamping."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_int, check_real


@dataclass(frozen=True, eq=False)
class QParams:
    """One affine map per block: real ≈ scale * (code - zero_point). Both tensors broadcast against the data."""

    scale: Tensor  # real units per step, > 0, float32
    zero_point: Tensor  # the code that stands for real 0.0, int32, same shape as scale
    qmin: int  # smallest code
    qmax: int  # largest code, inclusive


def choose_qparams(min_val: Tensor, max_val: Tensor, *, qmin: int, qmax: int, symmetric: bool = False) -> QParams:
    """The affine map that lays the codes qmin..qmax over the real range [min_val, max_val].

        real ≈ scale * (code - zero_point)          Jacob et al. 2018, eq. 1

    The range is first widened to hold 0.0, so that zero (padding, ReLU, masks) is a code and stays exact.
    symmetric=True covers [-a, a], a = max(|min_val|, |max_val|), with the middle code as zero_point.
    A range of zero width gets the smallest normal float32 as its scale, so 1 / scale is always finite.

    Shapes: min_val and max_val alike, () for a whole tensor, (rows, 1) for one map per row.
    Raises: ValueError if qmin >= qmax, a bound is not finite, or min_val > max_val.

    >>> qp = choose_qparams(torch.tensor(-1.0), torch.tensor(2.0), qmin=0, qmax=3)
    >>> qp.scale.item(), qp.zero_point.item()
    (1.0, 1)
    """
    _check_bounds(min_val, max_val, qmin, qmax)
    # In float64, so that a range near 3e38 does not overflow, and the one rounding is that of the result.
    low, high = min_val.detach().double().clamp(max=0.0), max_val.detach().double().clamp(min=0.0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    info = torch.finfo(torch.float32)
    scale = ((high - low) / (qmax - qmin)).clamp(info.tiny, info.max).float()
    if symmetric:
        zero_point = torch.full_like(scale, (qmin + qmax + 1) // 2)
    else:
        zero_point = (qmin - torch.round(low / scale)).clamp(qmin, qmax)
    return QParams(scale, zero_point.to(torch.int32), qmin, qmax)


def quantize(x: Tensor, qp: QParams) -> Tensor:
    """The integer codes of x, int32, in the shape of x.

        code = clamp(round_to_even(x * (1 / scale)) + zero_point, qmin, qmax)

    Rounding comes before adding zero_point: round(0.5) + 1 is 1, but round(0.5 + 1) is 2. This is the
    convention of torch.fake_quantize_per_channel_affine; libraries differ here, next to ties only.

    Raises: ValueError if x is not floating point, is empty or holds NaN or infinity.

    >>> qp = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 0, 3)
    >>> quantize(torch.tensor([-9.0, 0.0, 0.6, 9.0]), qp).tolist()
    [0, 1, 2, 3]
    """
    check_real(x)
    return unclamped_codes(x, qp).clamp(qp.qmin, qp.qmax).to(torch.int32)


def dequantize(codes: Tensor, qp: QParams) -> Tensor:
    """The reals that the codes stand for, scale * (code - zero_point), float32.

    Raises: ValueError if codes are not integers.

    >>> qp = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 0, 3)
    >>> dequantize(torch.tensor([0, 1, 2, 3]), qp).tolist()
    [-0.5, 0.0, 0.5, 1.0]
    """
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers, got {codes.dtype}; did you pass x instead of quantize(x, qp)?")
    return qp.scale.float() * (codes.to(torch.int32) - qp.zero_point)


def fake_quantize(x: Tensor, qp: QParams) -> Tensor:
    """x rounded to the grid but still floating point, with a straight-through gradient (STE).

    The value is that of dequantize(quantize(x, qp), qp). The gradient is 1 where the code of x lies in
    qmin..qmax and 0 where it was clamped (Jacob et al. 2018, sec. 3; same mask as torch's own).

    Raises: ValueError if x is not floating point, is empty or holds NaN or infinity.

    >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 0, 3))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, 1.0], [1.0, 0.0])
    """
    check_real(x)
    return _StraightThrough.apply(x, qp)


def _check_bounds(min_val: Tensor, max_val: Tensor, qmin: int, qmax: int) -> None:
    for name, bound in (("qmin", qmin), ("qmax", qmax)):
        check_int(bound, name)
    if qmin >= qmax:
        raise ValueError(f"need qmin < qmax, got qmin={qmin}, qmax={qmax}")
    if min_val.shape != max_val.shape or min_val.numel() == 0:
        raise ValueError(f"need bounds of one shape, got {tuple(min_val.shape)} and {tuple(max_val.shape)}")
    if not (torch.isfinite(min_val.float()).all() and torch.isfinite(max_val.float()).all()):
        raise ValueError("min_val and max_val must be finite float32 numbers; has the observer seen any data?")
    if (min_val > max_val).any():
        raise ValueError("need min_val <= max_val; are the two swapped?")


def unclamped_codes(x: Tensor, qp: QParams) -> Tensor:
    """round(x / scale) + zero_point before clamping, float32 (exact: codes are far below 2**24)."""
    x = x if x.dtype == torch.float64 else x.float()
    return torch.round(x * (1.0 / qp.scale).to(x.dtype)) + qp.zero_point


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qp):
        steps = unclamped_codes(x, qp)
        ctx.save_for_backward((steps >= qp.qmin) & (steps <= qp.qmax))
        return (qp.scale * (steps.clamp(qp.qmin, qp.qmax) - qp.zero_point)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None
