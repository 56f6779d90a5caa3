"""Tables of levels for codebooks: NF4, FP4, the 8-bit dynamic map, and levels fitted to data by k-means."""

import torch
from torch import Tensor

from quantlab.arguments import check_int, check_number, check_real


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
    return torch.cat([-down, torch.zeros_like(up[:1]), up.flip(0)]) / up[0]


def fp4_levels(*, smallest: float = 1 / 12) -> Tensor:
    """The 15 levels of FP4 E2M1, 0 ±½ ±1 ±1½ ±2 ±3 ±4 ±6 divided by 6, ascending, float32 (0 has two codes).

    bitsandbytes' "fp4" has 1/192 in the place of 1/12, and the other levels alike: smallest=1/192.

    >>> [round(v, 3) for v in fp4_levels().tolist()[7:]]
    [0.0, 0.083, 0.167, 0.25, 0.333, 0.5, 0.667, 1.0]
    """
    smallest = check_number(smallest, "smallest", above=0, high=0.16)  # the next level is 1/6
    up = torch.tensor([smallest * 12, 2, 3, 4, 6, 8, 12], dtype=torch.float32) / 12
    return torch.cat([-up.flip(0), torch.zeros_like(up[:1]), up])


def dynamic_levels() -> Tensor:
    """The 256 levels of the 8-bit dynamic map, ascending, float32: 0, 1, and ±127 fractions times powers of ten.

        for e = 0 .. 6: the centres of 2**e even bins of 0.1 .. 1, times 10**(e - 6)     Dettmers 2016, sec. 2.2

    >>> len(dynamic_levels()), dynamic_levels()[127].item()
    (256, 0.0)
    """
    bins = [torch.linspace(0.1, 1, 2**e + 1, dtype=torch.float32) for e in range(7)]
    up = torch.cat([10.0 ** (e - 6) * ((b[:-1] + b[1:]) / 2) for e, b in enumerate(bins)])
    return torch.cat([-up.flip(0), torch.zeros_like(up[:1]), up, torch.ones_like(up[:1])])


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
    x, count = check_real(x), check_int(count, "count", 2, 256)
    max_steps = check_int(max_steps, "max_steps", 1, 10**6)
    ordered = x.detach().double().flatten().sort().values
    distinct = ordered.unique_consecutive()
    if len(distinct) < count:
        raise ValueError(f"{count} levels need as many distinct values, got {len(distinct)}")
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])  # sums[b] - sums[a] is the sum of ordered[a:b]
    at = (2 * torch.arange(count, device=x.device) + 1) * len(distinct) // (2 * count)
    levels, ends = distinct[at], None
    for _ in range(max_steps):
        inner = torch.searchsorted(ordered, midpoints(levels), right=True)
        if ends is not None and torch.equal(inner, ends[1:-1]):
            break
        ends = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])
        means = sums[ends].diff() / ends.diff()
        levels = torch.where(ends.diff() > 0, means, levels)
    return levels.float()


def midpoints(levels: Tensor) -> Tensor:
    """Where the nearest level changes, (levels - 1,)."""
    return (levels[:-1] + levels[1:]) / 2


def check_levels(levels) -> Tensor:
    """levels as float32; ValueError unless they are 2..256 ascending finite numbers."""
    levels = check_real(levels, "levels")
    if levels.ndim != 1 or not 2 <= len(levels) <= 256:
        raise ValueError(f"levels must be a row of 2..256 numbers, got the shape {tuple(levels.shape)}")
    levels = levels.detach().float()
    if (levels.diff() <= 0).any():
        raise ValueError("levels must ascend, each above the one before (as float32); sort them, drop doubles")
    return levels
