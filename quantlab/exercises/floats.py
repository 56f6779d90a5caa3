"""Exercises of chapter 5: floating-point formats."""

import math

import torch

from quantlab.checks import Exercise, expect
from quantlab.floats import FP4_E2M1, FP8_E4M3, FP8_E5M2, FP16, decode, mx_quantize, round_to


def decode_solution(sign, exponent, mantissa):
    """A leading 1 and 2**(E - 7); in subnormals no leading 1 and 2**-6; one code is NaN."""
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        size = mantissa / 8 * 2.0**-6
    else:
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def _test_decode(f):
    def compare(sign, exponent, mantissa, tip):
        got = f(sign, exponent, mantissa)
        right = decode(torch.tensor(sign * 128 + exponent * 8 + mantissa), FP8_E4M3).item()
        expect(
            got == right or got != got and right != right,
            f"sign {sign}, exponent {exponent:04b}, mantissa {mantissa:03b}: got {got}, which is not its value. {tip}",
        )

    compare(0, 7, 0, "This one is 1.0: what does the bias of 7 do to an exponent field of 7?")
    compare(0, 7, 4, "The first mantissa bit is worth a half, after a leading 1 that is not stored.")
    compare(0, 10, 5, "Three mantissa bits count eighths: (1 + M/8) · 2^(E − 7).")
    compare(0, 0, 0, "All bits 0 is the number 0. With a leading 1 it could not be.")
    compare(0, 0, 3, "An exponent field of 0 is a subnormal: no leading 1, and the exponent of field 1, which is −6.")
    compare(1, 9, 1, "The sign bit makes it negative.")
    compare(0, 15, 6, "E4M3 has no infinity: the largest exponent field holds numbers too, up to 448.")
    compare(0, 15, 7, "All bits of exponent and mantissa set is the one code for NaN.")
    for code in range(128):
        for sign in (0, 1):
            compare(sign, code >> 3, code & 7, "Most others are right; which case is this?")
    zero = f(1, 0, 0)
    expect(math.copysign(1, zero) == -1, f"Sign 1 and all other bits 0 is −0.0; got {zero}.")


def round_solution(x, mantissa_bits, emin, largest):
    """Steps of 2**(exponent - mantissa_bits), but none finer than at emin; then nearest even, then saturate."""
    exponent = torch.log2(x.abs()).floor().clamp(min=emin)
    step = 2.0 ** (exponent - mantissa_bits)
    return (torch.round(x / step) * step).clamp(-largest, largest)


def _test_round(f):
    def compare(x, fmt, tip):
        x = torch.tensor(x)
        got = f(x.clone(), fmt.mantissa_bits, fmt.emin, fmt.largest)
        expect(torch.is_tensor(got), f"Return a tensor of x's shape; got {type(got).__name__}.")
        right = round_to(x, fmt, saturate=True)
        wrong = (got != right).nonzero().flatten().tolist()
        if wrong:
            i = wrong[0]
            expect(False, f"{fmt.name}: {x[i]:.6g} became {got[i]:.6g}. {tip}")

    compare([1.0, 1.125, 3.5, -240.0], FP8_E4M3, "It is a number of the format, so it should stay.")
    compare(
        [1.05, 1.1, 17.2, -101.0, 0.3],
        FP8_E4M3,
        "Between 2^e and 2^(e+1) the step is 2^(e − mantissa_bits), and the nearer of two neighbours wins.",
    )
    compare(
        [1.0625, 1.1875, -20.0 - 1],
        FP8_E4M3,
        "It lies half-way between two numbers: take the even mantissa, as torch.round does with whole steps.",
    )
    compare([0.0], FP8_E4M3, "Zero is a number of every format. What is log2 of 0 in your formula?")
    compare(
        [2**-7 * 1.1, 2**-9, 2**-10 * 1.01, 2**-10, 1e-6],
        FP8_E4M3,
        "Below 2^emin the steps do not get finer any more: these are the subnormals.",
    )
    compare([500.0, -1e6], FP8_E4M3, "Above the largest number it saturates: the largest is what comes back.")
    for fmt in (FP8_E5M2, FP4_E2M1, FP16):
        x = torch.exp2(torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 30 - 18)
        compare((x * fmt.largest / 1000).tolist(), fmt, "E4M3 is right, this is not: do you use all the arguments?")


