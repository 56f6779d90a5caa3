"""GGUF's simple blocks of 32 weights: a float16 scale, in Q4_1 a float16 least value, and 32 codes.

encode takes float32 blocks (n, 32), and weights of their errors or None, and gives their bytes (n, bytes); decode is
the way back. Without weights the bytes are those of llama.cpp's plain rounding, with them those of its search.
"""

import torch
from torch import Tensor

from quantlab.export.gguf_fits import fit_affine, fit_scale

_STARTS = torch.tensor(0.05, dtype=torch.float32) * torch.arange(37) - 0.9  # of fit_affine, as llama.cpp has them


def halves(x: Tensor) -> Tensor:
    """The two bytes of each float16, (..., 2 · last dimension)."""
    return x.half().view(torch.uint8)


def floats(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float()


def nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15, two a byte: the first half of the last dimension in the low four bits, the second in the high."""
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4


def from_nibbles(raw: Tensor) -> Tensor:
    return torch.cat([raw & 15, raw >> 4], -1)


def bit_planes(codes: Tensor, shift: int) -> Tensor:
    """The bits of codes (..., parts, n) from `shift` up, of part i at bit i · (8 / parts) of byte n."""
    places = torch.arange(0, 8, 8 // codes.shape[-2]).unsqueeze(-1)
    return ((codes.int() >> shift) << places).sum(-2).to(torch.uint8)


def from_bit_planes(raw: Tensor, parts: int) -> Tensor:
    places = torch.arange(0, 8, 8 // parts).unsqueeze(-1)
    return (raw.unsqueeze(-2).int() >> places) & (2 ** (8 // parts) - 1)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is no number."""
    return torch.where((1 / scale).isfinite(), 1 / scale, 0.0)


def encode_q8_0(x: Tensor, weights: Tensor | None) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    steps = x * inverse(scale)
    whole = steps.abs().floor()
    codes = steps.sign() * (whole + (2 * (steps.abs() - whole)).floor())  # halves away from zero
    return torch.cat([halves(scale), codes.to(torch.int8).view(torch.uint8)], -1)


def decode_q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * floats(raw[:, :2])


def _symmetric(x: Tensor, weights: Tensor | None, half: int) -> tuple[Tensor, Tensor]:
    """(scale, codes 0..2·half - 1): the value of the largest magnitude, with its sign, is -half steps."""
    if weights is not None:
        return fit_scale(x, weights, half)[::-1]
    scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -half
    return scale, (x * inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)


def encode_q4_0(x: Tensor, weights: Tensor | None) -> Tensor:
    scale, codes = _symmetric(x, weights, 8)
    return torch.cat([halves(scale), nibbles(codes)], -1)


def decode_q4_0(raw: Tensor) -> Tensor:
    return floats(raw[:, :2]) * (from_nibbles(raw[:, 2:]).float() - 8)


def _affine(x: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, least value, codes 0..top)."""
    if weights is not None:
        codes, scale, offset = fit_affine(x, weights, top, _STARTS)
        return scale, -offset, codes
    least = x.amin(-1, keepdim=True)
    scale = (x.amax(-1, keepdim=True) - least) / top
    return scale, least, ((x - least) * inverse(scale) + 0.5).trunc().clamp(0, top)


def encode_q4_1(x: Tensor, weights: Tensor | None) -> Tensor:
    scale, least, codes = _affine(x, weights, 15)
    return torch.cat([halves(scale), halves(least), nibbles(codes)], -1)


def decode_q4_1(raw: Tensor) -> Tensor:
    return floats(raw[:, :2]) * from_nibbles(raw[:, 4:]).float() + floats(raw[:, 2:4])


def encode_q5_0(x: Tensor, weights: Tensor | None) -> Tensor:
    scale, codes = _symmetric(x, weights, 16)
    return torch.cat([halves(scale), _fives(codes)], -1)


def decode_q5_0(raw: Tensor) -> Tensor:
    return floats(raw[:, :2]) * (_from_fives(raw[:, 2:]) - 16)


def encode_q5_1(x: Tensor, weights: Tensor | None) -> Tensor:
    scale, least, codes = _affine(x, weights, 31)
    return torch.cat([halves(scale), halves(least), _fives(codes)], -1)


def decode_q5_1(raw: Tensor) -> Tensor:
    return floats(raw[:, :2]) * _from_fives(raw[:, 4:]) + floats(raw[:, 2:4])


def _fives(codes: Tensor) -> Tensor:
    """32 codes of 5 bits in 20 bytes: bit i of the first four is the highest of code i, then the low four bits."""
    return torch.cat([bit_planes(codes.view(-1, 4, 8).mT, 4), nibbles(codes.to(torch.uint8) & 15)], -1)


def _from_fives(raw: Tensor) -> Tensor:
    return from_nibbles(raw[:, 4:]).float() + 16 * from_bit_planes(raw[:, :4], 8).mT.flatten(1)
