"""Exercises of chapter 1: scale and zero point."""

import math

import torch

from quantlab.affine import choose_qparams, dequantize, fake_quantize, quantize
from quantlab.checks import Exercise, expect


def quantize_solution(x, scale, zero_point, qmin, qmax):
    """Round to the nearest step first, then shift, then clamp."""
    return torch.clamp(torch.round(x / scale) + zero_point, qmin, qmax).int()


def _test_quantize(f):
    x = torch.tensor([-1.0, -0.3, 0.0, 0.3, 0.74, 2.0])
    codes = f(x, 0.5, 1, 0, 3)
    expect(torch.is_tensor(codes), f"Return a tensor of codes; got {type(codes).__name__}.")
    expect(
        bool((codes == codes.float().round()).all()),
        f"Codes must be whole numbers; got {codes.tolist()}. Did you round?",
    )
    expect(
        codes.min() >= 0 and codes.max() <= 3,
        f"Codes must stay in qmin..qmax = 0..3; got {codes.tolist()}. Did you clamp, and to these bounds?",
    )
    zero = f(torch.zeros(1), 0.5, 1, 0, 3).item()
    expect(
        zero == 1, f"Real 0 must get the code zero_point = 1; got {zero}. What happens to zero_point in your formula?"
    )
    expect(
        codes.tolist() == [0, 0, 1, 2, 2, 3],
        f"x = {[round(v, 2) for v in x.tolist()]} should give [0, 0, 1, 2, 2, 3]; got {codes.int().tolist()}. "
        "Nearest means up as well as down: floor is not round.",
    )
    tie = f(torch.tensor([0.25]), 0.5, 1, 0, 3).item()
    expect(
        tie == 1,
        f"0.25 / 0.5 is a tie, 0.5: it rounds to the even 0, plus 1 is 1; got {tie}. "
        "Add zero_point after rounding, and let torch.round decide ties.",
    )


