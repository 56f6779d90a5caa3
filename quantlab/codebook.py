"""Codebooks: each value becomes the index of the nearest of a few levels. NF4 is one such table of levels."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantlab.arguments import check_int, check_real
from quantlab.packing import pack

_PIECE = 2**19  # elements at a time: few enough to stay in the cache, enough to hide the cost of a call


# --- tables of levels -------------------------------------------------------------------------------------------


def nf4_levels() -> Tensor:
    """The 16 levels of NF4 (NormalFloat4), ascending from -1 to 1, float32: 7 negative, an exact 0, 8 positive.

        quantiles of the normal distribution at linspace(δ, ½, 9) upwards and linspace(δ, ½, 8) downwards,
        each without the ½; a 0 between them; all divided by the largest      Dettmers et al. 2023 (QLoRA), sec. 3
        δ = 1 - (1/30 + 1/32) / 2, midway between the outermost quantiles of 15 and of 16 even bins

    bitsandbytes published this table from δ to seven digits and a float32 grid. The same roundings are done here,
    so that every level has the published value to the last bit.

    >>> [round(v, 3) for v in nf4_levels().tolist()[:4]], nf4_levels().diff().argmin().item()
    ([-1.0, -0.696, -0.525, -0.395], 7)
    """
    delta = round(1 - (1 / 30 + 1 / 32) / 2, 7)
    up, down = (
        torch.special.ndtri(torch.linspace(delta, 0.5, count, dtype=torch.float32)[:-1].double()).float()
        for count in (9, 8)
    )
    return torch.cat([-down, torch.zeros(1), up.flip(0)]) / up[0]


def fp4_levels(*, smallest: float = 1 / 12) -> Tensor:
    """The 15 levels of FP4 E2M1, 0 ±½ ±1 ±1½ ±2 ±3 ±4 ±6 divided by 6, ascending, float32 (0 has two codes).

    bitsandbytes' "fp4" has 1/192 in the place of 1/12, and the other levels alike: smallest=1/192.

    >>> [round(v, 3) for v in fp4_levels().tolist()[7:]]
    [0.0, 0.083, 0.167, 0.25, 0.333, 0.5, 0.667, 1.0]
    """
    up = torch.tensor([smallest * 12, 2, 3, 4, 6, 8, 12]) / 12
    return torch.cat([-up.flip(0), torch.zeros(1), up])


def dynamic_levels() -> Tensor:
    """The 256 levels of the 8-bit dynamic map, ascending, float32: 0, 1, and ±127 fractions times powers of ten.

        for e = 0 .. 6: the centres of 2**e even bins of 0.1 .. 1, times 10**(e - 6)     Dettmers 2016, sec. 2.2

    >>> len(dynamic_levels()), dynamic_levels()[127].item()
    (256, 0.0)
    """
    bins = [torch.linspace(0.1, 1, 2**e + 1) for e in range(7)]
    up = torch.cat([10.0 ** (e - 6) * ((b[:-1] + b[1:]) / 2) for e, b in enumerate(bins)])
    return torch.cat([-up.flip(0), torch.tensor([0.0]), up, torch.tensor([1.0])])


def kmeans_levels(x: Tensor, count: int = 16, *, max_steps: int = 300) -> Tensor:
    """`count` levels with (locally) least mean squared error for the values x, ascending, float32.

    Lloyd 1982: each value joins its nearest level, each level moves to the mean of its values, and so on until no
    value changes its level, or max_steps. It starts from even quantiles of the distinct values of x, so the same x
    gives the same levels. A level that no value is nearest to any more stays where it is. All values count alike;
    for blocks, pass normalize_blocks(x, block_size=64)[0].

    Raises: ValueError if x holds fewer than count distinct values, or count is not 2..256.

    >>> kmeans_levels(torch.tensor([0.0, 0.1, 0.9, 1.0, 1.1]), 2).tolist()
    [0.05000000074505806, 1.0]
    """
    check_real(x)
    check_int(count, "count", 2, 256)
    check_int(max_steps, "max_steps", 1)
    ordered = x.detach().double().flatten().sort().values
    distinct = ordered.unique_consecutive()
    if len(distinct) < count:
        raise ValueError(f"{count} levels need as many distinct values, got {len(distinct)}")
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])  # sums[b] - sums[a] is the sum of ordered[a:b]
    at = (2 * torch.arange(count, device=x.device) + 1) * len(distinct) // (2 * count)
    levels, ends = distinct[at], None
    for _ in range(max_steps):
        inner = torch.searchsorted(ordered, _midpoints(levels), right=True)
        if ends is not None and torch.equal(inner, ends[1:-1]):
            break
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])
        means = sums[ends].diff() / ends.diff()
        levels = torch.where(ends.diff() > 0, means, levels)
    return levels.float()


# --- quantizing -------------------------------------------------------------------------------------------------


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """The index of the level nearest to each value, uint8, in the shape of x; a tie goes to the lower level.

    >>> nearest_level(torch.tensor([-9.0, 0.4, 0.5, 0.6]), torch.tensor([-1.0, 0.0, 1.0])).tolist()
    [0, 1, 1, 2]
    """
    check_real(x)
    middles = _midpoints(_checked_levels(levels))
    return torch.bucketize(x.contiguous(), middles.to(x.device), out_int32=True).to(torch.uint8)


def normalize_blocks(x: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """(values, absmax): x flattened, each block divided by its largest magnitude, and those magnitudes, float32.

    Blocks run over the flattened tensor; the last one may be short. An all-zero block stays zero.

    >>> values, absmax = normalize_blocks(torch.tensor([1.0, -4.0, 2.0]), block_size=2)
    >>> values.tolist(), absmax.tolist()
    ([0.25, -1.0, 1.0], [4.0, 2.0])
    """
    flat = _flat_float32(x)
    check_int(block_size, "block_size", 1)
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
class CodebookTensor:
    """A tensor as indices into a table: real ≈ levels[code] * absmax of the block."""

    codes: Tensor  # uint8, the shape of the original
    absmax: Tensor | DoubleQuantized  # float32 (blocks,), or the same in 8 bits
    levels: Tensor  # float32, ascending
    block_size: int  # elements of the flattened tensor that share an absmax; the last block may be short
    dtype: torch.dtype = torch.float32  # of the original, and of dequantize()

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
        values = out.view(-1) if direct else torch.empty(out.numel(), device=out.device)
        absmax, levels = self.block_absmax(), self.levels.contiguous()
        codes, pairs = self.codes.reshape(-1), _pair_table(levels)
        pieces = list(_pieces(len(codes), self.block_size))
        room = torch.empty(len(codes[pieces[0][0]]) // 2, dtype=torch.int32, device=codes.device)
        for piece, blocks in pieces:
            part, scale = values[piece], absmax[blocks, None]
            _look_up(codes[piece], levels, pairs, room, part)
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

    def packed(self) -> Tensor:
        """The codes as a stream of bits (see packing.pack)."""
        return pack(self.codes, bits=self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes to store it: packed codes, absmax, and the levels unless they are a published table (NF4, FP4)."""
        scales = [self.absmax] if isinstance(self.absmax, Tensor) else list(vars(self.absmax).values())
        stored = scales if _is_published(self.levels) else [*scales, self.levels]
        return -(-self.codes.numel() * self.bits // 8) + sum(t.numel() * t.element_size() for t in stored)

    @property
    def bits_per_element(self) -> float:
        """True bits for each element, absmax included."""
        return 8 * self.nbytes / self.codes.numel()


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
    flat, levels = _flat_float32(x), _checked_levels(levels).to(x.device)
    check_int(block_size, "block_size", 1)
    codes = torch.empty(len(flat), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(-(-len(flat) // block_size), device=x.device)
    nearest = _fast_nearest(levels)
    for piece, blocks in _pieces(len(flat), block_size):
        values, absmax[blocks] = _normalized(flat, piece, block_size)
        codes[piece] = nearest(values)
    stored = _double_quantize(absmax) if double_quant else absmax
    return CodebookTensor(codes.view(x.shape), stored, levels, block_size, x.dtype)


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


# --- the same, fast ---------------------------------------------------------------------------------------------


def _fast_nearest(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that equals nearest_level(x, levels) for x in -1..1, some ten times as fast if levels allow.

    -1..1 is cut into even cells, so few that a table of them stays in the cache, so many that no cell holds two
    midpoints. Then code(x) = midpoints in the cells before + (x > the midpoint in the cell of x). That is exact in
    spite of rounding in _cell, because _cell never falls as x grows: a midpoint in an earlier cell lies below x.
    """
    # Where exactly midpoints lie beyond ±2 makes no difference to x in -1..1, and their cells stay small numbers.
    middles = _midpoints(levels).clamp(-2, 2)
    for cells in (64, 256, 1024):
        cell = _cell(middles, cells).clamp(0, cells)
        if len(cell.unique()) == len(cell):
            break
    else:  # levels as close as those of dynamic_levels()
        return lambda x: nearest_level(x, levels)
    every = torch.arange(cells + 1, dtype=torch.int32, device=levels.device)
    before = torch.searchsorted(cell, every).to(torch.uint8)
    middle = torch.full((cells + 1,), torch.inf, device=levels.device).index_copy(0, cell.long(), middles)

    def nearest(x: Tensor) -> Tensor:
        cell = _cell(x, cells)
        return before.index_select(0, cell).add_(x > middle.index_select(0, cell))

    return nearest


def _cell(x: Tensor, cells: int) -> Tensor:
    """Which of the even cells of -1..1 each value lies in, int32; 1.0 has one of its own at the end."""
    return x.add(1).mul_(cells / 2).to(torch.int32)


def _pair_table(levels: Tensor) -> Tensor | None:
    """Two levels, as one 64-bit word, for each pair of codes read as one 16-bit number; None if codes exceed 127."""
    if len(levels) > 128:
        return None
    numbers = torch.arange((len(levels) - 1) * 257 + 1, dtype=torch.int16, device=levels.device)
    codes = numbers.view(torch.uint8).clamp(max=len(levels) - 1)
    return levels[codes.int()].view(torch.float64)


def _look_up(codes: Tensor, levels: Tensor, pairs: Tensor | None, room: Tensor, out: Tensor) -> None:
    """out = levels[codes]: two at a time, in half as many steps, unless their number or place in memory is odd."""
    if pairs is None or (len(codes) | codes.storage_offset() | out.storage_offset()) % 2:
        torch.index_select(levels, 0, codes.to(torch.int32), out=out)
    else:
        index = room[: len(codes) // 2].copy_(codes.view(torch.int16))  # index_select takes no 16-bit index
        torch.index_select(pairs, 0, index, out=out.view(torch.float64))


# --- small things -----------------------------------------------------------------------------------------------


def _midpoints(levels: Tensor) -> Tensor:
    return (levels[:-1] + levels[1:]) / 2


def _flat_float32(x: Tensor) -> Tensor:
    """x flattened, float32; that it is finite remains to be checked."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.numel() == 0:
        check_real(x)
    return x.detach().reshape(-1).float()


def _checked_levels(levels: Tensor) -> Tensor:
    check_real(levels, "levels")
    if levels.ndim != 1 or not 2 <= len(levels) <= 256:
        raise ValueError(f"levels must be a row of 2..256 numbers, got the shape {tuple(levels.shape)}")
    levels = levels.detach().float()
    check_real(levels, "levels as float32")
    if (levels.diff() <= 0).any():
        raise ValueError("levels must ascend, each above the one before (as float32); sort them, drop doubles")
    return levels


def _is_published(levels: Tensor) -> bool:
    return any(torch.equal(levels.cpu(), table) for table in _published())


@cache
def _published() -> tuple[Tensor, ...]:
    return nf4_levels(), fp4_levels(), fp4_levels(smallest=1 / 192)
