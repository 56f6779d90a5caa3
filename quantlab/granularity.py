"""Rounding to nearest, with one scale for each block of a tensor; what it gives is a QTensor."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams, dequantize, quantize
from quantlab.arguments import FLOAT32_MAX, check_codes, check_flag, check_int, check_real
from quantlab.blocks import (
    Granularity,
    PerAxis,
    PerGroup,
    PerTensor,
    from_blocks,
    rows_or_groups,
    scale_shape,
    to_blocks,
)  # fmt: skip
from quantlab.packing import pack, unpack
from quantlab.quantized import DTYPES, Quantized

__all__ = [
    "Granularity", "PerAxis", "PerGroup", "PerTensor", "QTensor", "code_range", "qtensor_of_blocks", "quantize_tensor",
    "rows_or_groups", "split_rows", "symmetric_qtensor",
]  # fmt: skip

_WORDS = {"tensor": PerTensor, "axis": PerAxis, "group": PerGroup}  # for granularities, in files
_CODES = {"int8": torch.int8, "uint8": torch.uint8}


@dataclass(frozen=True, eq=False)
class QTensor(Quantized):
    """A quantized tensor: integer codes, and the affine map of each block.

    qparams.scale has the shape () for PerTensor, (1, .., n, .., 1) for PerAxis, (..., groups) for PerGroup.
    group_index says which group each position of the last dimension belongs to; None: groups are in order.

    Raises: ValueError if scales or group_index do not fit the codes.
    """

    codes: Tensor  # int8 (signed) or uint8, the shape of the original
    qparams: QParams
    bits: int
    granularity: Granularity
    symmetric: bool
    dtype: torch.dtype = torch.float32  # of the original, and of dequantize()
    group_index: Tensor | None = None  # (last dimension,), int32; from GPTQ with act_order

    def __post_init__(self):
        vars(self).update(bits=check_int(self.bits, "bits", 1, 8))
        shape = scale_shape(check_codes(self.codes).shape, self.granularity)
        if self.qparams.scale.shape != shape:
            got = tuple(self.qparams.scale.shape)
            raise ValueError(f"codes {tuple(self.codes.shape)} need scales {shape} for {self.granularity}, got {got}")
        if self.group_index is not None and self.group_index.shape != self.codes.shape[-1:]:
            raise ValueError(f"group_index {tuple(self.group_index.shape)} does not fit {tuple(self.codes.shape)}")

    @property
    def first_code(self) -> int:
        return self.qparams.qmin

    def dequantize(self) -> Tensor:
        """The reals that the codes stand for, in the dtype of the original."""
        if isinstance(self.granularity, PerGroup) and self.group_index is None:
            qp = replace(
                self.qparams, scale=self.qparams.scale.reshape(-1, 1), zero_point=self.qparams.zero_point.reshape(-1, 1)
            )
            blocks = dequantize(to_blocks(self.codes, self.granularity), qp)
            values = from_blocks(blocks, self.granularity, self.codes.shape)
        else:
            values = dequantize(self.codes, self.element_qparams())
        limit = min(torch.finfo(self.dtype).max, FLOAT32_MAX)  # a finite number must not come back as infinity
        return values.to(self.dtype) if limit == FLOAT32_MAX else values.clamp(-limit, limit).to(self.dtype)

    def element_qparams(self) -> QParams:
        """The maps with scale and zero_point broadcastable against the codes."""
        if not isinstance(self.granularity, PerGroup):
            return self.qparams
        index = self.group_index
        if index is None:
            index = torch.arange(self.codes.shape[-1], device=self.codes.device) // self.granularity.group_size
        qp = self.qparams
        return replace(qp, scale=qp.scale[..., index], zero_point=qp.zero_point[..., index])

    def side_parts(self) -> dict[str, Tensor]:
        """Scales, packed zero points (none if symmetric), group index if any."""
        qp, middle = self.qparams, _middle(self.qparams.qmin, self.qparams.qmax)
        parts = {"scale": qp.scale}
        if not self.symmetric:
            parts["zero_point"] = pack(qp.zero_point - qp.qmin, bits=self.bits)
        elif (qp.zero_point != middle).any():
            raise ValueError(f"a symmetric tensor has the middle code {middle} as zero_point everywhere")
        if self.group_index is not None:
            parts["group_index"] = self.group_index
        return parts

    def settings(self) -> dict:
        codes = str(self.codes.dtype).removeprefix("torch.")
        if codes not in _CODES:
            raise ValueError(f"codes of {codes} are not stored here; known are {', '.join(_CODES)}")
        word = next(word for word, of in _WORDS.items() if isinstance(self.granularity, of))
        return super().settings() | {
            "qmin": self.qparams.qmin,
            "qmax": self.qparams.qmax,
            "symmetric": self.symmetric,
            "granularity": [word, *vars(self.granularity).values()],
            "codes": codes,
        }

    @classmethod
    def from_codes(cls, codes: Tensor, parts: dict[str, Tensor], settings: dict) -> "QTensor":
        bits, qmin, qmax, scale = settings["bits"], settings["qmin"], settings["qmax"], parts["scale"]
        if settings["symmetric"]:
            zero_point = torch.full_like(scale, _middle(qmin, qmax), dtype=torch.int32)
        else:
            zero_point = unpack(parts["zero_point"], bits=bits, count=scale.numel()).to(torch.int32) + qmin
        codes = (codes.to(torch.int16) + qmin).to(_CODES[settings["codes"]])
        word, *values = settings["granularity"]
        qp = QParams(scale, zero_point.reshape(scale.shape), qmin, qmax)
        how = _WORDS[word](*values), settings["symmetric"], DTYPES[settings["dtype"]]
        return cls(codes, qp, bits, *how, parts.get("group_index"))


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
    x = check_real(x)
    qmin, qmax = code_range(bits, signed=signed, symmetric=symmetric)
    blocks = to_blocks(x.detach(), granularity)
    low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
    qp = choose_qparams(low, high, qmin=qmin, qmax=qmax, symmetric=symmetric)
    return qtensor_of_blocks(x, quantize(blocks, qp), qp, bits, granularity, symmetric)


def qtensor_of_blocks(
    x: Tensor, codes: Tensor, qp: QParams, bits: int, granularity: Granularity, symmetric: bool
) -> QTensor:
    """The QTensor of x from the codes of its blocks, (blocks, elements), and one map a block, (blocks, 1)."""
    shape = scale_shape(x.shape, granularity)
    qp = replace(qp, scale=qp.scale.reshape(shape), zero_point=qp.zero_point.reshape(shape))
    codes = from_blocks(codes, granularity, x.shape).to(torch.int8 if qp.qmin < 0 else torch.uint8)
    return QTensor(codes, qp, bits, granularity, symmetric, x.dtype)


def symmetric_qtensor(x: Tensor, codes: Tensor, scale: Tensor, bits: int, granularity: Granularity) -> QTensor:
    """Signed codes and scales of blocks as the QTensor of x, zero_point 0."""
    qp = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), *code_range(bits, symmetric=True))
    return qtensor_of_blocks(x, codes, qp, bits, granularity, True)


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
    smallest, bits = 2 if check_flag(symmetric, "symmetric") else 1, check_int(bits, "bits")
    if not smallest <= bits <= 8:
        grid = "symmetric" if symmetric else "asymmetric"
        raise ValueError(f"bits must be {smallest}..8 for a {grid} grid, got {bits}")
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if check_flag(signed, "signed") else (0, 2**bits - 1)


def _middle(qmin: int, qmax: int) -> int:
    """The zero_point of a symmetric grid."""
    return (qmin + qmax + 1) // 2