def parameters_solution(low, high, bits):
    """Widen to hold 0, then the scale, then the code that 0 falls on, as a whole number."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**bits - 1)
    return scale, round(-low / scale)


def _test_parameters(f):
    for low, high, bits in ((-1.0, 3.0, 4), (-2.0, 0.5, 8), (0.0, 6.0, 2)):
        scale, zero_point = f(low, high, bits)
        steps = 2**bits - 1
        expect(
            abs(scale * steps - (high - low)) < 1e-4 * (high - low),
            f"For [{low}, {high}] and {bits} bits the grid is {scale * steps:.4g} wide, not {high - low:.4g}: "
            f"{2**bits} codes have {steps} steps between them.",
        )
        expect(float(zero_point).is_integer(), f"zero_point is a code, so a whole number; got {zero_point}.")
        expect(
            abs(zero_point + low / scale) <= 0.5001,
            f"For [{low}, {high}] low should fall on code 0, so zero_point is about {-low / scale:.2f}; "
            f"got {zero_point}. Mind the sign.",
        )
    scale, zero_point = f(10.0, 11.0, 8)
    expect(
        0 <= zero_point <= 255 and abs((255 - zero_point) * scale - 11) < 0.1,
        f"Data in [10, 11] must come back as about 11, and real 0 needs a code; you gave scale {scale:.4g}, zero point "
        f"{zero_point}. Widen the range to hold 0 before anything else.",
    )
    scale, zero_point = f(-11.0, -10.0, 8)
    expect(
        zero_point == 255, f"For data in [-11, -10] real 0 is the last code, 255; got {zero_point}. Widen upwards too."
    )


def rosetta_solution(codes, scale, zero_point):
    """s (q - z) = s q + b with b = -s z; and s (q + z') with z' = -z."""
    return -scale * zero_point, -zero_point


def _test_rosetta(f):
    for scale, zero_point in ((0.02, 10), (0.5, -3), (1.5, 0)):
        codes = torch.arange(-4.0, 20.0)
        offset, plus = f(codes, scale, zero_point)
        real = scale * (codes - zero_point)
        expect(
            torch.allclose(scale * codes + offset, real, atol=1e-5),
            f"scale·q + offset should be scale·(q − {zero_point}) for scale {scale}; with offset {offset} it is off by "
            f"{(scale * codes + offset - real).abs().max():.3g}. The offset is a real number: multiply by scale.",
        )
        expect(
            torch.allclose(scale * (codes + plus), real, atol=1e-5),
            f"scale·(q + z') should be scale·(q − {zero_point}); with z' = {plus} it is not. "
            "Which sign makes them equal?",
        )


def bits_solution():
    """On even data the ratio is 20 log10(2**bits - 1): 29.8 dB at 5 bits, which is not enough."""
    torch.manual_seed(0)
    x = torch.rand(10_000) * 2 - 1
    for bits in range(2, 9):
        qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=2**bits - 1)
        error = (fake_quantize(x, qp) - x).square().mean()
        if 10 * torch.log10(x.square().mean() / error) >= 30:
            return bits


def _test_bits(f):
    bits, right = f(), bits_solution()
    expect(isinstance(bits, int), f"Return a number of bits, an int; got {bits!r}.")
    reached = f"{20 * math.log10(2**bits - 1):.2f} dB at {bits} bits"
    expect(
        bits >= right,
        f"{reached}, below the 30 dB asked for. 6.02 dB a bit is nearly true: the steps are 2**bits - 1, not 2**bits.",
    )
    expect(bits <= right, f"{reached}: enough, but so are {right} bits. The least number was asked for.")


def range_solution(x, bits):
    """Try ranges that stop short of the extremes; keep the one with the least error."""
    best = None
    for part in torch.linspace(0.2, 1.0, 33):
        qp = choose_qparams(x.min() * part, x.max() * part, qmin=0, qmax=2**bits - 1)
        error = (fake_quantize(x, qp) - x).square().mean().item()
        if best is None or error < best[0]:
            best = error, (x.min() * part).item(), (x.max() * part).item()
    return best[1], best[2]


def _test_range(f):
    x = _heavy()
    low, high = f(x.clone(), 4)

    def error(a, b):
        qp = choose_qparams(torch.tensor(float(a)), torch.tensor(float(b)), qmin=0, qmax=15)
        return (dequantize(quantize(x, qp), qp) - x).square().mean().item()

    mine, whole = error(low, high), error(x.min(), x.max())
    expect(
        mine < whole,
        f"[{low:.3g}, {high:.3g}] gives mean squared error {mine:.4g}, the whole range {whole:.4g}: it should be "
        "less. Which part of the range holds hardly any values?",
    )
    expect(
        mine <= 0.6 * whole,
        f"Mean squared error {mine:.4g} is {mine / whole:.2f} of the whole range's; 0.6 can be reached. "
        "Try several fractions of the range and keep the best.",
    )
    return f"Mean squared error {mine / whole:.2f} of the whole range's."


def _heavy():
    """4,000 values with heavy tails, always the same."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(4000, generator=random) / torch.rand(4000, generator=random).clamp(min=0.02).sqrt()


EXERCISES = {
    "1.1": Exercise(
        "quantize",
        _test_quantize,
        (
            "Three things happen to x, in this order: divide and round, shift, clamp.",
            "torch.round rounds to nearest; torch.clamp(t, qmin, qmax) cuts.",
            "torch.clamp(torch.round(x / scale) + zero_point, ?, ?)",
        ),
        quantize_solution,
    ),
    "1.2": Exercise(
        "scale and zero point",
        _test_parameters,
        (
            "First make sure that 0 lies inside: low = min(low, 0), high = max(high, 0).",
            "2**bits codes have 2**bits - 1 steps between them.",
            "low must fall on code 0: 0 = round(low / scale) + zero_point.",
        ),
        parameters_solution,
    ),
    "1.3": Exercise(
        "Rosetta",
        _test_rosetta,
        (
            "Write scale·(q − z) without brackets.",
            "scale·q − scale·z: what is added is a real number, not a code.",
            "offset = −scale·z, and z' is z with its sign turned.",
        ),
        rosetta_solution,
    ),
    "1.4": Exercise(
        "bits for 30 dB",
        _test_bits,
        (
            "Loop over bits, quantize, measure.",
            "10·log10(mean x² / mean error²) is the ratio in decibels.",
            "choose_qparams(x.min(), x.max(), qmin=0, qmax=2**bits - 1), then fake_quantize.",
        ),
        bits_solution,
    ),
    "1.5": Exercise(
        "a better range",
        _test_range,
        (
            "Rounding error grows with the range, clipping error shrinks. Where is their sum least?",
            "Shrink both ends by the same factor and try some twenty factors between 0.2 and 1.",
            "Keep the smallest (fake_quantize(x, qp) - x).square().mean() seen so far.",
        ),
        range_solution,
    ),
}
