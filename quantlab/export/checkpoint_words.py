"""Checkpoints' ways to store codes: eight of 4 bits, or four of 8, to an int32, along one side or the other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quantlab.arguments import check_codes, check_flag, check_int, kind
from quantlab.export.parts import half_scales
from quantlab.granularity import QTensor
from quantlab.packing import pack, unpack

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the kernel of its authors unpacks pairs: the even places first


def to_words(codes: Tensor, *, bits: int, awq: bool = False) -> Tensor:
    """Codes counted from 0, the last dimension 32 / bits to an int32, the first in the low bits; awq: in AWQ's order.

    Raises: ValueError if bits is not 4 or 8, codes are not 0..2**bits - 1, or their number does not divide.

    >>> hex(to_words(torch.arange(8), bits=4).item())
    '0x76543210'
    """
    each = _each(bits)
    if check_codes(codes).ndim == 0 or codes.numel() == 0 or codes.shape[-1] % each:
        raise ValueError(f"{each} codes of {bits} bits share an int32; {tuple(codes.shape)} cannot be divided so")
    runs = codes.long().unflatten(-1, (-1, each))[..., _order(each, awq)]
    return pack(runs, bits=bits).view(torch.int32).view(runs.shape[:-1])


def from_words(words: Tensor, *, bits: int, awq: bool = False) -> Tensor:
    """The codes of to_words, uint8. Raises: ValueError if bits is not 4 or 8, or words are no list of int32."""
    each = _each(bits)
    if check_codes(words, "words").dtype != torch.int32 or words.ndim == 0:
        raise ValueError(f"words must be int32, one at least, got {kind(words)}")
    raw = words.contiguous().view(torch.uint8)
    runs = unpack(raw, bits=bits, count=words.numel() * each).view(*words.shape, each)
    places = torch.tensor(_order(each, awq)).argsort().to(words.device)
    return runs[..., places].flatten(-2)


@dataclass(frozen=True)
class Layout:
    """One way to store codes: what it takes, and the tensors of a layer by their names."""

    bits: int
    grids: tuple[bool, ...]  # values of `symmetric` that it stores
    rows: bool  # whether it stores one scale a row
    groups: bool  # whether it stores scales of groups
    write: Callable[[QTensor], dict[str, Tensor]]
    read: Callable[[Mapping], tuple[Tensor, Tensor, Tensor | None, Tensor | None]]  # codes, scale, zero_point, index


def _each(bits: int) -> int:
    if check_int(bits, "bits") not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    return 32 // bits


def _order(each: int, awq: bool) -> list[int]:
    """The places of a run of codes, by the bits that they take."""
    if check_flag(awq, "awq") and each != 8:
        raise ValueError(f"AWQ's order is of 8 codes to an int32, not {each}; bits must be 4")
    return list(AWQ_ORDER if awq else range(each))


def _from_zero(q: QTensor) -> tuple[Tensor, Tensor]:
    """(codes, zero points), counted from 0."""
    return q.codes.short() - q.qparams.qmin, q.qparams.zero_point - q.qparams.qmin


def _write_packed(q: QTensor) -> dict[str, Tensor]:
    codes, zero = _from_zero(q)
    parts = {"weight_packed": to_words(codes, bits=q.bits), "weight_scale": q.qparams.scale}
    parts["weight_shape"] = torch.tensor(q.shape)
    if not q.symmetric:
        parts["weight_zero_point"] = to_words(zero.T, bits=q.bits).T.contiguous()
    return parts


def _read_packed(parts: Mapping, bits: int):
    zero = parts.get("weight_zero_point")
    zero = None if zero is None else from_words(zero.T, bits=bits).T
    return from_words(parts["weight_packed"], bits=bits), parts["weight_scale"], zero, None


def _write_int8(q: QTensor) -> dict[str, Tensor]:
    return {"weight": q.codes.short().sub(q.qparams.qmin + 128).to(torch.int8), "weight_scale": q.qparams.scale}


def _read_int8(parts: Mapping):
    return parts["weight"].short() + 128, parts["weight_scale"], None, None


def _write_gptq(q: QTensor, less: int) -> dict[str, Tensor]:
    """Words run down the inputs; version 1 stores zero points less 1."""
    (codes, zero), columns = _from_zero(q), q.shape[1]
    index = q.group_index
    if index is None:
        index = torch.arange(columns) // (columns // q.qparams.scale.shape[1])
    parts = {"qweight": to_words(codes, bits=4).T.contiguous(), "scales": half_scales(q.qparams.scale).T.contiguous()}
    return parts | {"qzeros": to_words(zero.T - less, bits=4), "g_idx": index.int()}


def _read_gptq(parts: Mapping, less: int):
    zero = from_words(parts["qzeros"], bits=4).T + less
    return from_words(parts["qweight"].T, bits=4), parts["scales"].T, zero, parts["g_idx"]


def _write_awq(q: QTensor) -> dict[str, Tensor]:
    """Words run along the outputs, in an order of their own."""
    codes, zero = (to_words(t.T, bits=4, awq=True) for t in _from_zero(q))
    return {"qweight": codes, "scales": half_scales(q.qparams.scale).T.contiguous(), "qzeros": zero}


def _read_awq(parts: Mapping):
    codes, zero = (from_words(parts[name], bits=4, awq=True).T for name in ("qweight", "qzeros"))
    return codes, parts["scales"].T, zero, None


LAYOUTS = {
    "W4A16": Layout(4, (True, False), True, True, _write_packed, partial(_read_packed, bits=4)),
    "W8A16": Layout(8, (True,), True, True, _write_packed, partial(_read_packed, bits=8)),
    "W8A8": Layout(8, (True,), True, False, _write_int8, _read_int8),
    "GPTQ": Layout(4, (True,), True, True, partial(_write_gptq, less=1), partial(_read_gptq, less=1)),
    "GPTQ v2": Layout(4, (True, False), True, True, partial(_write_gptq, less=0), partial(_read_gptq, less=0)),
    "AWQ": Layout(4, (True, False), False, True, _write_awq, _read_awq),
}
