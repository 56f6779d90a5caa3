"""floats against torch's casts on every bit pattern, against tables written out bit by bit, and against loops."""

import bisect
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.floats import (
    BF16,
    FP4_E2M1,
    FP6_E2M3,
    FP6_E3M2,
    FP8_E4M3,
    FP8_E5M2,
    FP16,
    FloatFormat,
    decode,
    encode,
    mx_quantize,
    nvfp4_quantize,
    round_to,
    values,
)
from quantlab.packing import unpack

CASTS = {FP16: torch.float16, BF16: torch.bfloat16, FP8_E4M3: torch.float8_e4m3fn, FP8_E5M2: torch.float8_e5m2}
SMALL = [FP8_E4M3, FP8_E5M2, FP6_E3M2, FP6_E2M3, FP4_E2M1]
ODD = [
    FloatFormat("E1M3", 1, 3, 0, "none"),
    FloatFormat("E4M0", 4, 0, 7, "none"),
    FloatFormat("E3M4", 3, 4, 3),
    FloatFormat("E5M3", 5, 3, 11, "nan"),
]
# E4M3 beyond 448: torch gave NaN before pytorch #178817 and saturates since. Both are right by OCP, and both are ours.
TORCH_SATURATES = bool(torch.tensor(1e4).to(torch.float8_e4m3fn).float().isfinite())


def name(fmt):
    return fmt.name.replace(" ", "_") if isinstance(fmt, FloatFormat) else None


def every_bf16():
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def some_float32(count=200_000):
    random = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=random, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def ours(x, fmt):
    """round_to in the mode that this torch's casts are in."""
    return round_to(x, fmt, saturate=None if fmt is not FP8_E4M3 else TORCH_SATURATES)


def same(a, b):
    """Equal bit by bit, the sign of 0 included; one NaN is as good as another."""
    assert a.dtype == b.dtype
    both_nan = a.isnan() & b.isnan()
    return bool((((a == b) & (a.signbit() == b.signbit())) | both_nan).all())


# The definition: sign, exponent and mantissa in three loops, and the nearest by search


def table(fmt):
    """{code: value} of the finite numbers."""
    found, code = {}, 0
    for sign in (1, -1):
        for exponent in range(2**fmt.exponent_bits):
            for mantissa in range(2**fmt.mantissa_bits):
                fraction = mantissa / 2**fmt.mantissa_bits
                if exponent == 0:
                    value = fraction * 2.0 ** (1 - fmt.bias)
                else:
                    value = (1 + fraction) * 2.0 ** (exponent - fmt.bias)
                last = exponent == 2**fmt.exponent_bits - 1
                ones = mantissa == 2**fmt.mantissa_bits - 1
                if not (last and (fmt.specials == "ieee" or fmt.specials == "nan" and ones)):
                    found[code] = sign * value
                code += 1
    return found


def nearest(x, fmt, positive):
    """The number nearest to x, saturating; positive: the numbers from 0 up, by code.

    Of two equally near the one with the even code, which is the even mantissa; of two powers of two without
    mantissa bits the larger one (IEEE 754-2019, 4.3.1).
    """
    size = abs(x)
    above = bisect.bisect_left(positive, size)
    if above == len(positive):
        found = positive[-1]
    elif above == 0 or positive[above] == size:
        found = positive[above]
    else:
        down, up = size - positive[above - 1], positive[above] - size  # exact in float64 for these x
        odd = above % 2 == 1 if fmt.mantissa_bits else above == 1
        found = positive[above - (down < up or (down == up and odd))]
    return math.copysign(found, x)


def positives(fmt):
    """Ascending; the index of a number is its code, so ties go to the even index."""
    return [value for code, value in table(fmt).items() if code < 2 ** (fmt.bits - 1)]


def ties_and_neighbours(fmt):
    """Every number of the format, every midpoint of two, and the float32 on either side of each; both signs."""
    points = torch.tensor(positives(fmt), dtype=torch.float64)
    points = torch.cat([points, (points[1:] + points[:-1]) / 2, points[-1:] * 1.1]).float()
    points = points[points.isfinite()]
    beside = [torch.nextafter(points, torch.tensor(s * math.inf)) for s in (1, -1)]
    x = torch.cat([points, *beside])
    return torch.cat([x, -x])


# Rounding


@pytest.mark.parametrize("fmt", CASTS, ids=name)
def test_every_bf16_pattern_is_rounded_as_torch_casts(fmt):
    x = every_bf16()
    assert same(ours(x, fmt), x.to(CASTS[fmt]).float())


