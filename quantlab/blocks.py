"""Which elements share one scale: the whole tensor, one index of an axis, or a group of neighbours."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.arguments import check_int, kind


@dataclass(frozen=True)
class PerTensor:
    """One scale for all elements."""


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of `axis`, the dimension that is kept: PerAxis(0) is one per row of a matrix."""

    axis: int

    def __post_init__(self):
        vars(self).update(axis=check_int(self.axis, "axis"))


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of group_size neighbours in the last dimension; the last run may be shorter."""

    group_size: int

    def __post_init__(self):
        vars(self).update(group_size=check_int(self.group_size, "group_size", 1))


Granularity = PerTensor | PerAxis | PerGroup


def rows_or_groups(group_size: int | None) -> Granularity:
    """The granularity of a weight (out, in): one scale a row (None), or one for each group of so many inputs."""
    return PerAxis(0) if group_size is None else PerGroup(group_size)


def to_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """x as (blocks, elements): a row for each scale. A short last group is filled up with zeros.

    >>> to_blocks(torch.arange(1.0, 6.0), PerGroup(2)).tolist()
    [[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]
    """
    scale_shape(x.shape, granularity)  # refuses what does not fit
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    if isinstance(granularity, PerAxis):
        return x.movedim(granularity.axis, 0).flatten(1) if x.ndim > 1 else x[:, None]
    size = min(granularity.group_size, x.shape[-1])
    # Zeros do not change a block's range, which choose_qparams widens to hold 0 anyway.
    return F.pad(x, (0, -x.shape[-1] % size)).reshape(-1, size)


def from_blocks(blocks: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """The inverse of to_blocks for a tensor of this shape."""
    if isinstance(granularity, PerTensor):
        return blocks.reshape(shape)
    if isinstance(granularity, PerAxis):
        axis = granularity.axis % len(shape)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return blocks.reshape(moved).movedim(0, axis)
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]


def scale_shape(shape: torch.Size, granularity: Granularity) -> tuple[int, ...]:
    """The shape of the scales of a tensor: () for PerTensor, (1, .., n, .., 1) for PerAxis, (..., groups) for PerGroup.

    Raises: ValueError if the granularity is none, or names a dimension that such a tensor has not.
    """
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerAxis):
        if not -len(shape) <= granularity.axis < len(shape):
            raise ValueError(f"PerAxis({granularity.axis}) names no dimension of a tensor with {len(shape)} dimensions")
        return tuple(n if i == granularity.axis % len(shape) else 1 for i, n in enumerate(shape))
    if not isinstance(granularity, PerGroup):
        raise ValueError(f"granularity must be PerTensor(), PerAxis(axis) or PerGroup(size), got {kind(granularity)}")
    if not shape:
        raise ValueError("PerGroup needs at least one dimension, got a scalar")
    return (*shape[:-1], -(-shape[-1] // granularity.group_size))


def block_sizes(x: Tensor, granularity: Granularity) -> Tensor:
    """How many elements each block has, (blocks, 1); a short last group counts only its own."""
    return to_blocks(torch.ones(x.shape, dtype=torch.float64, device=x.device), granularity).sum(1, keepdim=True)


def mean_magnitude(x: Tensor, granularity: Granularity) -> Tensor:
    """mean |x| of each block, (blocks, 1), float64."""
    return to_blocks(x.double().abs(), granularity).sum(1, keepdim=True) / block_sizes(x, granularity)