def mx_solution(block):
    """The scale exponent is that of the largest element, less the 2 of FP4's largest power, 4."""
    largest = block.abs().max()
    if largest == 0:
        return 0, torch.zeros_like(block)
    exponent = math.frexp(largest.item())[1] - 1 - 2
    return exponent, round_to(block / 2.0**exponent, FP4_E2M1) * 2.0**exponent


def _test_mx(f):
    random = torch.Generator().manual_seed(0)
    blocks = [torch.tensor([0.1, -0.2, 0.3, 0.75]), torch.tensor([6.0, 1.0]), torch.tensor([7.9, -1.1, 0.0])]
    blocks += [torch.randn(32, generator=random) * 2.0**k for k in (-9, 0, 5)]
    for block in blocks:
        exponent, back = f(block.clone())
        q = mx_quantize(block, FP4_E2M1)
        right, peak = int(q.scales[0]) - 127, block.abs().max().item()
        where = f"For a block whose largest magnitude is {peak:.4g}"
        expect(
            float(exponent).is_integer(),
            f"{where} the exponent is {exponent}: E8M0 has an exponent and nothing else, so it is whole.",
        )
        expect(
            exponent <= right,
            f"{where} your scale 2^{exponent:.0f} puts it at {peak / 2.0**exponent:.3g}, below 4: half of FP4's range "
            "stays empty. Round the logarithm down; the 4 in FP4 is worth 2.",
        )
        expect(
            exponent >= right,
            f"{where} your scale 2^{exponent:.0f} puts it at {peak / 2.0**exponent:.3g}, at 8 or above: all from 6 on "
            "saturates. The largest power of two in FP4 is 4 = 2².",
        )
        expect(
            torch.is_tensor(back) and torch.allclose(back, q.dequantize()),
            f"{where} the exponent is right, the values are not: divide by the scale, round to FP4, multiply back.",
        )
    exponent, back = f(torch.zeros(32))
    expect(
        math.isfinite(exponent) and bool((back == 0).all()),
        f"A block of zeros should stay zeros with any scale; got exponent {exponent}. What is log2 of 0?",
    )
    exponent, _ = f(torch.tensor([8 - 2**-21, 0.0]))
    expect(
        exponent == 0,
        f"7.9999995 lies below 8, so its exponent is 2 and the block's is 0; got {exponent:.0f}. float32's log2 "
        "rounds up to 3 here: math.frexp or torch.frexp read the exponent from the bits.",
    )


def loss_scale_solution(grads):
    """The largest power of two that leaves the largest gradient at or below 65504."""
    return math.floor(math.log2(65504 / grads.abs().max().item()))


def _test_loss_scale(f):
    random = torch.Generator().manual_seed(0)
    for size in (2**-12, 2**-20, 2**-3, 1000.0):
        g = torch.randn(10_000, generator=random) * size * torch.exp2(torch.randn(10_000, generator=random) * 3)
        g[0] = -2 * g.abs().max()  # the largest is negative
        k, peak = f(g.clone()), g.abs().max().item()
        expect(float(k).is_integer(), f"The scale is 2^k with a whole number k; got k = {k}.")
        expect(abs(k) < 200, f"Return the exponent k, not the scale 2^k itself; got {k}.")
        grown = peak * 2.0**k
        expect(
            grown <= 65504,
            f"The largest gradient, {peak:.3g}, becomes {grown:.3g} with 2^{k:.0f}: FP16 ends at 65504, and infinity "
            "spoils the step. Look at both signs.",
        )
        lost = (round_to(g * 2.0**k, FP16) == 0).float().mean().item()
        best = (round_to(g * 2.0 ** loss_scale_solution(g), FP16) == 0).float().mean().item()
        expect(
            grown > 65504 / 2,
            f"2^{k:.0f} takes the largest gradient to {grown:.3g}: there is room for more before 65504. "
            f"{lost:.2%} of the gradients become 0, {best:.2%} would with all of the room.",
        )


