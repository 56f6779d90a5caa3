"""Which elements share one scale: the whole tensor, one index of an axis, or a group of neighbours."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, dequantize, quantize
from quantlab.arguments import check_int, check_real
from quantlab.packing import pack


@dataclass(frozen=True)
class PerTensor:
    """One scale for all elements."""


@dataclass(frozen=True)
class PerAxis:
    """One scale for each index of `axis`, the dimension that is kept: PerAxis(0) is one per row of a matrix."""

    axis: int


@dataclass(frozen=True)
class PerGroup:
    """One scale for each run of group_size neighbours in the last dimension; the last run may be shorter."""

    group_size: int

    def __post_init__(self):
        check_int(self.group_size, "group_size", 1)


Granularity = PerTensor | PerAxis | PerGroup


def rows_or_groups(group_size: int | None) -> Granularity:
    """The granularity of a weight (out, in): one scale a row (None), or one for each group of so many inputs."""
    return PerAxis(0) if group_size is None else PerGroup(group_size)


@dataclass(frozen=True, eq=False)
class QTensor:
    """A quantized tensor: integer codes, and the affine map of each block.

    qparams.scale has the shape () for PerTensor, (1, .., n, .., 1) for PerAxis, (..., groups) for PerGroup.
    group_index says which group each position of the last dimension belongs to; None: groups are in order.
    """

    codes: Tensor  # int8 (signed) or uint8, the shape of the original
    qparams: QParams
    bits: int
    granularity: Granularity
    symmetric: bool
    dtype: torch.dtype = torch.float32  # of the original, and of dequantize()
    group_index: Tensor | None = None  # (last dimension,), int32; from GPTQ with act_order

    def dequantize(self) -> Tensor:
        """The reals that the codes stand for, in the dtype of the original."""
        values, limit = dequantize(self.codes, self.element_qparams()), torch.finfo(self.dtype)
        return values.clamp(max(limit.min, -3.4e38), min(limit.max, 3.4e38)).to(self.dtype)

    def element_qparams(self) -> QParams:
        """The maps with scale and zero_point broadcastable against the codes."""
        if not isinstance(self.granularity, PerGroup):
            return self.qparams
        index = self.group_index
        if index is None:
            index = torch.arange(self.codes.shape[-1], device=self.codes.device) // self.granularity.group_size
        qp = self.qparams
        return replace(qp, scale=qp.scale[..., index], zero_point=qp.zero_point[..., index])

    def packed(self) -> Tensor:
        """The codes, shifted to start at 0, as a stream of bits (see packing.pack)."""
        return pack(self.codes.to(torch.int32) - self.qparams.qmin, bits=self.bits)

    @property
    def nbytes(self) -> int:
        """Bytes to store it: packed codes, scales, packed zero points (none if symmetric), group index if any."""

        def packed(count: int) -> int:
            return -(-count * self.bits // 8)

        scales = self.qparams.scale
        zeros = 0 if self.symmetric else packed(scales.numel())
        index = 0 if self.group_index is None else self.group_index.numel() * self.group_index.element_size()
        return packed(self.codes.numel()) + scales.numel() * scales.element_size() + zeros + index

    @property
    def bits_per_element(self) -> float:
        """True bits for each element, scales and zero points included."""
        return 8 * self.nbytes / self.codes.numel()


def quantize_tensor(
    x: Tensor, *, bits: int, granularity: Granularity, symmetric: bool = True, signed: bool = True
) -> QTensor:
    """x rounded to the nearest of 2**bits codes, each block on a grid from its own minimum and maximum.

    signed codes run from -2**(bits-1) to 2**(bits-1) - 1, unsigned ones from 0 to 2**bits - 1.

    Raises: ValueError if bits is not 1..8 (2..8 if symmetric), the axis does not exist, or x is not finite.

    >>> q = quantize_tensor(torch.tensor([[0.0, 3.0], [0.0, 30.0]]), bits=2, granularity=PerAxis(0),
    ...                     symmetric=False, signed=False)
    >>> q.codes.tolist(), q.qparams.scale.flatten().tolist(), q.bits_per_element
    ([[0, 3], [0, 3]], [1.0, 10.0], 20.0)
    """
    check_real(x)
    qmin, qmax = code_range(bits, signed=signed, symmetric=symmetric)
    blocks = to_blocks(x.detach(), granularity)
    qp = choose_qparams(
        blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True), qmin=qmin, qmax=qmax, symmetric=symmetric
    )
    codes = from_blocks(quantize(blocks, qp), granularity, x.shape).to(torch.int8 if signed else torch.uint8)
    return QTensor(codes, shape_qparams(qp, granularity, x.shape), bits, granularity, symmetric, x.dtype)


def split_rows(q: QTensor, rows: list[int]) -> list[QTensor]:
    """A quantized matrix with a scale for each row or group, cut into matrices of so many rows."""
    qp, parts = q.qparams, []
    for codes, scale, zero in zip(q.codes.split(rows), qp.scale.split(rows), qp.zero_point.split(rows), strict=True):
        parts.append(replace(q, codes=codes, qparams=replace(qp, scale=scale, zero_point=zero)))
    return parts


def code_range(bits: int, *, signed: bool = True, symmetric: bool = False) -> tuple[int, int]:
    """(qmin, qmax) of a bit width.

    >>> code_range(8), code_range(8, signed=False)
    ((-128, 127), (0, 255))
    """
    least = 2 if symmetric else 1
    bits = check_int(bits, "bits")
    if not least <= bits <= 8:
        raise ValueError(f"bits must be {least}..8 for a {'symmetric' if symmetric else 'asymmetric'} grid, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def to_blocks(x: Tensor, granularity: Granularity) -> Tensor:
    """x as (blocks, elements): a row for each scale. A short last group is filled up with zeros.

    >>> to_blocks(torch.arange(1.0, 6.0), PerGroup(2)).tolist()
    [[1.0, 2.0], [3.0, 4.0], [5.0, 0.0]]
    """
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    if isinstance(granularity, PerAxis):
        axis = _checked_axis(x.ndim, granularity)
        return x.movedim(axis, 0).flatten(1) if x.ndim > 1 else x[:, None]
    if not isinstance(granularity, PerGroup):
        raise ValueError(f"granularity must be PerTensor(), PerAxis(axis) or PerGroup(size), got {granularity!r}")
    if x.ndim == 0:
        raise ValueError("PerGroup needs at least one dimension, got a scalar")
    size = min(granularity.group_size, x.shape[-1])
    # Zeros do not change a block's range, which choose_qparams widens to hold 0 anyway.
    return F.pad(x, (0, -x.shape[-1] % size)).reshape(-1, size)


def from_blocks(blocks: Tensor, granularity: Granularity, shape: torch.Size) -> Tensor:
    """The inverse of to_blocks for a tensor of this shape."""
    if isinstance(granularity, PerTensor):
        return blocks.reshape(shape)
    if isinstance(granularity, PerAxis):
        axis = _checked_axis(len(shape), granularity)
        moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
        return blocks.reshape(moved).movedim(0, axis)
    return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]


def block_sizes(x: Tensor, granularity: Granularity) -> Tensor:
    """How many elements each block has, (blocks, 1); a short last group counts only its own."""
    return to_blocks(torch.ones(x.shape, dtype=torch.float64, device=x.device), granularity).sum(1, keepdim=True)


def mean_magnitude(x: Tensor, granularity: Granularity) -> Tensor:
    """mean |x| of each block, (blocks, 1), float64."""
    return to_blocks(x.double().abs(), granularity).sum(1, keepdim=True) / block_sizes(x, granularity)


def symmetric_qtensor(x: Tensor, codes: Tensor, scale: Tensor, bits: int, granularity: Granularity) -> QTensor:
    """Codes and scales of blocks as the QTensor of x: zero_point 0, and shapes as quantize_tensor has them."""
    q = quantize_tensor(x.detach(), bits=bits, granularity=granularity)
    qp = replace(q.qparams, scale=scale.reshape(q.qparams.scale.shape))
    return replace(q, codes=from_blocks(codes, granularity, x.shape).to(torch.int8), qparams=qp)


def _checked_axis(ndim: int, granularity: PerAxis) -> int:
    if not -ndim <= check_int(granularity.axis, "axis") < ndim:
        raise ValueError(f"PerAxis({granularity.axis}) names no dimension of a tensor with {ndim} dimensions")
    return granularity.axis % ndim


def shape_qparams(qp: QParams, granularity: Granularity, shape: torch.Size) -> QParams:
    """One map a block, (blocks, 1), in the shape that QTensor promises."""
    if isinstance(granularity, PerTensor):
        new = ()
    elif isinstance(granularity, PerAxis):
        axis = _checked_axis(len(shape), granularity)
        new = tuple(size if i == axis else 1 for i, size in enumerate(shape))
    else:
        new = (*shape[:-1], -1)
    return replace(qp, scale=qp.scale.reshape(new), zero_point=qp.zero_point.reshape(new))
