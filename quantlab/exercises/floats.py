"""Exercises of chapter 5: floating-point formats."""

import math

import torch

from quantlab.exercises.material import uniform
from quantlab.floats import FP4_E2M1, mx_quantize, round_to
from quantlab.judging import Exercise, as_number, as_tensor, expect


def decode_solution(sign, exponent, mantissa):
    """A leading 1 and 2**(E - 7); in subnormals no leading 1 and 2**-6; one code is NaN."""
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        size = mantissa / 8 * 2.0**-6
    else:
        size = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


def _decode_cases(random):
    for code in torch.randint(0, 256, (30,), generator=random).tolist():
        yield code >> 7, code >> 3 & 15, code & 7


def _decode_edges():
    """The telling ones first, then all."""
    yield from ((0, 7, 0), (0, 7, 4), (0, 10, 5), (0, 0, 0), (0, 0, 3), (1, 9, 1), (0, 15, 6), (0, 15, 7), (1, 0, 0))
    yield from ((code >> 7, code >> 3 & 15, code & 7) for code in range(256))


def round_solution(x, mantissa_bits, emin, largest):
    """Steps of 2**(exponent - mantissa_bits), but none finer than at emin; then nearest even; saturated throughout."""
    x = x.clamp(-largest, largest)
    exponent = torch.log2(x.abs()).floor().clamp(min=emin)
    step = 2.0 ** (exponent - mantissa_bits)
    return torch.round(x / step) * step


def _round_cases(random):
    """Formats of any kind; numbers of all sizes that it has and beyond, half-way ones, and a few zeros."""
    for mantissa_bits in (1, 2, 3, 7, 10):
        emin = -int(torch.randint(0, 15, (1,), generator=random))
        emax = int(torch.randint(2, 16, (1,), generator=random))
        largest = (2 - 2.0**-mantissa_bits) * 2.0**emax
        size = torch.rand(60, generator=random) * (emax - emin + mantissa_bits + 4) + emin - mantissa_bits - 2
        x = torch.exp2(size) * (1 - 2.0 * torch.randint(0, 2, (60,), generator=random))
        steps = torch.randint(0, 2 ** (mantissa_bits + 2), (60,), generator=random)
        halves = steps * 2.0 ** (emin - mantissa_bits - 1)
        yield torch.stack([x, halves.clamp(max=largest) * x.sign()]), mantissa_bits, emin, largest


def _round_edges():
    e4m3 = 3, -6, 448.0
    yield torch.tensor([1.0, 1.125, 3.5, -240.0]), *e4m3
    yield torch.tensor([1.05, 1.1, 17.2, -101.0, 0.3]), *e4m3
    yield torch.tensor([1.0625, 1.1875, -21.0]), *e4m3
    yield torch.tensor([0.0, 2.0]), *e4m3
    yield torch.tensor([2**-7 * 1.1, 2**-9, 2**-10 * 1.01, 2**-10, 1e-6]), *e4m3
    yield torch.tensor([500.0, -1e6, 460.0]), *e4m3


def mx_solution(block):
    """The scale exponent is that of the largest element, less the 2 of FP4's largest power, 4."""
    largest = block.abs().max()
    if largest == 0:
        return 0, torch.zeros_like(block)
    exponent = math.frexp(largest.item())[1] - 1 - 2
    return exponent, round_to(block / 2.0**exponent, FP4_E2M1) * 2.0**exponent


def _exponent_and_values(answer, block):
    """The result, but for a block of zeros, whose exponent is free, with 0 as its exponent."""
    found = answer(block)
    expect(isinstance(found, tuple | list) and len(found) == 2, f"Return two things: exponent, values; got {found!r}.")
    exponent, values = found
    free = not block.any() and as_number(exponent) is not None and math.isfinite(as_number(exponent))
    return (0 if free else exponent), values


def _mx_cases(random):
    for count, size in ((32, 0), (32, -9), (5, 6), (1, 2), (16, -20)):
        block = torch.randn(count, generator=random) * torch.exp2(torch.randn(count, generator=random))
        yield (block * uniform(random, 1.0, 2.0) * 2.0**size,)


