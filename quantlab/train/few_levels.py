"""Three values and two: -s, 0, s and -s, s, with s the mean magnitude of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.arguments import check_codes, check_int, check_real, check_tensor, kind
from quantlab.blocks import from_blocks, mean_magnitude, to_blocks
from quantlab.codebook import CodebookTensor
from quantlab.granularity import Granularity, PerAxis, PerGroup, PerTensor, QTensor, symmetric_qtensor

SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # the smallest normal number: 1 / scale stays finite


def ternary(x: Tensor, granularity: Granularity | None = None) -> Tensor:
    """x with three values in each block, -s, 0 and s, as floats (default: one s for the tensor).

        s = mean |x|      x̂ = s * clamp(round(x / s), -1, 1)      BitNet b1.58, Ma et al. 2024, eq. 1-3

    The gradient passes unchanged everywhere, as there: nothing is masked, and none flows through s.

    Raises: ValueError if x is not floating point, is empty or holds NaN or infinity.

    >>> ternary(torch.tensor([0.1, -0.9, 0.4, 1.0])).tolist()
    [0.0, -0.6000000238418579, 0.6000000238418579, 0.6000000238418579]
    """
    x, granularity = check_real(x), PerTensor() if granularity is None else granularity
    codes, scale = _ternary_codes(x.detach(), granularity)
    return _PassThrough.apply(x, from_blocks(scale * codes, granularity, x.shape).to(x.dtype))


def quantize_ternary(x: Tensor, granularity: Granularity | None = None) -> QTensor:
    """The values of ternary(x) as codes -1, 0, 1 and scales. nbytes counts 2 bits a code, as they are stored.

    Five codes fit a byte (pack_ternary, 1.6 bits); the limit is log2(3) = 1.585 bits if all are as frequent.

    >>> quantize_ternary(torch.tensor([0.1, -0.9, 0.4, 1.0])).codes.tolist()
    [0, -1, 1, 1]
    """
    x, granularity = check_real(x).detach(), PerTensor() if granularity is None else granularity
    codes, scale = _ternary_codes(x, granularity)
    return symmetric_qtensor(x, codes, scale, 2, granularity)


def pack_ternary(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 at five in a byte, 1.6 bits each: byte = Σ (code_i + 1) 3**i, uint8; the last is filled up.

    >>> pack_ternary(torch.tensor([-1, 0, 1, 1, 0, 1])).tolist()      # 0 + 3 + 18 + 54 + 81, 2 + 3 + 9 + 27 + 81
    [156, 122]
    """
    digits = check_codes(codes).reshape(-1).to(torch.int64)
    if digits.numel() and digits.abs().max() > 1:
        raise ValueError(f"ternary codes are -1, 0 and 1, got {digits.min().item()}..{digits.max().item()}")
    digits = F.pad(digits, (0, -len(digits) % 5)).view(-1, 5) + 1
    return (digits * 3 ** torch.arange(5, device=codes.device)).sum(1).to(torch.uint8)


def unpack_ternary(packed: Tensor, *, count: int) -> Tensor:
    """The first `count` codes of pack_ternary, int8, (count,).

    >>> unpack_ternary(torch.tensor([156, 122], dtype=torch.uint8), count=6).tolist()
    [-1, 0, 1, 1, 0, 1]
    """
    if check_tensor(packed, "packed").dtype != torch.uint8:
        raise ValueError(f"packed must be uint8, got {kind(packed)}")
    if packed.numel() and packed.max() > 242:
        raise ValueError(f"five ternary codes make 0..242, got {packed.max().item()}")
    count = check_int(count, "count", 0, 5 * packed.numel())
    digits = packed.reshape(-1, 1).to(torch.int64) // 3 ** torch.arange(5, device=packed.device) % 3
    return (digits - 1).to(torch.int8).view(-1)[:count]


def binary(x: Tensor, granularity: Granularity | None = None) -> Tensor:
    """x with two values in each block, -s and s, as floats (default: one s for the tensor).

        s = mean |x|      x̂ = s * sign(x), sign(0) = +1      XNOR-Net, Rastegari et al. 2016, eq. 6

    No other s has as small a ‖x - x̂‖. The gradient passes unchanged everywhere, and none flows through s.

    Raises: ValueError if x is not floating point, is empty or holds NaN or infinity.

    >>> binary(torch.tensor([0.0, -0.5, 1.0])).tolist()
    [0.5, -0.5, 0.5]
    """
    x, granularity = check_real(x), PerTensor() if granularity is None else granularity
    scale = mean_magnitude(x.detach(), granularity).float()
    value = torch.where(to_blocks(x.detach(), granularity) < 0, -scale, scale)
    return _PassThrough.apply(x, from_blocks(value, granularity, x.shape).to(x.dtype))


def quantize_binary(x: Tensor, granularity: Granularity | None = None) -> CodebookTensor:
    """The values of binary(x) as one bit each and a scale a block.

    Two values without a 0 between them are no affine grid with an integer zero_point, so this is a codebook of -1 and
    1, in blocks of the flattened tensor. Raises: ValueError if a group does not divide the last dimension, or an axis
    other than the first is kept.

    >>> q = quantize_binary(torch.tensor([[0.0, -0.5, 1.0, 4.5]]), PerGroup(2))
    >>> q.codes.tolist(), q.absmax.tolist()
    ([[1, 0, 1, 1]], [0.25, 2.75])
    """
    x, granularity = check_real(x).detach(), PerTensor() if granularity is None else granularity
    size = to_blocks(x, granularity).shape[1]
    if isinstance(granularity, PerGroup) and x.shape[-1] % size:
        raise ValueError(
            f"binary blocks run on over the rows: group_size must divide {x.shape[-1]}, got {granularity.group_size}"
        )
    if isinstance(granularity, PerAxis) and granularity.axis % x.ndim:
        raise ValueError(f"binary blocks are rows: PerAxis(0), got {granularity}")
    scale = mean_magnitude(x, granularity).float().flatten()
    levels = torch.tensor([-1.0, 1.0], dtype=torch.float32, device=x.device)
    return CodebookTensor((x >= 0).to(torch.uint8), scale, levels, size, x.dtype)


def in_steps(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, as x * (1 / scale), in float32 or, for a float64 x, in float64: fewer bits would give other codes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) * (1 / scale).to(wide)


def _ternary_codes(x: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Codes, (blocks, elements), and scales, (blocks, 1), float32."""
    scale = mean_magnitude(x, granularity).clamp(min=SMALLEST_SCALE).float()
    return in_steps(to_blocks(x, granularity), scale).round().clamp(-1, 1).float(), scale


class _PassThrough(torch.autograd.Function):
    """The given value; the gradient of x is that of the result."""

    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None
