"""GGUF's super-blocks of 256 weights: Q4_K and Q5_K, whose small blocks have scale and offset; Q6_K has scales only."""

import torch
from torch import Tensor

from quantlab.export.gguf_fits import NOTHING, fit_affine, fit_ladder, fit_scale, ladder
from quantlab.export.gguf_simple import bit_planes, floats, from_bit_planes, from_nibbles, halves, nibbles

_TWENTIETH, _TENTH = torch.tensor([0.05, 0.1], dtype=torch.float32)
_FINE = _TWENTIETH * torch.arange(37) - 0.9  # starts of fit_affine, as llama.cpp has them: with importance,
_PLAIN = {15: _TENTH * torch.arange(21) - 1.0, 31: _TENTH * torch.arange(16) - 0.5}  # and without


def encode_q4_k(x: Tensor, weights: Tensor | None) -> Tensor:
    head, codes = _affine_blocks(x, weights, 15)
    return torch.cat([head, _in_pairs(codes)], -1)


def decode_q4_k(raw: Tensor) -> Tensor:
    return _affine_values(raw, _from_pairs(raw[:, 16:]))


def encode_q5_k(x: Tensor, weights: Tensor | None) -> Tensor:
    head, codes = _affine_blocks(x, weights, 31)
    return torch.cat([head, bit_planes(codes, 4), _in_pairs(codes)], -1)


def decode_q5_k(raw: Tensor) -> Tensor:
    return _affine_values(raw, _from_pairs(raw[:, 48:]) + 16 * from_bit_planes(raw[:, 16:48], 8))


def _affine_blocks(x: Tensor, weights: Tensor | None, top: int) -> tuple[Tensor, Tensor]:
    """(the 16 bytes of scales, codes (n, 8, 32)) of super-blocks (n, 256): x ≈ d·s·code - m·o, s and o of 6 bits."""
    x = x.view(-1, 8, 32)
    if weights is None:
        weights = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
        codes, scale, offset = fit_affine(x, weights, top, _PLAIN[top])
        (s, d), (o, m) = ladder(scale.squeeze(-1)), ladder(offset.squeeze(-1))
    else:
        weights = weights.view(-1, 8, 32)
        codes, scale, offset = fit_affine(x, weights, top, _FINE)
        (s, d), (o, m) = (fit_ladder(v.squeeze(-1), weights.sum(-1)) for v in (scale, offset))
    steps, offsets = ((unit.half().float() * v).unsqueeze(-1) for unit, v in ((d, s), (m, o)))
    again = ((x + offsets) / steps).round().clamp(0, top)  # to the scales that are stored
    return torch.cat([halves(d), halves(m), _twelve(s, o)], -1), torch.where(steps == 0, codes, again)


def _affine_values(raw: Tensor, codes: Tensor) -> Tensor:
    s, o = _from_twelve(raw[:, 4:16])
    return (floats(raw[:, :2]) * s).unsqueeze(-1) * codes.float() - (floats(raw[:, 2:4]) * o).unsqueeze(-1)


def _twelve(s: Tensor, o: Tensor) -> Tensor:
    """Eight scales and eight offsets of 6 bits in 12 bytes: the last four's top two bits lie over the first four."""
    s, o = s.to(torch.uint8), o.to(torch.uint8)
    first = torch.cat([s[:, :4] | s[:, 4:] >> 4 << 6, o[:, :4] | o[:, 4:] >> 4 << 6], -1)
    return torch.cat([first, s[:, 4:] & 15 | o[:, 4:] << 4], -1)


def _from_twelve(raw: Tensor) -> tuple[Tensor, Tensor]:
    s, o, low = raw.split(4, -1)
    return (
        torch.cat([s & 63, low & 15 | s >> 6 << 4], -1).float(),
        torch.cat([o & 63, low >> 4 | o >> 6 << 4], -1).float(),
    )


def _in_pairs(codes: Tensor) -> Tensor:
    """The low four bits of codes (n, 8, 32): small blocks 0 and 1 share 32 bytes, then 2 and 3, and so on."""
    return nibbles((codes.to(torch.uint8) & 15).view(-1, 4, 64)).flatten(1)


def _from_pairs(raw: Tensor) -> Tensor:
    return from_nibbles(raw.reshape(-1, 4, 32)).view(-1, 8, 32)


def encode_q6_k(x: Tensor, weights: Tensor | None) -> Tensor:
    """16 small blocks of 16, x ≈ d·s·(code - 32): s of 8 bits with a sign, the largest of them is -128."""
    x = x.view(-1, 16, 16)
    weights = x.square() if weights is None else weights.view(-1, 16, 16)
    codes, scale = fit_scale(x, weights, 32)
    scale = scale.squeeze(-1)
    largest = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))
    empty = largest.abs() < NOTHING
    per = -128 / largest.masked_fill(empty, 1.0)
    d, s = (1 / per).masked_fill(empty, 0.0), (per * scale).round().clamp(max=127).masked_fill(empty, 0.0)
    steps = (d.half().float() * s).unsqueeze(-1)
    codes = torch.where(steps == 0, codes, (x / steps).round().clamp(-32, 31) + 32).masked_fill(empty[..., None], 0.0)
    parts = codes.to(torch.uint8).view(-1, 2, 4, 32)  # two halves of four times 32
    low = nibbles((parts & 15).flatten(2)).flatten(1)
    return torch.cat([low, bit_planes(parts, 4).flatten(1), s.to(torch.int8).view(torch.uint8), halves(d)], -1)


def decode_q6_k(raw: Tensor) -> Tensor:
    low = from_nibbles(raw[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    codes = (low + 16 * from_bit_planes(raw[:, 128:192].reshape(-1, 2, 32), 4)).view(-1, 16, 16).float() - 32
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    return (floats(raw[:, 208:]) * scales).unsqueeze(-1) * codes
