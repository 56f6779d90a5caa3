"""The affine map between reals and integer codes: scale, zero_point, rounding, clamping."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import FLOAT32_MAX, check_codes, check_flag, check_int, check_kind, check_real, check_tensor


@dataclass(frozen=True, eq=False)
class QParams:
    """One affine map per block: real ≈ scale * (code - zero_point). Both tensors broadcast against the data."""

    scale: Tensor  # real units per step, finite and > 0, float32
    zero_point: Tensor  # the code that stands for real 0.0, int32, same shape as scale
    qmin: int  # smallest code
    qmax: int  # largest code, inclusive

    def __post_init__(self):
        qmin, qmax = check_int(self.qmin, "qmin"), check_int(self.qmax, "qmax")
        if qmin >= qmax:
            raise ValueError(f"need qmin < qmax, got qmin={qmin}, qmax={qmax}")
        vars(self).update(qmin=qmin, qmax=qmax)
        scale = check_real(self.scale, "scale")
        if not (scale > 0).all():
            raise ValueError(f"scale must be above 0, got {scale.min():.3g}")
        if check_codes(self.zero_point, "zero_point").shape != self.scale.shape:
            shapes = tuple(self.scale.shape), tuple(self.zero_point.shape)
            raise ValueError(f"scale and zero_point must have one shape, got {shapes[0]} and {shapes[1]}")
        low, high = (int(bound) for bound in torch.aminmax(self.zero_point))
        if low < qmin or high > qmax:
            raise ValueError(f"zero_point must be a code, {qmin}..{qmax}, got {low}..{high}")

    def check_fits(self, x: Tensor) -> None:
        """ValueError unless scale and zero_point broadcast against x without making it larger."""
        sizes = zip(reversed(self.scale.shape), reversed(x.shape), strict=False)
        if self.scale.ndim > x.ndim or any(own not in (1, size) for own, size in sizes):
            raise ValueError(f"scales {tuple(self.scale.shape)} do not fit a tensor {tuple(x.shape)}")


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
    symmetric = check_flag(symmetric, "symmetric")
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

    Raises: ValueError if x is not floating point, is empty, holds NaN or infinity, or the scales do not fit it.

    >>> qp = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 0, 3)
    >>> quantize(torch.tensor([-9.0, 0.0, 0.6, 9.0]), qp).tolist()
    [0, 1, 2, 3]
    """
    return unclamped_codes(check_real(x), qp).clamp(qp.qmin, qp.qmax).to(torch.int32)


def dequantize(codes: Tensor, qp: QParams) -> Tensor:
    """The reals that the codes stand for, scale * (code - zero_point), float32.

    Raises: ValueError if codes are not integers, or the scales do not fit them.

    >>> qp = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 0, 3)
    >>> dequantize(torch.tensor([0, 1, 2, 3]), qp).tolist()
    [-0.5, 0.0, 0.5, 1.0]
    """
    check_codes(codes)
    check_kind(qp, "qp", QParams, "choose_qparams gives").check_fits(codes)
    return _reals(codes.to(torch.int32), qp)


def fake_quantize(x: Tensor, qp: QParams) -> Tensor:
    """x rounded to the grid but still floating point, with a straight-through gradient (STE).

    The value is that of dequantize(quantize(x, qp), qp). The gradient is 1 where the code of x lies in
    qmin..qmax and 0 where it was clamped (Jacob et al. 2018, sec. 3; same mask as torch's own).

    Raises: ValueError if x is not floating point, is empty, holds NaN or infinity, or the scales do not fit it.

    >>> x = torch.tensor([0.3, 9.0], requires_grad=True)
    >>> y = fake_quantize(x, QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), 0, 3))
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, 1.0], [1.0, 0.0])
    """
    return _StraightThrough.apply(check_real(x), qp)


def unclamped_codes(x: Tensor, qp: QParams) -> Tensor:
    """round(x / scale) + zero_point before clamping, float32 (exact: codes are far below 2**24)."""
    check_kind(qp, "qp", QParams, "choose_qparams gives").check_fits(x)
    x = x if x.dtype == torch.float64 else x.float()
    return torch.round(x * (1.0 / qp.scale).to(x.dtype)) + qp.zero_point


def _reals(codes: Tensor, qp: QParams) -> Tensor:
    """scale * (code - zero_point), float32; a product beyond float32 becomes its largest number, not infinity."""
    reals = qp.scale.float() * (codes - qp.zero_point).float()
    return reals.clamp_(-FLOAT32_MAX, FLOAT32_MAX)


def _check_bounds(min_val: Tensor, max_val: Tensor, qmin: int, qmax: int) -> None:
    if check_int(qmin, "qmin") >= check_int(qmax, "qmax"):
        raise ValueError(f"need qmin < qmax, got qmin={qmin}, qmax={qmax}")
    for name, bound in (("min_val", min_val), ("max_val", max_val)):
        if check_tensor(bound, name).is_floating_point() and not torch.isfinite(bound.float()).all():
            raise ValueError(f"{name} must be finite float32 numbers, got {bound}; has the observer seen any data?")
        check_real(bound, name)
    if min_val.shape != max_val.shape:
        raise ValueError(f"need bounds of one shape, got {tuple(min_val.shape)} and {tuple(max_val.shape)}")
    if (min_val > max_val).any():
        raise ValueError("need min_val <= max_val; are the two swapped?")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, qp):
        steps = unclamped_codes(x, qp)
        ctx.save_for_backward((steps >= qp.qmin) & (steps <= qp.qmax))
        limit = min(torch.finfo(x.dtype).max, FLOAT32_MAX)  # a finite number must not come back as infinity
        return _reals(steps.clamp(qp.qmin, qp.qmax), qp).clamp_(-limit, limit).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (inside,) = ctx.saved_tensors
        return grad * inside, None
