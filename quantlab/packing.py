"""Codes of 1 to 8 bits in bytes and back."""

from functools import cache

import torch
from torch import Tensor

from quantlab.arguments import check_codes, check_int, check_tensor

# Codes worked on at a time: few enough for a core's cache, enough to make the cost of a torch call small.
_CHUNK = 2**18


def pack(codes: Tensor, *, bits: int) -> Tensor:
    """The codes one after the other in a stream of bits, as uint8 of ceil(codes * bits / 8) bytes.

    Code i takes the bits i*bits .. (i+1)*bits - 1, low bits first; the last byte is filled with zeros.
    Signed codes are first shifted to start at 0: pack(codes.int() - qmin, bits=bits).

    Raises: ValueError if bits is not 1..8, codes are not integers, or a code does not fit.

    >>> pack(torch.tensor([1, 2, 3, 0, 1]), bits=2).tolist()   # 0b00_11_10_01, 0b01
    [57, 1]
    """
    bits = check_int(bits, "bits", 1, 8)
    flat = check_codes(codes).reshape(-1)
    packed = torch.empty(packed_size(len(flat), bits), dtype=torch.uint8, device=flat.device)
    for start in range(0, len(flat), _CHUNK):
        part = _pack_chunk(flat[start : start + _CHUNK], bits)
        packed[packed_size(start, bits) :][: len(part)] = part
    return packed


def unpack(packed: Tensor, *, bits: int, count: int) -> Tensor:
    """The first `count` codes of a packed stream, uint8, shape (count,).

    Raises: ValueError if bits is not 1..8, packed is not uint8, or holds fewer than count codes.

    >>> unpack(torch.tensor([57, 1], dtype=torch.uint8), bits=2, count=5).tolist()
    [1, 2, 3, 0, 1]
    """
    bits = check_int(bits, "bits", 1, 8)
    if check_tensor(packed, "packed").dtype != torch.uint8:
        raise ValueError(f"packed must be uint8, got {packed.dtype}")
    count, held = check_int(count, "count", 0), packed.numel() * 8 // bits
    if count > held:
        raise ValueError(f"{packed.numel()} bytes hold at most {held} codes of {bits} bits, asked for {count}")
    flat, codes = packed.reshape(-1), torch.empty(count, dtype=torch.uint8, device=packed.device)
    for start in range(0, len(codes), _CHUNK):
        part = codes[start : start + _CHUNK]
        part[:] = _unpack_chunk(flat[packed_size(start, bits) :][: packed_size(len(part), bits)], bits)[: len(part)]
    return codes


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return -(-count * bits // 8)


def _pack_chunk(codes: Tensor, bits: int) -> Tensor:
    """Eight codes in the eight bytes of a word, pushed together in its low `bits` bytes; then those alone."""
    _check_range(codes, bits)
    words = torch.zeros(packed_size(len(codes), 1), dtype=torch.int64, device=codes.device)
    words.view(torch.uint8)[: len(codes)] = codes
    for lane in (8, 16, 32) if bits < 8 else ():  # of two neighbours, `held` bits each, the upper moves down
        held = lane * bits // 8
        low = _mask(2 * lane, held)
        upper = (words >> (lane - held)).bitwise_and_(low << held)
        words.bitwise_and_(low).bitwise_or_(upper)
    return _low_bytes(words, bits).contiguous().view(torch.uint8).flatten()[: packed_size(len(codes), bits)]


def _unpack_chunk(packed: Tensor, bits: int) -> Tensor:
    """The way back: `bits` bytes in the low end of a word, pulled apart into its eight. At most 7 codes too many."""
    rows = torch.zeros(-(-len(packed) // bits), bits, dtype=torch.uint8, device=packed.device)
    rows.view(-1)[: len(packed)] = packed
    words = torch.zeros(len(rows), dtype=torch.int64, device=packed.device)
    view = _low_bytes(words, bits)
    view.copy_(rows.view(view.dtype))
    for lane in (32, 16, 8) if bits < 8 else ():
        held = lane * bits // 8
        low = _mask(2 * lane, held)
        upper = (words << (lane - held)).bitwise_and_(low << lane)
        words.bitwise_and_(low).bitwise_or_(upper)
    return words.view(torch.uint8)


def _check_range(codes: Tensor, bits: int) -> None:
    if codes.dtype in (torch.bool, torch.uint16, torch.uint32, torch.uint64):  # aminmax does not know them
        codes = codes.to(torch.int64)
    low, high = torch.aminmax(codes)
    if int(low) < 0 or int(high) >= 2**bits:
        raise ValueError(f"codes of {bits} bits lie in 0..{2**bits - 1}, got {int(low)}..{int(high)}")


@cache
def _mask(lane: int, held: int) -> int:
    """64 bits cut into lanes, the low `held` bits of each set; held < lane, so the sign bit stays 0."""
    return sum((2**held - 1) << start for start in range(0, 64, lane))


def _low_bytes(words: Tensor, count: int) -> Tensor:
    """A view of the low `count` bytes of each word (the first in memory: x86 and ARM are little-endian).

    In the largest unit that divides count, since copying 3 units of 2 bytes is faster than 6 bytes.
    """
    unit = count & -count
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[unit]
    return words.view(dtype).view(-1, 8 // unit)[:, : count // unit]
