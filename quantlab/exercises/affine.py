"""Exercises of chapter 1: scale and zero point."""

import math

import torch

from quantlab.affine import choose_qparams, dequantize, fake_quantize, quantize
from quantlab.exercises.material import off_ties, uniform
from quantlab.judging import Exercise, as_number, expect, two_ends


def quantize_solution(x, scale, zero_point, qmin, qmax):
    """Round to the nearest step first, then shift, then clamp."""
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax).int()


def _quantize_cases(random):
    for zero_point, qmin, qmax in ((1, 0, 3), (-3, -8, 7), (100, 0, 255), (5, 1, 12)):
        scale = uniform(random, 0.05, 2.0)
        yield scale * off_ties(random, 12, qmin - zero_point - 4, qmax - zero_point + 4), scale, zero_point, qmin, qmax


def _quantize_edges():
    yield torch.tensor([-0.3, 0.0, 0.3, 0.74]), 0.5, 1, 0, 3
    yield torch.tensor([-2.0, 9.0]), 0.5, 1, 0, 3
    yield torch.tensor([0.25, 0.75, 1.25, -0.25]), 0.5, 3, 0, 7  # ties, in numbers that binary holds exactly


def parameters_solution(low, high, bits):
    """Widen to hold 0, then the scale, then the code that 0 falls on, as a whole number."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def _parameters_cases(random):
    for bits in (2, 4, 8):
        steps, scale = 2**bits - 1, uniform(random, 0.01, 1.0)
        below = off_ties(random, 1, 1, steps - 1).item()  # of the steps; no tie, so one zero point is right
        yield -below * scale, (steps - below) * scale, bits
        yield uniform(random, 0.1, 9.0), uniform(random, 10.0, 11.0), bits
        yield uniform(random, -11.0, -10.0), uniform(random, -9.0, -0.1), bits


def _parameters_edges():
    yield -1.0, 3.0, 4
    yield 0.0, 6.0, 2
    yield 10.0, 11.0, 8
    yield -11.0, -10.0, 8


def rosetta_solution(codes, scale, zero_point):
    """s (q - z) = s q + b with b = -s z; and s (q + z') with z' = -z."""
    return -scale * zero_point, -zero_point


def _rosetta_cases(random):
    for zero_point in (10, -3, 128):
        yield torch.arange(-4.0, 20.0), uniform(random, 0.01, 2.0), zero_point


def _rosetta_edges():
    yield torch.arange(-4.0, 20.0), 0.5, 10
    yield torch.arange(-4.0, 20.0), 1.5, 0


def bits_solution():
    """On even data the ratio is 20 log10(2**bits - 1): 29.8 dB at 5 bits, which is not enough."""
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for bits in range(2, 9):
        qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=2**bits - 1)
        error = (fake_quantize(x, qp) - x).square().mean()
        if 10 * torch.log10(x.square().mean() / error) >= 30:
            return bits


def _bits_rule(bits):
    number = as_number(bits)
    expect(
        number is not None and float(number).is_integer() and 1 <= number <= 32,
        f"Return a number of bits, an int; got {bits!r}.",
    )
    reached = f"{20 * math.log10(2**number - 1):.2f} dB at {number:g} bits"
    expect(
        number >= 6,
        f"{reached}, below the 30 dB asked for. 6.02 dB a bit is nearly true: the steps are 2**bits - 1, not 2**bits.",
    )
    expect(number <= 6, f"{reached}: enough, but so are 6 bits. The least number was asked for.")


def range_solution(x, bits):
    """Try ranges that stop short of the extremes; keep the one with the least error."""
    best = None
    for part in torch.linspace(0.05, 1.0, 39):
        qp = choose_qparams(x.min() * part, x.max() * part, qmin=0, qmax=2**bits - 1)
        error = (fake_quantize(x, qp) - x).square().mean().item()
        if best is None or error < best[0]:
            best = error, (x.min() * part).item(), (x.max() * part).item()
    return best[1], best[2]


def _range_cases(random):
    """Heavy tails, of another size and number of bits in each case: no range fits them all."""
    for bits in (2, 3):
        tails = torch.rand(1000, generator=random).clamp(min=0.02).sqrt()
        yield uniform(random, 0.1, 10.0) * torch.randn(1000, generator=random) / tails, bits


def _range_rule(ends, x, bits):
    """At most 1.1 times the least error that shrinking both ends alike can reach."""
    low, high = two_ends(ends)

    def error(low, high):
        qp = choose_qparams(torch.tensor(float(low)), torch.tensor(float(high)), qmin=0, qmax=2**bits - 1)
        return (dequantize(quantize(x, qp), qp) - x).square().mean().item()

    mine, whole, best = error(low, high), error(x.min(), x.max()), error(*range_solution(x, bits))
    expect(
        mine < whole,
        f"[{low:.3g}, {high:.3g}] gives mean squared error {mine:.4g} at {bits} bits, the whole range {whole:.4g}: it "
        "should be less. Which part of the range holds hardly any values?",
    )
    expect(
        mine <= 1.1 * best,
        f"Mean squared error {mine:.4g} at {bits} bits, {mine / best:.2f} times the least that one factor for both "
        f"ends can reach; 1.1 was asked for (the whole range: {whole / best:.2f}). Try several factors, keep the best.",
    )
    return f"Mean squared error {mine / whole:.2f} of the whole range's."


EXERCISES = {
    "1.1": Exercise(
        "quantize",
        hints=(
            "Three things happen to x, in this order: divide and round, shift, clamp.",
            "torch.round rounds to nearest; torch.clamp(t, qmin, qmax) cuts.",
            "torch.clamp(torch.round(x / scale) + zero_point, ?, ?)",
        ),
        solution=quantize_solution,
        cases=_quantize_cases,
        edges=_quantize_edges,
        slips={
            "Codes are whole numbers: did you round?": ("torch.round(x / scale)", "x / scale", ".int()", ""),
            "Codes must stay in qmin..qmax: clamp.": ("torch.clamp(", "(", ", qmin, qmax).int", ").int"),
            "Clamp last, after zero_point was added.": (
                "+ zero_point, qmin, qmax).int()", ", qmin, qmax) + zero_point"
            ),
            "Nearest means up as well as down: floor is not round.": ("torch.round", "torch.floor"),
            "Nearest means down as well as up: ceil is not round.": ("torch.round", "torch.ceil"),
            "Cutting off the decimals goes towards 0, not to the nearest code.": ("torch.round", "torch.trunc"),
            "A tie, such as 0.5 steps, goes to the even number: let torch.round decide it.": (
                "torch.round(x / scale)", "torch.floor(x / scale + 0.5)"
            ),
            "Add zero_point after rounding, and let torch.round decide ties.": (
                "torch.round(x / scale) + zero_point", "torch.round(x / scale + zero_point)"
            ),
            "Real 0 must get the code zero_point: it is added.": ("+ zero_point", "- zero_point"),
            "zero_point is a code: it is added after the division, not taken from x.": (
                "torch.round(x / scale) + zero_point", "torch.round((x - zero_point) / scale)"
            ),
            "zero_point was left out.": (" + zero_point", ""),
            "How many steps fit into x? Divide by the scale.": ("x / scale", "x * scale"),
            "The largest code is qmax itself.": ("qmax).int", "qmax + 1).int"),
            "The largest code is qmax itself, not one less.": ("qmax).int", "qmax - 1).int"),
            "The bounds are qmin and qmax, not always 0 and 3.": ("qmin, qmax).int", "0, 3).int"),
            "The smallest code is qmin, not always 0.": ("qmin, qmax).int", "0, qmax).int"),
        },
    ),
    "1.2": Exercise(
        "scale and zero point",
        hints=(
            "First make sure that 0 lies inside: low = min(low, 0), high = max(high, 0).",
            "2**bits codes have 2**bits - 1 steps between them.",
            "low must fall on code 0: 0 = round(low / scale) + zero_point.",
        ),
        solution=parameters_solution,
        cases=_parameters_cases,
        edges=_parameters_edges,
        slips={
            "2**bits codes have 2**bits - 1 steps between them.": ("(2**bits - 1)", "2**bits"),
            "zero_point is a code: a whole number.": ("round(-low / scale)", "-low / scale"),
            "Mind the sign: low must fall on code 0.": ("round(-low", "round(low"),
            "Widen the range to hold 0 before anything else.": ("min(low, 0.0), max(high, 0.0)", "low, high"),
            "Clamping the zero point loses the data; widen the range to hold 0 instead.": (
                "min(low, 0.0), max(high, 0.0)", "low, high",
                "round(-low / scale)", "min(max(round(-low / scale), 0), 2**bits - 1)",
            ),
            "Widen upwards too: data below 0 need a code for 0 as well.": ("max(high, 0.0)", "high"),
            "Widen downwards too: data above 0 need a code for 0 as well.": ("min(low, 0.0)", "low"),
            "Widened downwards only, and the zero point clamped: data below 0 are lost.": (
                "max(high, 0.0)", "high", "round(-low / scale)", "min(max(round(-low / scale), 0), 2**bits - 1)"
            ),
            "low must fall on code 0, whatever the size of high: no absolute values.": (
                "round(-low / scale)", "round(abs(low) / scale) if low < 0 else round(low / scale)",
                "min(low, 0.0), max(high, 0.0)", "abs(low), abs(high)",
            ),
            "Round to the nearest code; int() and // go down.": ("round(-low / scale)", "int(-low / scale)"),
            "The order is scale, zero_point.": ("scale, round(-low / scale)", "round(-low / scale), scale"),
        },
    ),
    "1.3": Exercise(
        "Rosetta",
        hints=(
            "Write scale·(q − z) without brackets.",
            "scale·q − scale·z: what is added is a real number, not a code.",
            "offset = −scale·z, and z' is z with its sign turned.",
        ),
        solution=rosetta_solution,
        cases=_rosetta_cases,
        edges=_rosetta_edges,
        slips={
            "The offset is a real number: multiply the zero point by scale.": ("-scale * zero_point", "-zero_point"),
            "scale·(q − z) = scale·q − scale·z: which sign has what is added?": ("-scale *", "scale *"),
            "Which sign makes scale·(q + z') equal?": (", -zero_point", ", zero_point"),
            "z' is a code: it is not multiplied by scale.": (", -zero_point", ", -scale * zero_point"),
            "Both signs are turned.": ("-scale * zero_point, -zero_point", "scale * zero_point, zero_point"),
            "The order is offset, z'.": ("-scale * zero_point, -zero_point", "-zero_point, -scale * zero_point"),
        },
    ),
    "1.4": Exercise(
        "bits for 30 dB",
        hints=(
            "Loop over bits, quantize, measure.",
            "10·log10(mean x² / mean error²) is the ratio in decibels.",
            "choose_qparams(x.min(), x.max(), qmin=0, qmax=2**bits - 1), then fake_quantize.",
        ),
        solution=bits_solution,
        rule=_bits_rule,
        edges=lambda: [()],
    ),
    "1.5": Exercise(
        "a better range",
        hints=(
            "Rounding error grows with the range, clipping error shrinks. Where is their sum least?",
            "Shrink both ends by the same factor and try some twenty factors between 0.2 and 1.",
            "Keep the smallest (fake_quantize(x, qp) - x).square().mean() seen so far.",
        ),
        solution=range_solution,
        cases=_range_cases,
        rule=_range_rule,
    ),
}  # fmt: skip
