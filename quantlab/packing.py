"""Codes of 1 to 8 bits in bytes and back."""

import torch
from torch import Tensor


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """The codes one after the other in a stream of bits, as uint8 of ceil(codes * bits / 8) bytes.

    Code i takes the bits i*bits .. (i+1)*bits - 1, low bits first; the last byte is filled with zeros.
    Signed codes are first shifted to start at 0: pack(codes.int() - qmin, bits=bits).

    Raises: ValueError if bits is not 1..8, codes are not integers, or a code does not fit.

    >>> pack(torch.tensor([1, 2, 3, 0, 1]), bits=2).tolist()   # 0b00_11_10_01, 0b01
    [57, 1]
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"codes must be integers, got {codes.dtype}")
    if codes.dtype not in (torch.bool, torch.uint8, torch.int64):
        codes = codes.to(torch.int64)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes of {bits} bits lie in 0..{2**bits - 1}, got {codes.min()}..{codes.max()}")
    if 8 % bits == 0:
        return _pack_whole(codes.flatten().to(torch.uint8), bits)
    return _pack_across(codes.flatten(), bits)


def unpack(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The first `count` codes of a packed stream, uint8, shape (count,).

    Raises: ValueError if bits is not 1..8, packed is not uint8, or holds fewer than count codes.

    >>> unpack(torch.tensor([57, 1], dtype=torch.uint8), bits=2, count=5).tolist()
    [1, 2, 3, 0, 1]
    """
    _check_bits(bits)
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed must be uint8, got {packed.dtype}")
    if count not in range(packed.numel() * 8 // bits + 1):
        raise ValueError(
            f"{packed.numel()} bytes hold at most {packed.numel() * 8 // bits} codes of {bits} bits, "
            f"asked for {count}"
        )
    if 8 % bits == 0:
        return _unpack_whole(packed.flatten(), bits)[:count]
    return _unpack_across(packed.flatten(), bits)[:count]


def _check_bits(bits: int) -> None:
    if isinstance(bits, bool) or bits not in range(1, 9):
        raise ValueError(f"bits must be 1..8, got {bits!r}")


def _pad(x: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % multiple))


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """1, 2, 4, 8 bits: a byte holds 8 / bits whole codes."""
    rows = _pad(codes, 8 // bits).view(-1, 8 // bits)
    packed = rows[:, 0].clone()
    for i in range(1, 8 // bits):
        packed |= rows[:, i] << (i * bits)
    return packed


def _unpack_whole(packed: Tensor, bits: int) -> Tensor:
    columns = [(packed >> (i * bits)) & (2**bits - 1) for i in range(8 // bits)]
    return torch.stack(columns, dim=1).flatten()


def _pack_across(codes: Tensor, bits: int) -> Tensor:
    """3, 5, 6, 7 bits: eight codes make one word of `bits` bytes, at most 56 bits of an int64."""
    rows = _pad(codes.to(torch.int64), 8).view(-1, 8)
    word = (rows << (torch.arange(8, device=rows.device) * bits)).sum(dim=1, keepdim=True)
    packed = (word >> (torch.arange(bits, device=rows.device) * 8)) & 255
    return packed.flatten().to(torch.uint8)[: -(-codes.numel() * bits // 8)]


def _unpack_across(packed: Tensor, bits: int) -> Tensor:
    rows = _pad(packed.to(torch.int64), bits).view(-1, bits)
    word = (rows << (torch.arange(bits, device=rows.device) * 8)).sum(dim=1, keepdim=True)
    codes = (word >> (torch.arange(8, device=rows.device) * bits)) & (2**bits - 1)
    return codes.flatten().to(torch.uint8)
