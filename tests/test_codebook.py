"""codebook: tables as published, codes against loops and bitsandbytes, the fast path against the plain one."""

import math
import statistics
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import codebook, sqnr_db, unpack
from quantlab.codebook import (
    CodebookTensor,
    DoubleQuantized,
    dynamic_levels,
    fp4_levels,
    kmeans_levels,
    nearest_level,
    nf4_levels,
    normalize_blocks,
    quantize_codebook,
)
from quantlab.codebook_fast import fast_nearest

# bitsandbytes, functional.py, get_4bit_type("nf4")
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
INT4 = torch.arange(-8, 8) / 8


def tensor(*shape, seed=0, scale=0.02):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def by_hand(x, levels, block_size):
    """(codes, absmax) of a flat tensor, one value at a time, in float32: the definition."""
    levels = levels.numpy()
    midpoints = [(a + b) / np.float32(2) for a, b in zip(levels[:-1], levels[1:], strict=True)]
    x, codes, absmax = x.float().numpy(), [], []
    for start in range(0, len(x), block_size):
        block = x[start : start + block_size]
        largest = max(abs(v) for v in block)
        absmax.append(float(largest))
        divisor = max(largest, np.float32(1e-38))
        for v in block:
            scaled = v / divisor if len(block) < block_size else v * (np.float32(1) / divisor)
            codes.append(sum(bool(m < scaled) for m in midpoints))
    return codes, absmax


# --- tables -----------------------------------------------------------------------------------------------------


def test_nf4_is_the_published_table_to_the_last_bit():
    assert nf4_levels().tolist() == PUBLISHED_NF4
    assert nf4_levels().dtype == torch.float32


def test_nf4_from_the_normal_distribution_of_the_standard_library():
    normal, delta = statistics.NormalDist(), 1 - (1 / 30 + 1 / 32) / 2
    up = [normal.inv_cdf(0.5 + (delta - 0.5) * i / 8) for i in range(1, 9)]
    down = [-normal.inv_cdf(0.5 + (delta - 0.5) * i / 7) for i in range(7, 0, -1)]
    exact = torch.tensor([*down, 0.0, *up], dtype=torch.float64) / up[-1]
    assert (nf4_levels().double() - exact).abs().max() < 2e-7


def test_fp4_is_sign_exponent_mantissa():
    magnitudes = {0.5 * m if e == 0 else (1 + 0.5 * m) * 2.0 ** (e - 1) for e in range(4) for m in range(2)}
    levels = sorted({s * m / 6 for s in (-1, 1) for m in magnitudes})
    assert torch.allclose(fp4_levels(), torch.tensor(levels), rtol=1e-7, atol=0)
    other = fp4_levels(smallest=1 / 192)
    assert (fp4_levels() != other).nonzero().flatten().tolist() == [6, 8]
    assert other[8].item() == np.float32(0.0625) / np.float32(12)


