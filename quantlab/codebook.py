"""Codebooks: each value becomes the index of the nearest of a few levels. NF4 is one such table of levels.

This file is the plain way; where it is felt, codebook_fast.py does the same faster.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_codes, check_flag, check_int, check_real, check_tensor
from quantlab.codebook_fast import fast_nearest, look_up, pair_table
from quantlab.levels import check_levels, dynamic_levels, fp4_levels, kmeans_levels, midpoints, nf4_levels
from quantlab.quantized import DTYPES, Quantized

__all__ = [
    "PUBLISHED", "CodebookTensor", "DoubleQuantized", "dynamic_levels", "fp4_levels", "kmeans_levels",
    "nearest_level", "nf4_levels", "normalize_blocks", "quantize_codebook",
]  # fmt: skip

_PIECE = 2**19  # elements at a time: few enough to stay in the cache, enough to hide the cost of a call
# Levels that need not be stored, because a name says them.
PUBLISHED = {"nf4": nf4_levels(), "fp4": fp4_levels(), "fp4 (bitsandbytes)": fp4_levels(smallest=1 / 192)}


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the level nearest to each value, uint8, in the shape of x; a tie goes to the lower level.

    >>> nearest_level(torch.tensor([-9.0, 0.4, 0.5, 0.6]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
    [0, 1, 1, 2]
    """
    x = check_real(x)
    middles = midpoints(check_levels(levels))
    return torch.bucketize(x.contiguous(), middles.to(x.device), out_int32=True).to(torch.uint8)