@pytest.mark.parametrize("fmt", CASTS, ids=name)
def test_every_fp16_pattern_is_rounded_as_torch_casts(fmt):
    x = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    assert same(ours(x, fmt), x.float().to(CASTS[fmt]).float())


@pytest.mark.parametrize("fmt", CASTS, ids=name)
def test_ties_and_their_neighbours_are_rounded_as_torch_casts(fmt):
    x = ties_and_neighbours(fmt)
    assert same(ours(x, fmt), x.to(CASTS[fmt]).float())


@pytest.mark.parametrize("fmt", CASTS, ids=name)
def test_any_float32_is_rounded_as_torch_casts(fmt):
    x = some_float32()
    assert same(ours(x, fmt), x.to(CASTS[fmt]).float())
    tiny = torch.arange(1, 2000, dtype=torch.int32).view(torch.float32)  # subnormal float32
    assert same(ours(tiny, fmt), tiny.to(CASTS[fmt]).float())


@pytest.mark.parametrize("fmt", SMALL + ODD, ids=name)
def test_rounding_is_the_nearest_of_the_table(fmt):
    numbers = positives(fmt)
    random = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.rand(3000, generator=random) * 40 - 22)
    x = torch.cat([ties_and_neighbours(fmt), spread, -spread])
    expected = torch.tensor([nearest(v, fmt, numbers) for v in x.tolist()])
    assert same(round_to(x, fmt, saturate=True), expected)


def test_beyond_the_largest():
    x = torch.tensor([448.0, 464.0, 464.1, 1e9, math.inf])
    assert round_to(x, FP8_E4M3).tolist() == [448] * 5
    assert round_to(x, FP8_E4M3, saturate=False).isnan().tolist() == [False, False, True, True, True]
    x = -torch.tensor([57344.0, 61439.0, 61440.0, math.inf])
    assert round_to(x, FP8_E5M2).tolist() == [-57344, -57344, -math.inf, -math.inf]
    assert round_to(x, FP8_E5M2, saturate=True).tolist() == [-57344] * 4
    assert round_to(torch.tensor([65519.0, 65520.0]), FP16).tolist() == [65504, math.inf]
    assert round_to(torch.tensor([1e30, -math.inf]), FP4_E2M1).tolist() == [6, -6]


def test_a_float64_is_rounded_once():
    """A hair above a tie goes up; through float32 the hair is lost, and the tie goes to even, down."""
    hair = 2.0**-40
    for fmt, tie, up in ((FP8_E4M3, 1.0625, 1.125), (FP16, 1 + 2**-11, 1 + 2**-10), (FP4_E2M1, 2.5, 3.0)):
        x = torch.tensor([tie, tie + hair], dtype=torch.float64)
        assert round_to(x, fmt).tolist() == [math.floor(tie), up]
        assert round_to(x.float(), fmt)[1] == math.floor(tie)