def test_dynamic_map_by_hand():
    found = [0.0, 1.0]
    for e in range(7):
        for k in range(2**e):
            centre = 0.1 + 0.9 * (k + 0.5) / 2**e
            found += [centre * 10 ** (e - 6), -centre * 10 ** (e - 6)]
    assert torch.allclose(dynamic_levels(), torch.tensor(sorted(found)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", [nf4_levels(), fp4_levels(), dynamic_levels()])
def test_tables_ascend_and_hold_zero_and_one(levels):
    assert (levels.diff() > 0).all()
    assert levels[-1] == 1
    assert (levels == 0).sum() == 1


# --- quantizing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [nf4_levels(), fp4_levels(), INT4, dynamic_levels(), torch.tensor([-1.0, 1.0])])
@pytest.mark.parametrize("block_size", [1, 7, 32, 64, 1000])
def test_codes_and_absmax_are_those_of_the_loop(levels, block_size):
    x = tensor(13, 23)
    q = quantize_codebook(x, levels, block_size=block_size)
    codes, absmax = by_hand(x.flatten(), levels, block_size)
    assert q.codes.flatten().tolist() == codes
    assert q.absmax.tolist() == absmax
    scale = torch.tensor(absmax).repeat_interleave(block_size)[: x.numel()].view(13, 23)
    assert torch.equal(q.dequantize(), levels[q.codes.int()] * scale)


def test_each_value_goes_to_the_nearest_level():
    x = tensor(5000)
    q = quantize_codebook(x, nf4_levels(), block_size=50)
    scaled = (x.view(-1, 50) / q.absmax[:, None]).flatten().double()
    distance = (scaled[:, None] - nf4_levels().double()).abs()
    chosen = distance.gather(1, q.codes.long()[:, None])[:, 0]
    assert (chosen - distance.min(1).values).max() < 1e-7  # a rounding of float32, next to ties


def test_a_short_last_block_is_divided_and_a_whole_one_multiplied():
    """In float32 x / a and x * (1 / a) may differ in the last bit: a midpoint on the smaller of them tells which."""
    pairs = [(np.float32(i), np.float32(a)) for a in range(1, 60) for i in range(a // 2 + 1, a)]
    x, a = next((x, a) for x, a in pairs if x / a < x * (1 / a))
    levels = torch.tensor([2 * (x / a) - 1, np.float32(1)])
    assert quantize_codebook(torch.tensor([a, x]), levels, block_size=2).codes.tolist() == [1, 1]
    assert quantize_codebook(torch.tensor([a, x]), levels, block_size=3).codes.tolist() == [1, 0]


def test_a_tie_goes_to_the_lower_level():
    levels = torch.tensor([-1.0, 0.0, 1.0])
    x = torch.tensor([-0.5, 0.5, 1.0])
    assert quantize_codebook(x, levels, block_size=3).codes.tolist() == [0, 1, 2]
    assert nearest_level(x, levels).tolist() == [0, 1, 2]


LEVELS = st.lists(st.integers(-1000, 1000), min_size=2, max_size=40, unique=True).map(
    lambda found: torch.tensor(sorted(found)) / 1000
)


@settings(max_examples=100, deadline=None)
@given(LEVELS, st.integers(0, 1000))
def test_the_fast_path_is_the_plain_one(levels, seed):
    """Random values, the levels, every tie, and the float32 numbers next to them."""
    middles = (levels[:-1] + levels[1:]) / 2
    edges = torch.cat([middles, levels, torch.linspace(-1, 1, 65)])
    x = torch.cat(
        [edges, *(torch.nextafter(edges, torch.tensor(to)) for to in (2.0, -2.0)), tensor(500, seed=seed, scale=0.4)]
    )
    x = x.clamp(-1, 1)
    assert torch.equal(fast_nearest(levels)(x), nearest_level(x, levels))


@pytest.mark.parametrize(
    "levels", [nf4_levels(), fp4_levels(), INT4, torch.tensor([-3.0, 0.5, 0.9, 7.0]), torch.tensor([0.1, 1e30])]
)
def test_the_fast_path_on_every_sixteen_bit_number_and_its_neighbours(levels):
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    x = x[x.abs() <= 1]
    x = torch.cat([x, torch.nextafter(x, torch.tensor(2.0)), torch.nextafter(x, torch.tensor(-2.0))]).clamp(-1, 1)
    assert torch.equal(fast_nearest(levels)(x), nearest_level(x, levels))


def test_the_tables_people_use_take_the_fast_path_and_close_levels_do_not():
    assert fast_nearest(nf4_levels()) is not None
    assert fast_nearest(fp4_levels(smallest=1 / 192)) is not None
    assert fast_nearest(dynamic_levels()) is None


def test_more_than_one_piece():
    """Long tensors go through in pieces; so does a block that is longer than a piece."""
    x = tensor(2 * codebook._PIECE + 777)
    for block_size in (64, 100_001, codebook._PIECE + 1):
        q = quantize_codebook(x, nf4_levels(), block_size=block_size)
        values, absmax = normalize_blocks(x, block_size=block_size)
        assert torch.equal(q.absmax, absmax)
        assert torch.equal(q.codes, nearest_level(values, nf4_levels()))
        scale = absmax.repeat_interleave(block_size)[: len(x)]
        assert torch.equal(q.dequantize(), nf4_levels()[q.codes.int()] * scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 99), st.booleans())
def test_properties(count, block_size, seed, double_quant):
    x = tensor(count, seed=seed)
    q = quantize_codebook(x, nf4_levels(), block_size=block_size, double_quant=double_quant)
    back, scale = q.dequantize(), q.block_absmax().repeat_interleave(block_size)[:count]
    if not double_quant:
        assert ((back - x).abs() <= scale * nf4_levels().diff().max() / 2 * 1.0001).all()
        again = quantize_codebook(back, nf4_levels(), block_size=block_size)
        assert torch.equal(again.dequantize(), back)
        twice = quantize_codebook(x * 4, nf4_levels(), block_size=block_size)
        assert torch.equal(twice.codes, q.codes)
        assert torch.equal(twice.absmax, q.absmax * 4)


@pytest.mark.parametrize("double_quant", [False, True])
def test_zeros_stay_exact(double_quant):
    x = tensor(4, 64)
    x[1:3] = 0
    x[0, ::2] = 0
    back = quantize_codebook(x, nf4_levels(), double_quant=double_quant).dequantize()
    assert (back[x == 0] == 0).all()
    zero = torch.zeros(3, 5)
    assert torch.equal(quantize_codebook(zero, INT4, block_size=4, double_quant=double_quant).dequantize(), zero)
    no_zero = torch.tensor([-1.0, -0.3, 0.3, 1.0])
    assert torch.equal(quantize_codebook(zero, no_zero, block_size=4).dequantize(), zero)


@pytest.mark.parametrize(
    "x", [torch.tensor(3.0), torch.tensor([[-2.0]]), torch.full((5,), 7.0), torch.full((5,), -7.0)]
)
def test_single_and_constant_values_come_back(x):
    assert torch.equal(quantize_codebook(x, nf4_levels()).dequantize(), x)


def test_the_smallest_and_largest_numbers_stay_finite():
    for extreme in (1e-45, 1e-39, 3.4e38):
        for double_quant in (False, True):
            x = torch.tensor([extreme, -extreme, 0.0] * 200)
            back = quantize_codebook(x, nf4_levels(), block_size=64, double_quant=double_quant).dequantize()
            assert torch.isfinite(back).all()
            assert (back - x).abs().max() <= max(1.2e-38, 0.01 * extreme)
    x = torch.full((200,), 65504.0, dtype=torch.float16)
    x[::3] = 1.0
    assert torch.isfinite(quantize_codebook(x, nf4_levels(), block_size=8, double_quant=True).dequantize()).all()
    assert quantize_codebook(x, torch.tensor([-2.0, 0.1, 1.7])).dequantize().max() == 65504


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_comes_back_and_input_is_unchanged(dtype):
    x = tensor(7, 33).to(dtype)
    before = x.clone()
    q = quantize_codebook(x, nf4_levels())
    assert q.dtype == q.dequantize().dtype == dtype
    assert torch.equal(x, before)
    single = quantize_codebook(x.float(), nf4_levels())
    assert torch.equal(q.codes, single.codes)
    assert torch.equal(q.dequantize(), single.dequantize().to(dtype))


def test_gradients_and_strides_do_not_matter():
    x = tensor(6, 10).T
    q = quantize_codebook(x.clone().requires_grad_(), nf4_levels(), block_size=4)
    assert torch.equal(q.codes, quantize_codebook(x.contiguous(), nf4_levels(), block_size=4).codes)
    assert not q.dequantize().requires_grad


def test_dequantize_into():
    x = tensor(9, 33)
    for dtype in (torch.float32, torch.bfloat16):
        q = quantize_codebook(x.to(dtype), nf4_levels())
        out = torch.full((9, 33), 7.0, dtype=dtype)
        assert q.dequantize(out) is out
        assert torch.equal(out, q.dequantize())
        for bad in (out.view(33, 9), out.double(), torch.zeros(33, 9, dtype=dtype).T):
            with pytest.raises(ValueError, match=r"out must be contiguous, \(9, 33\)"):
                q.dequantize(bad)


@pytest.mark.parametrize("shift", [0, 1])
def test_codes_and_output_may_lie_anywhere_in_memory(shift):
    q = quantize_codebook(tensor(640), nf4_levels())
    room = torch.zeros(641, dtype=torch.uint8)
    room[shift : 640 + shift] = q.codes
    moved = CodebookTensor(room[shift : 640 + shift], q.absmax, q.levels, 64)
    out = torch.zeros(641)[shift : 640 + shift]
    assert torch.equal(moved.dequantize(out), q.dequantize())


# --- what it weighs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "block_size", "double_quant", "nbytes"),
    [
        (100, 64, False, 50 + 2 * 4),
        (101, 10, False, 51 + 11 * 4),
        (1024, 64, True, 512 + 16 + 4 + 4),
        (64 * 300, 64, True, 9600 + 300 + 2 * 4 + 4),
    ],
)
def test_bytes_by_hand(count, block_size, double_quant, nbytes):
    q = quantize_codebook(tensor(count), nf4_levels(), block_size=block_size, double_quant=double_quant)
    assert q.nbytes == nbytes
    assert q.bits_per_element == 8 * nbytes / count
    other = quantize_codebook(tensor(count), INT4, block_size=block_size, double_quant=double_quant)
    assert other.nbytes == nbytes + 64  # nobody knows these levels: they must be stored


def test_the_figures_of_the_paper():
    x = tensor(2**20)
    assert quantize_codebook(x, nf4_levels()).bits_per_element == 4.5
    double = quantize_codebook(x, nf4_levels(), double_quant=True).bits_per_element
    assert double == 4 + 8 / 64 + 32 / (64 * 256) + 32 / 2**20
    assert f"{double:.3f}" == "4.127"


@pytest.mark.parametrize(("count", "bits"), [(2, 1), (3, 2), (4, 2), (15, 4), (16, 4), (17, 5), (256, 8)])
def test_packed_codes_unpack_to_themselves(count, bits):
    q = quantize_codebook(tensor(7, 11), torch.linspace(-1, 1, count), block_size=5)
    assert q.bits == bits
    assert q.packed().numel() == math.ceil(77 * bits / 8)
    assert torch.equal(unpack(q.packed(), bits=bits, count=77).view(7, 11), q.codes)


# --- double quantization ----------------------------------------------------------------------------------------


def test_double_quantization_by_hand():
    x = tensor(64 * 300, scale=1.0)
    plain, double = (quantize_codebook(x, nf4_levels(), double_quant=d) for d in (False, True))
    assert isinstance(double.absmax, DoubleQuantized)
    assert torch.equal(plain.codes, double.codes)
    assert torch.equal(double.absmax.offset, plain.absmax.mean())
    codes, absmax = by_hand(plain.absmax - plain.absmax.mean(), dynamic_levels(), 256)
    assert double.absmax.codes.tolist() == codes
    assert double.absmax.absmax.tolist() == absmax
    back = torch.tensor([dynamic_levels()[c] * absmax[i // 256] for i, c in enumerate(codes)])
    assert torch.equal(double.block_absmax(), back + double.absmax.offset)
    largest = max(absmax)
    assert (double.block_absmax() - plain.absmax).abs().max() <= largest * 0.9 / 64 / 2 * 1.01  # half a bin


def test_double_quantization_costs_little():
    x = tensor(2**16)
    plain, double = (sqnr_db(x, quantize_codebook(x, nf4_levels(), double_quant=d).dequantize()) for d in (False, True))
    assert plain - 0.05 < double < plain + 0.05


# --- k-means ----------------------------------------------------------------------------------------------------


def lloyd_by_hand(x, count, steps=300):
    """Plain loops over all values, from even quantiles of the distinct ones."""
    distinct = sorted(set(x))
    levels = [distinct[(2 * i + 1) * len(distinct) // (2 * count)] for i in range(count)]
    members = None
    for _ in range(steps):
        nearest = [min(range(count), key=lambda i: (abs(v - levels[i]), i)) for v in x]
        if nearest == members:
            break
        members = nearest
        for i in range(count):
            own = [v for v, j in zip(x, members, strict=True) if j == i]
            levels[i] = sum(own) / len(own) if own else levels[i]
    return levels


@pytest.mark.parametrize("count", [2, 5, 16])
def test_kmeans_is_the_loop(count):
    x = torch.cat([tensor(300, scale=1.0), torch.zeros(40), torch.ones(25)])
    assert torch.allclose(
        kmeans_levels(x, count).double(), torch.tensor(lloyd_by_hand(x.tolist(), count)).double(), atol=1e-6
    )


def test_kmeans_ties_and_levels_that_nobody_is_nearest_to():
    assert kmeans_levels(torch.tensor([0.0, 1.0, 2.0]), 2).tolist() == [0.5, 2.0]
    x = torch.tensor([4.0, 5, 7, 7, 8, 27, 32, 50, 73, 79, 100])
    levels = kmeans_levels(x, 4)
    assert levels.tolist() == pytest.approx([6.2, 12.25, 109 / 3, 84])  # 12.25 lost its values on the way
    assert nearest_level(x, levels).unique().tolist() == [0, 2, 3]


def test_kmeans_levels_are_means_of_their_values_and_no_worse_than_the_start():
    x = tensor(20_000, scale=1.0)
    levels = kmeans_levels(x, 16, max_steps=5000)
    codes = nearest_level(x, levels).long()
    means = torch.zeros(16, dtype=torch.float64).index_add(0, codes, x.double()) / codes.bincount(minlength=16)
    assert (means - levels).abs().max() < 1e-4  # it stood still
    error = (levels[codes] - x).square().mean()
    first = kmeans_levels(x, 16, max_steps=1)
    assert error < (first[nearest_level(x, first).long()] - x).square().mean()
    assert abs(10 * torch.log10(x.square().mean() / error) - 20.22) < 0.1  # Max 1960: 16 levels, normal values


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40), st.integers(2, 8), st.randoms())
def test_kmeans_properties(values, count, random):
    x = torch.tensor(values)
    if len(x.unique()) < count:
        with pytest.raises(ValueError, match="distinct"):
            kmeans_levels(x, count)
        return
    levels = kmeans_levels(x, count)
    assert levels.shape == (count,)
    assert (levels.diff() >= 0).all()
    assert x.min() <= levels[0]
    assert levels[-1] <= x.max()
    random.shuffle(values)
    assert torch.equal(kmeans_levels(torch.tensor(values), count), levels)
    if len(x.unique()) == count:
        assert torch.allclose(levels, x.unique(), rtol=1e-6, atol=1e-9)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 70, 129])
def test_not_finite_is_refused(bad, place):
    x = tensor(130)
    x[place] = bad
    for action in (
        lambda: quantize_codebook(x, nf4_levels()),
        lambda: normalize_blocks(x, block_size=64),
        lambda: kmeans_levels(x),
    ):
        with pytest.raises(ValueError, match="must be finite, got 1 NaN or infinite"):
            action()


def test_bad_input_names_the_rule():
    x = tensor(4, 4)
    with pytest.raises(ValueError, match="must be finite"):
        quantize_codebook(torch.tensor([1e300], dtype=torch.float64), nf4_levels())
    with pytest.raises(ValueError, match="floating point, got torch.int64"):
        quantize_codebook(torch.tensor([1]), nf4_levels())
    with pytest.raises(ValueError, match="empty"):
        quantize_codebook(torch.empty(0, 3), nf4_levels())
    with pytest.raises(ValueError, match="must be a tensor, got"):
        quantize_codebook([1.0], nf4_levels())
    for block_size in (0, -1, 64.0, True):
        with pytest.raises(ValueError, match="block_size must be"):
            quantize_codebook(x, nf4_levels(), block_size=block_size)
    for levels, told in (
        (nf4_levels().flip(0), "ascend"),
        (torch.tensor([0.0, 0.0, 1.0]), "ascend"),
        (torch.tensor([0.0, 1.0, 1.0 + 1e-12], dtype=torch.float64), "ascend"),
        (torch.tensor([0.0, float("inf")]), "levels must be finite"),
        (torch.tensor([float("nan"), 1.0]), "levels must be finite"),
        (torch.tensor([0.5]), "2..256"),
        (torch.linspace(-1, 1, 257), "2..256"),
        (torch.eye(2), "2..256"),
        (torch.tensor([-1, 0, 1]), "floating point"),
    ):
        with pytest.raises(ValueError, match=told):
            quantize_codebook(x, levels)
    for count in (1, 257, 2.0):
        with pytest.raises(ValueError, match="count must be"):
            kmeans_levels(tensor(1000), count)
    with pytest.raises(ValueError, match="16 levels need as many distinct values, got 2"):
        kmeans_levels(torch.tensor([1.0, 2.0] * 50))


# --- bitsandbytes, where it is installed ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, on import
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.functional

    return bitsandbytes.functional


OURS = {"nf4": nf4_levels(), "fp4": fp4_levels(smallest=1 / 192)}
# Rows no shorter than a block: its CPU kernel for AVX-512 misreads the absmax of blocks that span rows.
CASES = [(32, (64, 512)), (64, (64, 512)), (128, (17, 512)), (256, (3, 1024)), (1024, (3, 1024)), (64, (5, 130))]


def bnb_codes(packed, count):
    return torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[:count]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("block_size", "shape"), CASES)
def test_codes_and_values_are_those_of_bitsandbytes(bnb, kind, block_size, shape, dtype):
    x = tensor(*shape, seed=block_size).to(dtype)
    x.view(-1)[:40] = 0
    packed, state = bnb.quantize_4bit(x, blocksize=block_size, quant_type=kind)
    theirs = bnb_codes(packed, x.numel())
    q = quantize_codebook(x, OURS[kind], block_size=block_size)
    assert torch.equal(q.absmax, state.absmax)
    if kind == "nf4":
        assert torch.equal(q.codes.flatten(), theirs)
    else:  # its codes are bit patterns in no order, and two of them are zero
        assert torch.equal(OURS[kind][q.codes.flatten().int()], state.code[theirs.int()])
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state).view(shape))


