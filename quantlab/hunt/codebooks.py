"""Room 2: codebooks and small floats."""

import math

import torch

from quantlab.codebook import nearest_level, nf4_levels, quantize_codebook
from quantlab.hunt.case import Room, bug, fine


@bug("E14", chapter="04", title="NF4, read back")
class EvenlySpaced:
    """The weights behind a block of NF4 codes (0..15) whose largest magnitude is absmax."""

    def program(codes, absmax):
        levels = torch.linspace(-1, 1, 16)
        return levels[codes] * absmax

    def mended(codes, absmax):
        return nf4_levels()[codes] * absmax

    def mended_again(codes, absmax):
        normal = torch.distributions.Normal(0.0, 1.0)
        outermost = 1 - (1 / 30 + 1 / 32) / 2
        up, down = (normal.icdf(torch.linspace(0.5, outermost, count)) for count in (9, 8))
        levels = torch.cat([-down.flip(0), up[1:]]) / up[-1]
        return torch.take(levels, codes) * absmax

    def demo(program):
        back = program(torch.arange(16), 0.08)
        print(f"{len(back.unique())} different weights, from {back.min():.3f} to {back.max():.3f}")

    def test(program):
        back = program(torch.arange(16), 2.0)
        assert back[7].abs() < 1e-6
        assert torch.allclose(back, 2 * nf4_levels(), atol=1e-4)

    hint = "Which code of NF4 stands for 0.0? Read it back."
    story = (
        "NF4's 16 levels are a look-up table, with gaps from 0.08 to 0.30 of the largest weight; they are neither "
        "evenly spaced nor the sign, exponent and fraction of a small float. Evenly spaced ones have no 0."
    )


@bug("E17", chapter="04", title="NF4, there and back")
class WholeMatrixMax:
    """weight, rounded to NF4 in blocks of 64 (its number of elements is a multiple of that): in each block to the
    nearest of the 16 levels, stretched to the block's largest magnitude."""

    def program(weight):
        absmax = weight.abs().max().clamp(min=1e-30)
        codes = nearest_level(weight / absmax, nf4_levels())
        return nf4_levels()[codes.long()] * absmax

    def mended(weight):
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
        codes = nearest_level(blocks / absmax, nf4_levels())
        return (nf4_levels()[codes.long()] * absmax).view_as(weight)

    def mended_again(weight):
        return quantize_codebook(weight, nf4_levels(), block_size=64).dequantize()

    def demo(program):
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) * 0.02
        error = (program(weight) - weight).norm() / weight.norm()
        print(f"relative error {error:.1%} with 16 levels")

    def test(program):
        weight = torch.full((2, 64), 0.01)
        weight[0, 0] = 1.0
        assert torch.allclose(program(weight)[1], weight[1])

    hint = "Make one weight very large. Whose rounding may change?"
    story = (
        "One largest weight for the whole matrix: a single outlier takes the levels away from all the others. NF4 "
        "has one absmax for each block of 64, and 8-bit double quantization to pay for them."
    )


@fine(chapter="04", title="Minus one tenth")
class LopsidedTable:
    """x (-1..1), each value rounded to the nearest of NF4's 16 levels."""

    def program(x):
        levels = nf4_levels()
        return levels[(x[:, None] - levels).abs().argmin(1)]

    def tempting(x):
        levels = nf4_levels()[7:]  # 0 and the positive ones; the sign is put back afterwards
        return x.sign() * levels[(x.abs()[:, None] - levels).abs().argmin(1)]

    def demo(program):
        back = program(torch.tensor([0.1, -0.1, 0.5, -0.5]))
        print("0.1 -> {:.4f}, -0.1 -> {:.4f}, 0.5 -> {:.4f}, -0.5 -> {:.4f}".format(*back.tolist()))

    def test(program):
        x, levels = torch.linspace(-1, 1, 501), nf4_levels()
        back = program(x)
        assert torch.isin(back, levels).all()
        assert torch.allclose((back - x).abs(), torch.stack([(x - v).abs() for v in levels]).amin(0))

    hint = "How many of the 16 levels are negative, and how many positive?"
    story = (
        "Sixteen levels, one of them exactly 0, leave 15: NF4 has 7 below and 8 above. So its table is lopsided, "
        "and −x is not rounded to the mirror image of x."
    )


@bug("E16", chapter="04", title="Information in the codes")
class EqualUse:
    """The entropy, in bits, of the NF4 codes of x (blocks of 64): minus the sum of p·log2(p), where p is the share
    of the weights that have a code."""

    def program(x):
        levels = len(nf4_levels())
        share = 1 / levels  # the levels are quantiles, so that each gets the same share
        return -levels * share * math.log2(share)

    def mended(x):
        codes = quantize_codebook(x, nf4_levels(), block_size=64).codes
        share = torch.bincount(codes.flatten().long(), minlength=16) / codes.numel()
        return -sum(p * math.log2(p) for p in share.tolist() if p > 0)

    def mended_again(x):
        codes = quantize_codebook(x, nf4_levels(), block_size=64).codes
        _, counts = codes.unique(return_counts=True)
        return torch.distributions.Categorical(counts / counts.sum()).entropy().item() / math.log(2)

    def demo(program):
        x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
        print(f"normal weights: {program(x):.2f} of 4 bits, so no code is wasted")

    def test(program):
        assert program(torch.full((64,), 0.5)) < 0.1
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        assert program(x) < 3.95

    hint = "What is the entropy if all weights are the same?"
    story = (
        "The quantiles are those of one weight, but each block is divided by its own largest, which gives the "
        "outer codes more or less than their share: use runs from about 2 to 9 percent, and the entropy is 3.9 "
        "bits, not 4."
    )


