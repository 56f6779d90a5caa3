"""packing: against a loop over bits, numpy's own packing, bad input, and the memory it takes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import PerTensor, pack, quantize_tensor, unpack
from quantlab.packing import _CHUNK

BITS = range(1, 9)


def random_codes(bits, count, seed=0):
    return torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def pack_by_hand(codes, bits):
    """The definition: bit j of code i is bit i * bits + j of the stream, and bit k of byte b is its bit 8 * b + k."""
    packed = [0] * -(-len(codes) * bits // 8)
    for i, code in enumerate(codes):
        for j in range(bits):
            place = i * bits + j
            packed[place // 8] |= (code >> j & 1) << (place % 8)
    return packed


def pack_with_numpy(codes, bits):
    """The same stream by numpy: every code as its bits, low one first, in one row."""
    rows = np.unpackbits(codes.numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    return np.packbits(rows.ravel(), bitorder="little")


def unpack_with_numpy(packed, bits, count):
    stream = np.unpackbits(packed.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    return np.packbits(stream, axis=1, bitorder="little").ravel()


# --- the layout -------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 8), st.integers(0, 40), st.data())
def test_layout_is_the_definition_and_comes_back(bits, count, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    packed = pack(torch.tensor(codes, dtype=torch.int64), bits=bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == pack_by_hand(codes, bits)
    assert unpack(packed, bits=bits, count=count).tolist() == codes


@pytest.mark.parametrize("bits", BITS)
def test_every_code_in_every_place(bits):
    """Each code at each of the eight places of a word, between neighbours of zeros and of ones."""
    for fill in (0, 2**bits - 1):
        for place in range(8):
            rows = torch.full((2**bits, 24), fill, dtype=torch.uint8)
            rows[:, 8 + place] = torch.arange(2**bits).to(torch.uint8)
            for row in rows[:: max(1, 2**bits // 16)]:
                assert pack(row, bits=bits).tolist() == pack_by_hand(row.tolist(), bits)
            stream = pack(rows, bits=bits)
            assert stream.tolist() == pack_with_numpy(rows.flatten(), bits).tolist()
            assert torch.equal(unpack(stream, bits=bits, count=rows.numel()), rows.flatten())


@pytest.mark.parametrize("count", [_CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 13])
@pytest.mark.parametrize("bits", BITS)
def test_over_several_chunks_it_is_numpys_stream(bits, count):
    codes = random_codes(bits, count)
    packed = pack(codes, bits=bits)
    assert np.array_equal(packed.numpy(), pack_with_numpy(codes, bits))
    back = unpack(packed, bits=bits, count=count)
    assert torch.equal(back, codes)
    assert np.array_equal(back.numpy(), unpack_with_numpy(packed, bits, count))


@pytest.mark.parametrize("bits", BITS)
def test_fewer_codes_than_the_stream_holds(bits):
    codes = random_codes(bits, _CHUNK + 100)
    packed = pack(codes, bits=bits)
    for count in (0, 1, 7, 8, _CHUNK - 3, _CHUNK + 5):
        assert torch.equal(unpack(packed, bits=bits, count=count), codes[:count])
    assert torch.equal(unpack(packed.repeat(2), bits=bits, count=50), codes[:50])


@pytest.mark.parametrize("bits", BITS)
def test_filled_up_with_zeros(bits):
    packed = pack(torch.full((3,), 2**bits - 1), bits=bits)
    assert int.from_bytes(bytes(packed.tolist()), "little") == 2 ** (3 * bits) - 1


# --- what goes in -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.bool]
)
@pytest.mark.parametrize("bits", BITS)
def test_codes_of_any_integer_type(bits, dtype):
    high = 2 if dtype == torch.bool else min(2**bits, 128)
    codes = torch.randint(high, (100,), generator=torch.Generator().manual_seed(1)).to(dtype)
    before = codes.clone()
    packed = pack(codes, bits=bits)
    assert packed.tolist() == pack_by_hand([int(c) for c in codes.tolist()], bits)
    assert torch.equal(codes, before)


def test_any_shape_and_any_strides():
    codes = random_codes(3, 6 * 10).view(6, 10)
    for view in (codes, codes.T, codes[::2, 1:], codes[:, ::3], codes.flip(0), codes[0, 0], codes[:, :0]):
        packed = pack(view, bits=3)
        assert packed.tolist() == pack_by_hand(view.flatten().tolist(), 3)
    wide = torch.zeros(24, 2, dtype=torch.uint8)
    wide[:, 0] = pack(random_codes(3, 64), bits=3)
    assert torch.equal(unpack(wide[:, 0], bits=3, count=64), random_codes(3, 64))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("offset", range(8))
def test_a_slice_that_starts_anywhere(bits, offset):
    """A view into words needs memory that starts at a multiple of 8; a slice need not."""
    codes = random_codes(bits, 8 * 20 + offset)
    packed = pack(codes[offset:], bits=bits)
    assert torch.equal(packed, pack(codes[offset:].clone(), bits=bits))
    longer = torch.cat([torch.zeros(offset, dtype=torch.uint8), packed])
    before = longer.clone()
    assert torch.equal(unpack(longer[offset:], bits=bits, count=160), codes[offset:])
    assert torch.equal(longer, before)


def test_quantized_codes():
    x = torch.randn(7, 11, generator=torch.Generator().manual_seed(0))
    unsigned = quantize_tensor(x, bits=8, granularity=PerTensor(), signed=False).codes
    assert torch.equal(unpack(pack(unsigned, bits=8), bits=8, count=77).view(7, 11), unsigned)
    q = quantize_tensor(x, bits=3, granularity=PerTensor())
    back = unpack(q.packed(), bits=3, count=77).view(7, 11).int() + q.qparams.qmin
    assert torch.equal(back, q.codes.int())


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([0, 4]), 2, r"2 bits lie in 0..3, got 0..4"),
        (torch.tensor([-1]), 2, r"0..3, got -1"),
        (torch.tensor([-1], dtype=torch.int8), 8, r"0..255, got -1"),
        (torch.tensor([256]), 8, r"0..255, got 256"),
        (torch.tensor([2**40]), 8, r"0..255, got 1099511627776"),  # its low byte is 0
        (torch.tensor([16], dtype=torch.uint8), 4, r"0..15, got 16"),
        (torch.tensor([1000], dtype=torch.uint16), 4, r"0..15, got 1000"),
        (torch.tensor([0.5]), 2, "must be integers, got torch.float32"),
        ([1, 2], 2, "must be a tensor, got"),
    ],
)
def test_codes_that_do_not_fit(codes, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(codes, bits=bits)


@pytest.mark.parametrize("place", [0, 17, _CHUNK - 1, _CHUNK, 2 * _CHUNK + 4])
def test_one_wrong_code_anywhere_is_found(place):
    codes = random_codes(4, 2 * _CHUNK + 5)
    codes[place] = 200
    with pytest.raises(ValueError, match=r"0..15, got \d+..200"):
        pack(codes, bits=4)


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, True, "4", None])
def test_bits_are_1_to_8(bits):
    with pytest.raises(ValueError, match="bits must be"):
        pack(torch.tensor([0]), bits=bits)
    with pytest.raises(ValueError, match="bits must be"):
        unpack(torch.zeros(1, dtype=torch.uint8), bits=bits, count=1)


@pytest.mark.parametrize("count", [5, -1, 1.5, True, None])
def test_count_is_what_the_bytes_can_hold(count):
    with pytest.raises(
        ValueError, match="at most 4 codes of 2 bits, asked for 5|count must be (an int|at least 0), got"
    ):
        unpack(torch.zeros(1, dtype=torch.uint8), bits=2, count=count)


@pytest.mark.parametrize("packed", [torch.zeros(1), torch.zeros(1, dtype=torch.int8), b"\0"])
def test_packed_is_uint8(packed):
    with pytest.raises(ValueError, match="packed must be (uint8|a tensor)"):
        unpack(packed, bits=2, count=1)


# --- memory -----------------------------------------------------------------------------------------------------

PEAK = """
import re, sys, torch
from pathlib import Path
from quantlab import pack, unpack

def peak():  # of this program alone; what getrusage says begins with the parent's
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
bits, count = int(sys.argv[1]), 2**26
unpack(pack(torch.ones(2**20, dtype=torch.uint8), bits=bits), bits=bits, count=2**20)  # what is loaded once
codes = torch.ones(count, dtype=torch.uint8)
before = peak()
packed = pack(codes, bits=bits)
assert unpack(packed, bits=bits, count=count)[-1] == 1
print((peak() - before) / count)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the peak")
@pytest.mark.parametrize("bits", [3, 4])
def test_memory_is_what_comes_out_and_a_little(bits):
    done = subprocess.run([sys.executable, "-c", PEAK, str(bits)], capture_output=True, text=True, check=True)
    bytes_per_code = float(done.stdout)
    assert 1 < bytes_per_code < 1 + bits / 8 + 0.2  # the packed ones, and the codes that come back