def test_codes_of_an_odd_number_of_values_are_those_of_bitsandbytes(bnb):
    x = tensor(1, 1001)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    q = quantize_codebook(x, nf4_levels())
    assert torch.equal(q.codes.flatten(), bnb_codes(packed, 1001))
    assert torch.equal(q.absmax, state.absmax)


def test_bytes_are_those_of_bitsandbytes_with_nibbles_swapped(bnb):
    x = tensor(64, 64)
    packed, _ = bnb.quantize_4bit(x, quant_type="nf4")
    ours = quantize_codebook(x, nf4_levels()).packed()
    assert torch.equal((ours >> 4) | (ours << 4), packed.flatten())  # its first value is in the high half


def test_tables_are_those_of_bitsandbytes(bnb):
    assert torch.equal(bnb.get_4bit_type("nf4", device="cpu"), nf4_levels())
    assert torch.equal(bnb.get_4bit_type("fp4", device="cpu").unique(), OURS["fp4"])
    assert torch.equal(bnb.create_dynamic_map(), dynamic_levels())


@pytest.mark.parametrize("shape", [(64, 512), (300, 640), (2, 4096)])
def test_double_quantization_is_that_of_bitsandbytes(bnb, shape):
    """Offset, absmax of absmax and 4-bit codes to the last bit. Its CPU kernel finds the 8-bit code in a table of
    2**16 cells: within half a cell of a tie it may take the neighbour, and nowhere else."""
    x = tensor(*shape)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=True)
    q = quantize_codebook(x, nf4_levels(), double_quant=True)
    assert torch.equal(q.codes.flatten(), bnb_codes(packed, x.numel()))
    assert torch.equal(q.absmax.offset, state.offset)
    assert torch.equal(q.absmax.absmax, state.state2.absmax)
    plain = quantize_codebook(x, nf4_levels()).absmax - state.offset
    scaled, _ = normalize_blocks(plain, block_size=256)
    other = q.absmax.codes != state.absmax
    middles = (dynamic_levels()[1:] + dynamic_levels()[:-1]) / 2
    assert ((scaled[other, None] - middles).abs().min(1).values < 2**-16).all()
    same = DoubleQuantized(state.absmax, state.state2.absmax, state.offset)  # its bytes, our arithmetic
    back = CodebookTensor(q.codes, same, q.levels, 64).dequantize()
    assert torch.equal(back, bnb.dequantize_4bit(packed, state))
