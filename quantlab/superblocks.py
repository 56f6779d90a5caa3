"""Scales that are codes themselves: small blocks with whole-number scales inside a super-block with one float16."""

from typing import NamedTuple

import torch
from torch import Tensor

from quantlab.arguments import check_flag, check_int, check_real


class Rounded(NamedTuple):
    """A tensor rounded to the nearest value that its blocks can hold, and what those blocks cost."""

    values: Tensor  # float32, the shape of the original
    bits_per_element: float  # codes, the codes of scales, and float16 numbers


def round_in_superblocks(
    x: Tensor, *, bits: int = 4, block_size: int = 32, scale_bits: int = 6, super_size: int = 256, offset: bool = True
) -> Rounded:
    """x rounded in small blocks along its last dimension, whose scales are codes of scale_bits.

        x ≈ d·s·q - m·o   q of `bits`; s and o, of a small block, of scale_bits; d and m, of a super-block, float16

    offset=False leaves m·o away and has q around 0. scale_bits=16 stores each scale as a float16, without super-blocks.
    It is plain rounding: ranges are min and max, nothing is searched for. Q4_K is the default (and searches).

    Shapes: the last dimension of x must be a multiple of super_size, super_size of block_size.
    Raises: ValueError if they are not, or bits or scale_bits are not 1..8 (scale_bits: or 16).

    >>> round_in_superblocks(torch.arange(256.0), offset=False).bits_per_element
    4.25
    """
    bits, block_size = check_int(bits, "bits", 1, 8), check_int(block_size, "block_size", 1)
    scale_bits = check_int(scale_bits, "scale_bits", 1, 16)
    super_size, offset = check_int(super_size, "super_size", 1), check_flag(offset, "offset")
    if 8 < scale_bits < 16:
        raise ValueError(f"scale_bits must be 1..8, or 16 for a float16, got {scale_bits}")
    real = check_real(x)
    if real.ndim == 0 or real.shape[-1] % super_size or super_size % block_size:
        raise ValueError(
            f"{tuple(real.shape)} in super-blocks of {super_size} in blocks of {block_size} does not go up"
        )
    blocks = real.detach().float().reshape(-1, super_size // block_size, block_size)
    values = (_with_offset if offset else _around_zero)(blocks, bits, scale_bits)
    cost = 16 / block_size if scale_bits == 16 else scale_bits / block_size + 16 / super_size
    return Rounded(values.view(real.shape), bits + (2 if offset else 1) * cost)


def _with_offset(x: Tensor, bits: int, scale_bits: int) -> Tensor:
    """Codes 0..2ᵇ - 1 from the least value (0, if that is positive) to the largest."""
    top = 2**bits - 1
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    scale, offset = _stored((x.amax(-1, keepdim=True) - low) / top, scale_bits), _stored(-low, scale_bits)
    return scale * ((x + offset) / _divisor(scale)).round().clamp(0, top) - offset


def _around_zero(x: Tensor, bits: int, scale_bits: int) -> Tensor:
    """Codes -2ᵇ⁻¹..2ᵇ⁻¹ - 1; half a step beyond the last code is the largest magnitude."""
    half = 2 ** (bits - 1)
    scale = _stored(x.abs().amax(-1, keepdim=True) / (half - 0.5), scale_bits)
    return scale * (x / _divisor(scale)).round().clamp(-half, half - 1)


def _stored(values: Tensor, scale_bits: int) -> Tensor:
    """Positive values (supers, blocks, 1) as they come back: float16, or codes times a float16 for each super-block."""
    if scale_bits == 16:
        return values.half().float()
    unit = (values.amax(1, keepdim=True) / (2**scale_bits - 1)).half().float()
    return unit * (values / _divisor(unit)).round().clamp(max=2**scale_bits - 1)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, 1 where it is 0: all the same then."""
    return torch.where(scale == 0, 1.0, scale)