def normalize_blocks(x: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """(values, absmax): x flattened, each block divided by its largest magnitude, and those magnitudes, float32.

    Blocks run over the flattened tensor; the last one may be short. An all-zero block stays zero.

    >>> values, absmax = normalize_blocks(torch.tensor([1.0, -4.0, 2.0]), block_size=2)
    >>> values.tolist(), absmax.tolist()
    ([0.25, -1.0, 1.0], [4.0, 2.0])
    """
    flat, block_size = _flat_float32(x), check_int(block_size, "block_size", 1)
    parts = [_normalized(flat, piece, block_size) for piece, _ in _pieces(len(flat), block_size)]
    values, absmax = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(absmax)


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """The absmax of each block, itself in 8 bits: dynamic_levels()[codes] * absmax of its 256 + offset."""

    codes: Tensor  # uint8, (blocks,)
    absmax: Tensor  # float32, one for each 256 blocks
    offset: Tensor  # float32, (): the mean absmax

    def dequantize(self) -> Tensor:
        """The absmax of each block, float32, (blocks,)."""
        inner = CodebookTensor(self.codes, self.absmax, dynamic_levels().to(self.codes.device), 256)
        return inner.dequantize() + self.offset


@dataclass(frozen=True, eq=False)
class CodebookTensor(Quantized):
    """A tensor as indices into a table: real ≈ levels[code] * absmax of the block."""

    codes: Tensor  # uint8, the shape of the original
    absmax: Tensor | DoubleQuantized  # float32 (blocks,), or the same in 8 bits
    levels: Tensor  # float32, ascending
    block_size: int  # elements of the flattened tensor that share an absmax; the last block may be short
    dtype: torch.dtype = torch.float32  # of the original, and of dequantize()

    def __post_init__(self):
        blocks = -(-check_codes(self.codes).numel() // check_int(self.block_size, "block_size", 1))
        count = len(self.absmax) if isinstance(self.absmax, Tensor) else len(self.absmax.codes)
        if count != blocks:
            raise ValueError(f"{blocks} blocks of {self.block_size} codes need as many absmax, got {count}")

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """The reals that the codes stand for, in the dtype of the original; into `out` if one is given.

        Raises: ValueError if out has another shape or dtype, or is not contiguous.
        """
        if out is None:
            out = torch.empty(self.codes.shape, dtype=self.dtype, device=self.codes.device)
        elif (out.shape, out.dtype) != (self.codes.shape, self.dtype) or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous, {tuple(self.codes.shape)}, {self.dtype}, got {tuple(out.shape)}, {out.dtype}"
            )
        direct = self.dtype == torch.float32
        values = out.view(-1) if direct else torch.empty(out.numel(), dtype=torch.float32, device=out.device)
        absmax, levels = self.block_absmax(), self.levels.contiguous()
        codes, pairs = self.codes.reshape(-1), pair_table(levels)
        pieces = list(_pieces(len(codes), self.block_size))
        room = torch.empty(len(codes[pieces[0][0]]) // 2, dtype=torch.int32, device=codes.device)
        for piece, blocks in pieces:
            part, scale = values[piece], absmax[blocks, None]
            look_up(codes[piece], levels, pairs, room, part)
            part.view(len(scale), -1).mul_(scale)
        limit = torch.finfo(self.dtype).max
        if absmax.abs().max() * levels.abs().max() > limit:  # a finite number must not come back as infinity
            values.clamp_(-limit, limit)
        if not direct:
            out.view(-1).copy_(values)
        return out

    def block_absmax(self) -> Tensor:
        """The absmax of each block as dequantize() uses it, float32, (blocks,)."""
        return self.absmax if isinstance(self.absmax, Tensor) else self.absmax.dequantize()

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def table(self) -> str | None:
        """The name of the levels, if they are published ones."""
        return next((name for name, one in PUBLISHED.items() if torch.equal(one, self.levels.cpu())), None)

    def side_parts(self) -> dict[str, Tensor]:
        """absmax, as it is or in 8 bits, and the levels unless a name says them."""
        if isinstance(self.absmax, Tensor):
            parts = {"absmax": self.absmax}
        else:
            parts = {f"absmax.{name}": value for name, value in vars(self.absmax).items()}
        return parts if self.table else parts | {"levels": self.levels}

    def settings(self) -> dict:
        return super().settings() | {"table": self.table, "block_size": self.block_size}

    @classmethod
    def from_codes(cls, codes: Tensor, parts: dict[str, Tensor], settings: dict) -> "CodebookTensor":
        if "absmax" in parts:
            absmax = parts["absmax"]
        else:
            absmax = DoubleQuantized(*(parts[f"absmax.{name}"] for name in ("codes", "absmax", "offset")))
        levels = parts["levels"] if settings["table"] is None else PUBLISHED[settings["table"]].to(codes.device)
        if codes.numel() and int(codes.max()) >= len(levels):
            raise ValueError(f"the largest code is {int(codes.max())}, and there are {len(levels)} levels")
        return cls(codes, absmax, levels, settings["block_size"], DTYPES[settings["dtype"]])


def quantize_codebook(x: Tensor, levels: Tensor, *, block_size: int = 64, double_quant: bool = False) -> CodebookTensor:
    """x in blocks of block_size, each divided by its largest magnitude and rounded to the nearest level.

        code = index of the level nearest to x * (1 / absmax), ties to the lower      absmax = max |x| of the block

    Blocks run over the flattened tensor, whatever its shape; a short last block is divided, x / absmax, as in
    bitsandbytes, whose codes and values these are. Blocks with absmax below 1e-38 may be off by as much.
    double_quant stores absmax minus its mean in 8 bits, in blocks of 256 (QLoRA, sec. 3): 4.127 instead of 4.5 bits.
    These 8-bit codes are the nearest; bitsandbytes' differ from them by one, at times, next to a tie.

    Raises: ValueError if x is not finite, levels are not 2..256 ascending finite numbers, or block_size < 1.

    >>> q = quantize_codebook(torch.tensor([[0.1, -0.2], [4.0, 1.0]]), nf4_levels(), block_size=2)
    >>> q.codes.tolist(), q.absmax.tolist(), q.bits_per_element
    ([[12, 0], [15, 10]], [0.20000000298023224, 4.0], 20.0)
    """
    flat, levels = _flat_float32(x), check_levels(levels).to(x.device)
    block_size, double_quant = check_int(block_size, "block_size", 1), check_flag(double_quant, "double_quant")
    codes = torch.empty(len(flat), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-len(flat) // block_size), dtype=torch.float32, device=x.device)
    nearest = fast_nearest(levels) or (lambda values: nearest_level(values, levels))
    for piece, blocks in _pieces(len(flat), block_size):
        values, absmax[blocks] = _normalized(flat, piece, block_size)
        codes[piece] = nearest(values)
    stored = _double_quantize(absmax) if double_quant else absmax
    dtype = x.dtype if x.element_size() > 1 else torch.float32  # 8-bit floats are taken as float32
    return CodebookTensor(codes.view(x.shape), stored, levels, block_size, dtype)


def _double_quantize(absmax: Tensor) -> DoubleQuantized:
    offset = absmax.mean()
    if not torch.isfinite(offset):  # the sum of the largest float32 numbers is none
        offset = absmax.double().mean().float()
    inner = quantize_codebook(absmax - offset, dynamic_levels(), block_size=256)
    return DoubleQuantized(inner.codes, inner.absmax, offset)


def _normalized(flat: Tensor, piece: slice, block_size: int) -> tuple[Tensor, Tensor]:
    """(values in -1..1, absmax) of a run of whole blocks, or of the short last block."""
    part = flat[piece]
    short = len(part) % block_size != 0
    blocks = part.view(1 if short else -1, len(part) if short else block_size)
    absmax = blocks.abs().amax(1)
    if not torch.isfinite(absmax).all():  # cheaper than to look at each x, and as sure
        check_real(flat, "x (as float32)")
    divisor = absmax.clamp(min=1e-38)[:, None]  # 1 / 1e-38 is finite, and an all-zero block stays zero
    return (blocks / divisor if short else blocks * (1 / divisor)).view(-1), absmax


def _pieces(count: int, block_size: int) -> Iterator[tuple[slice, slice]]:
    """(elements, blocks) of runs of whole blocks of about _PIECE elements, then of the short last block, if any.

    A run holds an even number of blocks, so that each starts at an even element and codes can be read in pairs.
    """
    whole, run = count // block_size, max(2, _PIECE // block_size // 2 * 2)
    for first in range(0, whole, run):
        last = min(first + run, whole)
        yield slice(first * block_size, last * block_size), slice(first, last)
    if count % block_size:
        yield slice(whole * block_size, count), slice(whole, whole + 1)


def _flat_float32(x: Tensor) -> Tensor:
    """x flattened, float32; that it is finite remains to be checked, which _normalized does as it goes."""
    if not check_tensor(x).is_floating_point() or x.numel() == 0:
        check_real(x)
    return x.detach().reshape(-1).float()