def exponents_solution(blocks):
    """Try the standard's exponent and the next one; keep the one with the smaller squared error."""
    standard = torch.frexp(blocks.abs().amax(1)).exponent - 3

    def error(exponent):
        scale = torch.exp2(exponent.float())[:, None]
        return (round_to(blocks / scale, FP4_E2M1) * scale - blocks).square().sum(1)

    return torch.where(error(standard + 1) < error(standard), standard + 1, standard)


def _test_exponents(f):
    random = torch.Generator().manual_seed(0)
    blocks = torch.randn(2000, 32, generator=random) * torch.exp2(torch.randn(2000, 32, generator=random) * 0.4)
    exponents = torch.as_tensor(f(blocks.clone()))
    expect(exponents.shape == (2000,), f"One exponent a block, shape (2000,); got shape {tuple(exponents.shape)}.")
    expect(
        bool((exponents == exponents.float().round()).all()), "E8M0 holds whole exponents only; yours have fractions."
    )
    scale = torch.exp2(exponents.float())[:, None]
    mine = (round_to(blocks / scale, FP4_E2M1) * scale - blocks).square().mean().item()
    standard = (mx_quantize(blocks, FP4_E2M1).dequantize() - blocks).square().mean().item()
    ratio = mine / standard
    expect(
        ratio < 1,
        f"{ratio:.3f} times the squared error of the standard's exponents: it should be less. In which blocks does "
        "the standard's scale saturate the largest element?",
    )
    expect(
        ratio <= 0.95,
        f"{ratio:.3f} times the squared error of the standard's exponents; 0.95 can be reached. One rule for all "
        "blocks is not enough: let each block decide by its own error.",
    )
    return f"{ratio:.3f} times the squared error of the standard's exponents."


EXERCISES = {
    "5.1": Exercise(
        "decode an FP8 number",
        _test_decode,
        (
            "There are three cases: the one NaN, an exponent field of 0, and all others.",
            "All others: a leading 1, eighths from the mantissa, and 2 to the power of exponent − 7.",
            "Exponent field 0: the value is mantissa / 8 · 2**−6, without the leading 1.",
        ),
        decode_solution,
    ),
    "5.2": Exercise(
        "round to a format",
        _test_round,
        (
            "First the exponent of each x, floor(log2|x|), then its step, then round(x / step) · step.",
            "Clamp the exponent from below at emin: that handles subnormals, and log2(0) = −inf as well.",
            "step = 2.0 ** (exponent - mantissa_bits); at the end clamp to −largest..largest.",
        ),
        round_solution,
    ),
    "5.3": Exercise(
        "an MXFP4 block",
        _test_mx,
        (
            "The scale should bring the largest magnitude to between 4 and 8.",
            "exponent = floor(log2(max |block|)) − 2; math.frexp gives the exponent without a logarithm.",
            "math.frexp(m) is (f, e) with 0.5 <= f < 1, so floor(log2(m)) is e − 1. Treat an all-zero block apart.",
        ),
        mx_solution,
    ),
    "5.4": Exercise(
        "the largest loss scale",
        _test_loss_scale,
        (
            "Only the gradient with the largest magnitude decides.",
            "2^k times it must stay at or below 65504. Which k is the last to do so?",
            "k is log2(65504 / max |g|), rounded in the direction that is safe.",
        ),
        loss_scale_solution,
    ),
    "5.5": Exercise(
        "better exponents",
        _test_exponents,
        (
            "With the standard's exponent, what lies between 6 and 8 becomes 6. What would the next exponent do to it?",
            "Compute the squared error of each block with the standard's exponent and with that plus one.",
            "torch.where(error_of_next < error_of_standard, standard + 1, standard)",
        ),
        exponents_solution,
    ),
}