def _mx_edges():
    yield (torch.tensor([0.1, -0.2, 0.3, 0.75]),)
    yield (torch.tensor([6.0, 1.0]),)
    yield (torch.tensor([-7.9, 1.1, 0.0]),)
    yield (torch.tensor([4.0, 0.4, -0.2]),)
    yield (torch.zeros(32),)
    yield (torch.tensor([8 - 2**-21, 0.0]),)
    yield (torch.tensor([-(2 - 2**-23), 0.7]),)


def loss_scale_solution(grads):
    """The largest power of two that leaves the largest gradient at or below 65504."""
    return math.floor(math.log2(65504 / grads.abs().max().item()))


def _loss_scale_cases(random):
    """Gradients of all sizes, the largest on either side of 0, none so near the edge that rounding could decide."""
    for size, sign in ((-12, -1), (-20, 1), (-3, -1), (10, 1), (-40, -1)):
        g = torch.randn(500, generator=random) * torch.exp2(2 * torch.randn(500, generator=random))
        peak = uniform(random, 1.03, 1.96) * 2.0**size
        g = g / g.abs().max() * (peak / 2)
        g[int(torch.randint(0, 500, (1,), generator=random))] = sign * peak
        yield (g,)


def _loss_scale_edges():
    yield (torch.tensor([0.5, -3.0, 1.0]),)
    yield (torch.tensor([[1e-6, 3e-5], [-1e-7, 0.0]]),)
    yield (torch.tensor([200_000.0, 1.0]),)


def exponents_solution(blocks):
    """Try the standard's exponent and the next one; keep the one with the smaller squared error."""
    standard = torch.frexp(blocks.abs().amax(1)).exponent - 3

    def error(exponent):
        scale = torch.exp2(exponent.float())[:, None]
        return (round_to(blocks / scale, FP4_E2M1) * scale - blocks).square().sum(1)

    return torch.where(error(standard + 1) < error(standard), standard + 1, standard)


def _blocks(random):
    for count, spread, size in ((500, 0.4, 1.0), (400, 0.0, 0.01), (300, 0.6, 300.0)):
        exponents = torch.exp2(torch.randn(count, 32, generator=random) * spread)
        yield (torch.randn(count, 32, generator=random) * exponents * size,)


def _exponents_rule(exponents, blocks):
    """At most 1.005 times the squared error of the better of two exponents in each block: the rule's and the next."""
    exponents = as_tensor(exponents)
    expect(exponents is not None, "Return a tensor of exponents.")
    count = len(blocks)
    expect(exponents.shape == (count,), f"One exponent a block, ({count},); got shape {tuple(exponents.shape)}.")
    expect(bool((exponents == exponents.round()).all()), "E8M0 holds whole exponents only; yours have fractions.")
    mine, best = (_mx_error(blocks, e) for e in (exponents, exponents_solution(blocks)))
    standard = (mx_quantize(blocks, FP4_E2M1).dequantize() - blocks).square().mean().item()
    expect(
        mine < standard,
        f"{mine / standard:.3f} times the squared error of the standard's exponents: it should be less. In which "
        "blocks does the standard's scale saturate the largest element?",
    )
    expect(
        mine <= 1.005 * best,
        f"{mine / standard:.3f} times the squared error of the standard's exponents; {best / standard:.3f} can be "
        "reached. One rule for all blocks is not enough: let each block decide by its own error.",
    )
    return f"{mine / standard:.3f} times the squared error of the standard's exponents in the last case."


def _mx_error(blocks, exponents):
    scale = torch.exp2(exponents.float())[:, None]
    return (round_to(blocks / scale, FP4_E2M1) * scale - blocks).square().mean().item()