@bug("E15", chapter="04", title="NF4's sixteen levels")
class SymmetricQuantiles:
    """The 16 levels of NF4, ascending from -1 to 1: quantiles of the normal distribution, one of them exactly 0."""

    def program():
        outermost = 1 - (1 / 30 + 1 / 32) / 2
        levels = torch.special.ndtri(torch.linspace(1 - outermost, outermost, 16))
        return levels / levels.max()

    def mended():
        outermost = 1 - (1 / 30 + 1 / 32) / 2
        up = torch.special.ndtri(torch.linspace(0.5, outermost, 9))[1:]
        down = torch.special.ndtri(torch.linspace(0.5, outermost, 8))[1:]
        return torch.cat([-down.flip(0), torch.zeros(1), up]) / up[-1]

    def mended_again():
        return nf4_levels()

    def demo(program):
        print("outer:", [round(v, 3) for v in program()[[0, 1, 14, 15]].tolist()], " number:", len(program()))

    def test(program):
        assert (program() == 0).sum() == 1
        assert torch.allclose(program(), nf4_levels(), atol=1e-5)

    hint = "The print-out shows the outer levels. What about the inner ones?"
    story = (
        "Sixteen quantiles at even distances miss 0. NF4 takes 9 of them upwards from ½ and 8 downwards, drops "
        "the halves, puts an exact 0 between, and divides by the largest."
    )


@fine(chapter="05", title="The largest FP8 number")
class NoInfinity:
    """The number that an E4M3 code (0..255) stands for, as torch.float8_e4m3fn has it."""

    def program(code):
        sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
        if exponent == 15 and fraction == 7:
            return math.nan
        size = fraction * 2**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        return -size if sign else size

    def tempting(code):
        sign, exponent, fraction = code >> 7, code >> 3 & 15, code & 7
        if exponent == 15:  # as in FP16: all ones in the exponent
            return math.nan if fraction else (-math.inf if sign else math.inf)
        size = fraction * 2**-9 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7)
        return -size if sign else size

    def demo(program):
        for code in (0b0_0111_000, 0b0_1111_000, 0b0_1111_110, 0b0_1111_111):
            print(f"{code:08b} is {program(code)}")
        print("no code stands for infinity")

    def test(program):
        torchs = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
        ours = torch.tensor([program(code) for code in range(256)])
        assert torch.equal(ours.nan_to_num(nan=999), torchs.nan_to_num(nan=999))

    hint = "torch has this format: torch.tensor([126], dtype=torch.uint8).view(torch.float8_e4m3fn)."
    story = (
        "E4M3 has too few exponents to give one away: the highest is used for numbers, up to 448; only the very "
        "last code is NaN, and there is no infinity. FP16 and E5M2 do it the other way."
    )


@bug("E32", chapter="05", title="The next FP16 number")
class ElevenBits:
    """The distance from x, a normal positive float16 number, to the next larger float16 number."""

    def program(x):
        exponent = math.floor(math.log2(x))
        return 2.0 ** (exponent - 11)  # float16 has 11 bits of precision

    def mended(x):
        exponent = math.floor(math.log2(x))
        return 2.0 ** (exponent - 10)

    def mended_again(x):
        bits = torch.tensor(x, dtype=torch.float16).view(torch.int16)
        return (bits + 1).view(torch.float16).item() - x

    def demo(program):
        for x in (0.5, 1.0, 2.0, 1024.0):
            print(f"after {x:6} comes {x + program(x):.10g}")

    def test(program):
        for x in (0.5, 1.0, 1024.0):
            assert torch.tensor(x + program(x)).half().item() == x + program(x)
            assert program(x) == 2 * program(x / 2)

    hint = 'Is what "comes after" a float16 number at all? Ask torch.'
    story = (
        "11 bits of precision, but the first one, the 1 before the point, is not stored: 10 bits of fraction, so "
        "the step after 1 is 2⁻¹⁰. (Likewise n unsigned bits reach 2ⁿ − 1, not 2ⁿ⁻¹.)"
    )


@bug("E33", chapter="05", title="Sixteen bits")
class CastIsNotQuantization:
    """x, not all of it equal, quantized to 16 bits: on 65,536 evenly spaced values over its range, so that every
    error is at most one step, (max - min) / 65535."""

    def program(x):
        return x.to(torch.float16).to(torch.float32)

    def mended(x):
        low, step = x.min().double(), (x.max().double() - x.min().double()) / 65535
        return (low + step * torch.round((x - low) / step)).float()

    def mended_again(x):
        low, high = x.double().min(), x.double().max()
        codes = torch.floor((x - low) / (high - low) * 65535)
        return ((2 * codes + 1) * (high - low) / 131070 + low).float()

    def demo(program):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.02
        error = (program(x) - x).abs().max()
        print(f"largest weight {x.abs().max():.3f}, largest error {error:.6f}")

    def test(program):
        x = torch.linspace(0, 3000, 1001)
        assert (program(x) - x).abs().max() <= 3000 / 65535 * 1.01

    hint = "How does the error of the largest value compare with that of the smallest? Try values in the thousands."
    story = (
        "A cast to FP16 has no scale: its steps grow with the number (2 at 3,000), and beyond 65,504 there is "
        'only infinity. Quantization chooses a scale for the data. Say "cast" for the one, "quantize" for the '
        "other."
    )


ROOM = Room(
    "codebooks",
    "Codebooks and small floats",
    (EvenlySpaced, WholeMatrixMax, LopsidedTable, EqualUse, SymmetricQuantiles, NoInfinity, ElevenBits,
     CastIsNotQuantization),
)  # fmt: skip