def test_the_result_is_float32_and_the_argument_stays():
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2):
        x = torch.tensor([1.1, -70.0, 3e-3]).to(dtype)
        before = x.clone()
        y = round_to(x, FP8_E4M3)
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(y.float(), round_to(x.float(), FP8_E4M3))
        assert torch.equal(x.float(), before.float())
    assert not round_to(torch.ones(2, requires_grad=True), FP16).requires_grad
    assert round_to(torch.empty(0, 3), FP16).shape == (0, 3)
    assert round_to(torch.tensor(1.1), FP4_E2M1) == 1.0


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP6_E3M2, FP6_E2M3, FP4_E2M1], ids=name)
def test_ml_dtypes_agrees(fmt):
    """An implementation in C++ of other people; its E4M3 overflows to NaN."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = getattr(ml_dtypes, "float" + fmt.name[2:].lower().replace(" ", "_") + "fn")
    x = torch.cat([ties_and_neighbours(fmt), every_bf16().float()])
    x = x if fmt is FP8_E4M3 else x[~x.isnan()]
    with np.errstate(all="ignore"):
        cast = x.numpy().astype(dtype)
    mode = False if fmt is FP8_E4M3 else None
    assert same(round_to(x, fmt, saturate=mode), torch.from_numpy(cast.astype(np.float32)))
    known = ~x.isnan().numpy() & ~np.isnan(cast.astype(np.float32))
    assert (encode(x, fmt, saturate=mode).numpy()[known] == cast.view(np.uint8)[known]).all()


@settings(deadline=None, max_examples=200)
@given(st.floats(width=32, allow_nan=False), st.sampled_from([*CASTS, *SMALL, *ODD]))
def test_properties(number, fmt):
    x = torch.tensor([number])
    y = round_to(x, fmt)
    assert same(round_to(y, fmt), y)
    assert same(round_to(-x, fmt), -y)
    if y.isfinite() and abs(number) <= fmt.largest:
        exponent = max(math.frexp(number)[1] - 1, fmt.emin) if number else fmt.emin
        assert abs(y.item() - number) <= 2.0 ** (exponent - fmt.mantissa_bits - 1)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20), st.sampled_from(SMALL + ODD))
def test_order_is_kept(numbers, fmt):
    y = round_to(torch.tensor(sorted(numbers)), fmt, saturate=True)
    assert (y.diff() >= 0).all()


# Bits


@pytest.mark.parametrize("fmt", SMALL + ODD, ids=name)
def test_decode_is_the_table(fmt):
    known = table(fmt)
    reals = decode(torch.arange(2**fmt.bits), fmt).tolist()
    assert {code: v for code, v in enumerate(reals) if math.isfinite(v)} == known
    assert math.copysign(1, reals[2 ** (fmt.bits - 1)]) == -1


@pytest.mark.parametrize("fmt", CASTS, ids=name)
def test_decode_is_torchs_view_of_the_bits(fmt):
    codes = torch.arange(2**fmt.bits, dtype=torch.int32)
    narrow = codes.to(torch.uint8 if fmt.bits == 8 else torch.uint16)
    assert same(decode(codes, fmt), narrow.view(CASTS[fmt]).float())


@pytest.mark.parametrize("fmt", [*CASTS, *SMALL, *ODD], ids=name)
def test_encode_turns_decode_back(fmt):
    codes = torch.arange(2**fmt.bits)
    reals = decode(codes, fmt)
    back = encode(reals[~reals.isnan()], fmt)
    assert torch.equal(back.long(), codes[~reals.isnan()])
    assert back.dtype == (torch.uint8 if fmt.bits <= 8 else torch.int32)
    if reals.isnan().any():
        nan = encode(torch.tensor([math.nan]), fmt)
        assert decode(nan, fmt).isnan().all()


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2], ids=name)
def test_encode_gives_torchs_bytes(fmt):
    x = some_float32()
    x = x[~x.isnan()]
    cast = x.to(CASTS[fmt])
    known = ~cast.float().isnan()
    mode = TORCH_SATURATES if fmt is FP8_E4M3 else None
    assert torch.equal(encode(x, fmt, saturate=mode)[known], cast.view(torch.uint8)[known])


@pytest.mark.parametrize("fmt", SMALL + ODD, ids=name)
def test_values_are_the_table_in_order(fmt):
    assert values(fmt).tolist() == sorted(set(table(fmt).values()))


def test_the_published_limits():
    found = {f.name: (f.bits, f.largest, f.smallest_normal, f.smallest_subnormal) for f in (FP16, *SMALL)}
    assert found == {
        "FP16": (16, 65504, 2**-14, 2**-24),
        "FP8 E4M3": (8, 448, 2**-6, 2**-9),
        "FP8 E5M2": (8, 57344, 2**-14, 2**-16),
        "FP6 E3M2": (6, 28, 2**-2, 2**-4),
        "FP6 E2M3": (6, 7.5, 1, 0.125),
        "FP4 E2M1": (4, 6, 1, 0.5),
    }
    assert [f.emax for f in SMALL] == [8, 15, 4, 2, 2]  # table 1 of OCP MX v1.0 by its largest numbers
    for fmt, dtype in CASTS.items():
        info = torch.finfo(dtype)
        assert (fmt.largest, fmt.smallest_normal) == (info.max, info.tiny)
        assert 2.0**-fmt.mantissa_bits == info.eps


# Blocks


def mx_by_hand(row, fmt, block_size):
    """(scale codes, values) of a list of floats, one block after the other."""
    numbers, scales, out = positives(fmt), [], []
    for start in range(0, len(row), block_size):
        block = row[start : start + block_size]
        largest = max(abs(v) for v in block)
        exponent = math.floor(math.log2(largest)) - fmt.emax if largest else -127
        while largest and 2.0 ** (exponent + fmt.emax) > largest:  # where log2 was rounded up
            exponent -= 1
        while largest and 2.0 ** (exponent + fmt.emax + 1) <= largest:
            exponent += 1
        exponent = max(-127, min(127, exponent))
        scales.append(exponent + 127)
        out += [nearest(v / 2.0**exponent, fmt, numbers) * 2.0**exponent for v in block]
    return scales, out


def spread(rows, columns, seed=0):
    random = torch.Generator().manual_seed(seed)
    size = torch.exp2(torch.rand(rows, columns, generator=random) * 12 - 8)
    return torch.randn(rows, columns, generator=random) * size


@pytest.mark.parametrize("fmt", SMALL, ids=name)
@pytest.mark.parametrize(("columns", "block_size"), [(64, 32), (70, 32), (5, 32), (9, 4), (3, 1)])
def test_mx_is_the_loop(fmt, columns, block_size):
    x = spread(3, columns)
    x[1, :block_size] = 0
    x[2, 0] = 2.0**-120
    q = mx_quantize(x, fmt, block_size=block_size)
    for row, scales, back in zip(x.tolist(), q.scales.tolist(), q.dequantize(), strict=True):
        expected_scales, expected = mx_by_hand(row, fmt, block_size)
        assert scales == expected_scales
        assert same(back, torch.tensor(expected))


def test_mx_just_below_and_at_a_power_of_two():
    """log2 of the float32 below 8 rounds to 3: the exponent has to come from the bits."""
    for largest, exponent in ((8.0, 1), (float(np.nextafter(np.float32(8), np.float32(0))), 0), (1e-45, -127)):
        assert mx_quantize(torch.tensor([largest, 0.0]), FP4_E2M1).scales.item() == exponent + 127


def test_mx_saturates_within_the_block():
    q = mx_quantize(torch.tensor([7.9, -7.9, 1.0]), FP4_E2M1)
    assert q.real_scales().item() == 1
    assert q.dequantize().tolist() == [6, -6, 1]


def test_scales_are_what_torch_calls_e8m0():
    x = torch.exp2(torch.arange(-143, 128.0, dtype=torch.float64))[:, None]
    q = mx_quantize(x, FP8_E5M2)
    assert torch.equal(q.real_scales().float(), q.scales.view(torch.float8_e8m0fnu).float())
    assert {int(s) for s in (q.scales.min(), q.scales.max())} == {0, 127 + 127 - 15}
    assert torch.equal(q.dequantize(), x)  # 2**-143 is the least scale, 2**-127, times E5M2's least number


def nvfp4_by_hand(x):
    tensor_scale = np.float32(max(abs(v) for row in x for v in row) / 2688)
    small, scale_numbers, out = positives(FP4_E2M1), positives(FP8_E4M3), []
    for row in x:
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            wanted = max(abs(v) for v in block) / 6 / float(tensor_scale)
            scale = nearest(wanted, FP8_E4M3, scale_numbers) * float(tensor_scale)
            out += [nearest(v / scale, FP4_E2M1, small) * scale if scale else 0.0 for v in block]
    return tensor_scale, out


@pytest.mark.parametrize("columns", [48, 40, 7])
def test_nvfp4_is_the_loop(columns):
    x = spread(4, columns)
    x[1, :16] = 0
    x[3, :16] *= 1e-7  # its scale rounds to 0
    q = nvfp4_quantize(x)
    tensor_scale, expected = nvfp4_by_hand(x.tolist())
    assert q.tensor_scale.item() == tensor_scale
    assert torch.equal(q.dequantize().flatten(), torch.tensor(expected))
    assert (q.dequantize()[3, :16] == 0).all()


def test_bits_and_bytes_are_counted():
    x = spread(4, 64)
    counts = {
        4.25: mx_quantize(x, FP4_E2M1),
        6.25: mx_quantize(x, FP6_E3M2),
        8.25: mx_quantize(x, FP8_E4M3),
        4.5 + 32 / 256: nvfp4_quantize(x),
    }
    for bits, q in counts.items():
        assert q.bits_per_element == bits
        packed = q.packed()
        tensor_scale = 0 if q.tensor_scale is None else 4
        assert q.nbytes == packed.numel() + q.scales.numel() * q.scales.element_size() + tensor_scale
        again = unpack(packed, bits=q.fmt.bits, count=x.numel()).view(x.shape)
        assert torch.equal(again, q.codes)
    short = mx_quantize(spread(2, 33), FP4_E2M1)  # the block of one element pays for a whole scale
    assert short.scales.shape == (2, 2)
    assert short.nbytes == 33 + 4


@pytest.mark.parametrize("quantizer", [lambda x: mx_quantize(x, FP4_E2M1), nvfp4_quantize], ids=["mx", "nvfp4"])
def test_blocks_edges(quantizer):
    for x in (torch.zeros(2, 40), torch.tensor([5.0]), torch.full((3, 17), -1e-3), torch.tensor([1e-37, 0.0])):
        before = x.clone()
        q = quantizer(x)
        assert torch.equal(x, before)
        assert q.dequantize().shape == x.shape
        assert (q.dequantize() - x).abs().max() <= x.abs().max() / 4
    with pytest.raises(ValueError, match="fit into float32"):  # in which, at most, scales are kept
        quantizer(torch.tensor([1e300], dtype=torch.float64))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.tensor([[torch.finfo(dtype).max, 1.0, -1.0]], dtype=dtype)
        back = quantizer(x).dequantize()
        assert back.dtype == dtype
        assert torch.isfinite(back).all()
    negative_zero = quantizer(torch.tensor([-1e-6, 1.0])).dequantize()[0]
    assert negative_zero == 0
    assert negative_zero.signbit()
    powers = quantizer(spread(2, 50))
    assert torch.equal(quantizer(spread(2, 50) * 2).codes, powers.codes)  # a power of two changes scales only


def test_nvfp4_scales_finer_than_mx():
    """On even data the finer scale is worth a decibel or more, for a quarter of a bit."""
    x = torch.randn(200, 320, generator=torch.Generator().manual_seed(0))
    error = {q.block_size: (q.dequantize() - x).square().mean() for q in (mx_quantize(x, FP4_E2M1), nvfp4_quantize(x))}
    assert error[16] < 0.8 * error[32]


# Refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: round_to(torch.tensor([1]), FP16), "x must be floating point, got torch.int64"),
        (lambda: round_to([1.0], FP16), "x must be a tensor, got"),
        (lambda: round_to(torch.tensor([math.nan]), FP4_E2M1), "no code for NaN"),
        (lambda: round_to(torch.tensor([1.0]), FP4_E2M1, saturate=False), "only saturate"),
        (lambda: round_to(torch.tensor([1.0]), torch.float16), "must be a FloatFormat"),
        (lambda: decode(torch.tensor([256]), FP8_E4M3), r"0\.\.255"),
        (lambda: decode(torch.tensor([-1]), FP8_E4M3), r"0\.\.255"),
        (lambda: decode(torch.tensor([1.0]), FP8_E4M3), "did you pass x"),
        (lambda: mx_quantize(torch.tensor([1.0, math.inf]), FP4_E2M1), "finite"),
        (lambda: mx_quantize(torch.tensor(1.0), FP4_E2M1), "at least one dimension"),
        (lambda: mx_quantize(torch.empty(0, 32), FP4_E2M1), "empty"),
        (lambda: mx_quantize(torch.ones(4), FP4_E2M1, block_size=0), "block_size must be at least 1"),
        (lambda: mx_quantize(torch.ones(4), FP16), "at most 8 bits"),
        (lambda: mx_quantize(torch.ones(4), "fp4"), "must be a FloatFormat"),
        (lambda: nvfp4_quantize(torch.ones(4, dtype=torch.int8)), "floating point"),
        (lambda: nvfp4_quantize(torch.tensor(1.0)), "at least one dimension"),
        (lambda: FloatFormat("x", 0, 3, 0), "exponent_bits must be 1..8"),
        (lambda: FloatFormat("x", 4, 3.0, 7), "mantissa_bits must be an int"),
        (lambda: FloatFormat("x", 4, 3, 7, "inf"), "specials must be one of"),
        (lambda: FloatFormat("x", 1, 3, 0), "no normal number"),
        (lambda: FloatFormat("x", 4, 0, 7, "nan"), "no normal number"),
        (lambda: FloatFormat("x", 8, 3, 127, "none"), "beyond float32"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_million_values_take_far_less_than_a_tenth_of_a_second():
    x, times = torch.randn(1_000_000), []
    for _ in range(5):
        start = time.thread_time()
        round_to(x, FP8_E4M3)
        times.append(time.thread_time() - start)
    assert min(times) < 0.1


def test_nvfp4_blocks_whose_scale_rounds_to_zero_become_zero():
    x = torch.zeros(48)
    x[:16], x[16:32] = 1000.0, 1e-9
    back = nvfp4_quantize(x).dequantize()
    assert back[16:].tolist() == [0.0] * 32
    assert (back[:16] == 1000.0).all()
