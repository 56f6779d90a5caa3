"""What codebook.py computes, faster: the nearest level by a table of cells, and looking levels up two at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from quantlab.levels import midpoints


def fast_nearest(levels: Tensor) -> Callable[[Tensor], Tensor] | None:
    """nearest_level(x, levels) for x in -1..1 as a function some ten times as fast; None if levels are too close.

    -1..1 is cut into even cells, so few that a table of them stays in the cache, so many that no cell holds two
    midpoints. Then code(x) = midpoints in the cells before + (x > the midpoint in the cell of x). That is exact in
    spite of rounding in _cell, because _cell never falls as x grows: a midpoint in an earlier cell lies below x.
    """
    # Where exactly midpoints lie beyond ±2 makes no difference to x in -1..1, and their cells stay small numbers.
    middles = midpoints(levels).clamp(-2, 2)
    for cells in (64, 256, 1024):
        cell = _cell(middles, cells).clamp(0, cells)
        if len(cell.unique()) == len(cell):
            break
    else:  # levels as close as those of dynamic_levels()
        return None
    every = torch.arange(cells + 1, dtype=torch.int32, device=levels.device)
    before = torch.searchsorted(cell, every).to(torch.uint8)
    middle = levels.new_full((cells + 1,), torch.inf).index_copy(0, cell.long(), middles)

    def nearest(x: Tensor) -> Tensor:
        cell = _cell(x, cells)
        return before.index_select(0, cell).add_(x > middle.index_select(0, cell))

    return nearest


def _cell(x: Tensor, cells: int) -> Tensor:
    """Which of the even cells of -1..1 each value lies in, int32; 1.0 has one of its own at the end."""
    return x.add(1).mul_(cells / 2).to(torch.int32)


def pair_table(levels: Tensor) -> Tensor | None:
    """Two levels, as one 64-bit word, for each pair of codes read as one 16-bit number; None if codes exceed 127."""
    if len(levels) > 128:
        return None
    numbers = torch.arange((len(levels) - 1) * 257 + 1, dtype=torch.int16, device=levels.device)
    codes = numbers.view(torch.uint8).clamp(max=len(levels) - 1)
    return levels[codes.int()].view(torch.float64)


def look_up(codes: Tensor, levels: Tensor, pairs: Tensor | None, room: Tensor, out: Tensor) -> None:
    """out = levels[codes]: two at a time, in half as many steps, unless their number or place in memory is odd."""
    if pairs is None or (len(codes) | codes.storage_offset() | out.storage_offset()) % 2:
        torch.index_select(levels, 0, codes.to(torch.int32), out=out)
    else:
        index = room[: len(codes) // 2].copy_(codes.view(torch.int16))  # index_select takes no 16-bit index
        torch.index_select(pairs, 0, index, out=out.view(torch.float64))