EXERCISES = {
    "5.1": Exercise(
        "decode an FP8 number",
        hints=(
            "There are three cases: the one NaN, an exponent field of 0, and all others.",
            "All others: a leading 1, eighths from the mantissa, and 2 to the power of exponent − 7.",
            "Exponent field 0: the value is mantissa / 8 · 2**−6, without the leading 1.",
        ),
        solution=decode_solution,
        cases=_decode_cases,
        edges=_decode_edges,
        tolerance=0.0,
        smallest=0.0,
        slips={
            "A bias of 7: an exponent field of 7 is 2^0.": ("exponent - 7", "exponent - 8"),
            "The bias is 7, not 15.": ("exponent - 7", "exponent - 15"),
            "A leading 1 is not stored: (1 + M/8).": ("(1 + mantissa / 8)", "(mantissa / 8)"),
            "The first mantissa bit is worth a half: three bits count eighths.": (
                "(1 + mantissa / 8)", "(1 + mantissa / 10)"
            ),
            "All bits 0 is the number 0, and an exponent field of 0 has no leading 1.": (
                "mantissa / 8 * 2.0**-6", "(1 + mantissa / 8) * 2.0**-7"
            ),
            "A subnormal has the exponent of field 1, which is −6.": ("2.0**-6", "2.0**-7"),
            "The sign bit makes a number negative.": ("-size if sign else size", "size"),
            "E4M3 has no infinity: the largest exponent field holds numbers too, up to 448.": (
                "exponent == 15 and mantissa == 7", "exponent == 15 and mantissa > 0"
            ),
            "All bits of exponent and mantissa set is the one code for NaN.": ("mantissa == 7", "mantissa == 8"),
        },
    ),
    "5.2": Exercise(
        "round to a format",
        hints=(
            "First the exponent of each x, floor(log2|x|), then its step, then round(x / step) · step.",
            "Clamp the exponent from below at emin: that handles subnormals, and log2(0) = −inf as well.",
            "step = 2.0 ** (exponent - mantissa_bits); at the end clamp to −largest..largest.",
        ),
        solution=round_solution,
        cases=_round_cases,
        edges=_round_edges,
        tolerance=0.0,
        smallest=0.0,
        slips={
            "The nearer of two neighbours wins: round, do not cut off.": ("torch.round", "torch.floor"),
            "The nearer of two neighbours wins: round, do not cut off towards 0.": ("torch.round", "torch.trunc"),
            "Half-way goes to the even mantissa, as torch.round has it.": (
                "torch.round(x / step)", "x.sign() * torch.floor(x.abs() / step + 0.5)"
            ),
            "Zero is a number of every format. What is log2 of 0 in your formula?": (".clamp(min=emin)", ""),
            "Below 2^emin the steps do not get finer any more: these are the subnormals.": (
                "torch.log2(x.abs()).floor().clamp(min=emin)", "torch.log2(x.abs().clamp(min=1e-30)).floor()"
            ),
            "Below 2^emin lie the subnormals: they are numbers of the format, not 0.": (
                "return torch.round(x / step) * step",
                "return torch.where(x.abs() < 2.0**emin, torch.zeros_like(x), torch.round(x / step) * step)",
            ),
            "Above the largest number it saturates: the largest is what comes back.": (
                "x = x.clamp(-largest, largest)", ""
            ),
            "Below −largest it saturates as well.": ("x.clamp(-largest, largest)", "x.clamp(max=largest)"),
            "The step follows x: 2^(e − mantissa_bits) between 2^e and 2^(e+1).": (
                "exponent - mantissa_bits)", "0 * exponent - mantissa_bits)"
            ),
            "The exponent is rounded down: floor(log2|x|).": (
                "torch.log2(x.abs()).floor()", "torch.log2(x.abs()).round()"
            ),
            "Multiply by the step again: it is x rounded, not its number of steps.": (
                "torch.round(x / step) * step", "torch.round(x / step)"
            ),
            "Use all the arguments: mantissa_bits is not always 3.": ("- mantissa_bits", "- 3"),
            "Use all the arguments: emin is not always −6.": ("min=emin", "min=-6"),
            "The sign of x stays.": ("torch.round(x / step)", "torch.round(x.abs() / step)"),
        },
    ),
    "5.3": Exercise(
        "an MXFP4 block",
        hints=(
            "The scale should bring the largest magnitude to between 4 and 8.",
            "exponent = floor(log2(max |block|)) − 2; math.frexp gives the exponent without a logarithm.",
            "math.frexp(m) is (f, e) with 0.5 <= f < 1, so floor(log2(m)) is e − 1. Treat an all-zero block apart.",
        ),
        solution=mx_solution,
        use=_exponent_and_values,
        cases=_mx_cases,
        edges=_mx_edges,
        tolerance=1e-6,
        smallest=0.0,
        slips={
            "Half of FP4's range stays empty: its largest power of two is 4 = 2², so subtract 2.": (" - 1 - 2", " - 1"),
            "Subtract 2, not 3: the largest would come to 8 or above, where all from 6 on saturates.": (
                " - 1 - 2", " - 1 - 3"
            ),
            "Round the logarithm down, not up.": (
                "math.frexp(largest.item())[1] - 1 - 2", "math.ceil(math.log2(largest.item())) - 2"
            ),
            "Round the logarithm down, not to the nearest.": (
                "math.frexp(largest.item())[1] - 1 - 2", "round(math.log2(largest.item())) - 2"
            ),
            "E8M0 has an exponent and nothing else: a whole number.": (
                "math.frexp(largest.item())[1] - 1 - 2", "math.log2(largest.item()) - 2"
            ),
            "Divide by the scale before you round, and multiply back.": (
                "round_to(block / 2.0**exponent, FP4_E2M1) * 2.0**exponent", "round_to(block, FP4_E2M1)"
            ),
            "These are FP4's numbers: multiply by the scale again.": (
                "round_to(block / 2.0**exponent, FP4_E2M1) * 2.0**exponent", "round_to(block / 2.0**exponent, FP4_E2M1)"
            ),
            "The largest *magnitude* decides, a negative one as well.": ("block.abs().max()", "block.max()"),
            "A hair below a power of two float32's log2 rounds up: math.frexp reads the exponent from the bits.": (
                "math.frexp(largest.item())[1] - 1 - 2", "math.floor(torch.log2(largest).item()) - 2"
            ),
            "Return the exponent, not the scale 2**exponent itself.": ("return exponent,", "return 2.0**exponent,"),
            "The values must be numbers of FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6, times the scale.": (
                "round_to(block / 2.0**exponent, FP4_E2M1)", "torch.round(block / 2.0**exponent).clamp(-6, 6)"
            ),
        },
    ),
    "5.4": Exercise(
        "the largest loss scale",
        hints=(
            "Only the gradient with the largest magnitude decides.",
            "2^k times it must stay at or below 65504. Which k is the last to do so?",
            "k is log2(65504 / max |g|), rounded in the direction that is safe.",
        ),
        solution=loss_scale_solution,
        cases=_loss_scale_cases,
        edges=_loss_scale_edges,
        slips={
            "FP16 ends at 65504, and infinity spoils the step: round down.": ("math.floor(", "math.ceil("),
            "FP16 ends at 65504: round down, not to the nearest.": ("math.floor(", "round("),
            "A negative gradient overflows as well: look at both signs.": ("grads.abs().max()", "grads.max()"),
            "The scale is 2^k with a whole number k.": ("math.floor(math.log2(65504 / grads.abs().max().item()))",
                                                        "math.log2(65504 / grads.abs().max().item())"),
            "There is room for more before 65504.": ("65504", "1"),
            "There is room for twice as much: 65504 lies just below 2^16, not 2^15.": ("65504", "32752"),
            "Return the exponent k, not the scale 2^k itself.": ("return ", "return 2 ** "),
            "Mind the sign: small gradients need a large scale.": ("65504 / grads.abs().max().item()",
                                                                   "grads.abs().max().item() / 65504"),
            "The largest gradient decides, not the typical one.": ("grads.abs().max()", "grads.abs().mean()"),
            "2^k was asked for: the logarithm to base 2.": ("math.log2", "math.log"),
            "int() cuts towards 0; where k is negative that is upwards. Take math.floor.": ("math.floor(", "int("),
        },
    ),
    "5.5": Exercise(
        "better exponents",
        hints=(
            "With the standard's exponent, what lies between 6 and 8 becomes 6. What would the next exponent do to it?",
            "Compute the squared error of each block with the standard's exponent and with that plus one.",
            "torch.where(error_of_next < error_of_standard, standard + 1, standard)",
        ),
        solution=exponents_solution,
        cases=_blocks,
        rule=_exponents_rule,
        rounds=1,
    ),
}  # fmt: skip
