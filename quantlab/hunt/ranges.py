"""Room 1: ranges. Steps, zero points and clamps."""

import torch

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.hunt.case import Room, bug, fine


@bug("E28", chapter="01", title="Codes back to reals")
class Decode:
    """The reals behind the codes, where code = round(real / scale) + zero_point."""

    def program(codes, scale, zero_point):
        return codes * scale + zero_point

    def mended(codes, scale, zero_point):
        return (codes - zero_point) * scale

    def mended_again(codes, scale, zero_point):
        return codes * scale - zero_point * scale

    def demo(program):
        weights = torch.tensor([-0.61, 0.02, 0.36])
        back = program(torch.round(weights / 0.02), 0.02, 0)
        print("weights", [round(v, 2) for v in weights.tolist()])
        print("back   ", [round(v, 2) for v in back.tolist()])

    def test(program):
        real = program(torch.tensor([10.0, 30.0]), 0.02, 10)
        assert torch.allclose(real, torch.tensor([0.0, 0.4]), atol=1e-5)

    hint = "Which of the arguments has a value in the print-out that hides what happens to it?"
    story = (
        "The zero point is a code, not a real: it must come off before the scale is applied, s·(q − z). With z = "
        "0, as in the print-out, nobody notices."
    )


@fine(chapter="01", title="Halves")
class HalvesToEven:
    """Whole numbers nearest to x, without a drift: over many ties the errors add up to nothing."""

    def program(x):
        return torch.round(x)

    def tempting(x):
        return torch.floor(x + 0.5)

    def demo(program):
        halves = torch.tensor([0.5, 1.5, 2.5, 3.5])
        print("of", halves.tolist(), "it makes", program(halves).tolist())

    def test(program):
        ties = torch.arange(100) + 0.5
        assert (program(ties) - ties).abs().max() == 0.5
        assert (program(ties) - ties).sum() == 0

    hint = "What is the mean error over 0.5, 1.5, 2.5 and so on, if every half goes up?"
    story = (
        "Ties go to the even neighbour, so that as many go up as down. Were all halves rounded up, every tie "
        "would add half a step, and sums would drift."
    )


@bug("E5", chapter="01", title="The nearest multiple")
class Floor:
    """Codes of x, from -128 to 127: each stands for the multiple of `step` that is nearest to the value."""

    def program(x, step):
        return torch.floor(x / step).clamp(-128, 127)

    def mended(x, step):
        return torch.round(x / step).clamp(-128, 127)

    def mended_again(x, step):
        return torch.floor(x / step + 0.5).clamp(-128, 127)

    def demo(program):
        x = torch.linspace(-1, 1, 1001)
        error = (program(x, 0.01) * 0.01 - x).abs().max().item()
        print(f"largest error {error:.4f}, and one step is 0.0100")

    def test(program):
        assert program(torch.tensor([0.9, -0.9]), 1.0).tolist() == [1, -1]

    hint = "How large may the error be, if the nearest multiple is taken?"
    story = (
        "Floor takes the multiple below, not the nearest. Errors reach a whole step instead of half of one, all "
        "have one sign, and the mean squared error is four times as large."
    )


@bug("E4", chapter="01", title="A zero point for any range")
class ClippedZeroPoint:
    """(scale, zero_point) with codes 0..255 for the reals low..high, low < high. zero_point is a code, and every
    real of the range, taken to its code round(real / scale) + zero_point and back, returns within one scale."""

    def program(low, high):
        scale = (high - low) / 255
        zero_point = min(max(round(-low / scale), 0), 255)  # a code, whatever the range
        return scale, zero_point

    def mended(low, high):
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / 255
        return scale, round(-low / scale)

    def mended_again(low, high):
        if low >= 0:
            return high / 255, 0
        if high <= 0:
            return -low / 255, 255
        qp = choose_qparams(torch.tensor(low), torch.tensor(high), qmin=0, qmax=255)
        return qp.scale.item(), qp.zero_point.item()

    def demo(program):
        for low, high in ((-1.0, 3.0), (-0.5, 0.1), (0.0, 6.0)):
            scale, zero_point = program(low, high)
            print(f"{low:5.1f} to {high:.1f}: scale {scale:.5f}, zero point {zero_point}")

    def test(program):
        scale, zero_point = program(10.0, 11.0)
        code = min(max(round(10.5 / scale) + zero_point, 0), 255)
        assert abs((code - zero_point) * scale - 10.5) <= scale

    hint = "All three ranges of the print-out have something in common. Try one that has not."
    story = (
        "A range that does not hold 0 has no zero point among the codes. Forcing it in there, without widening "
        "the range, moves everything: 10.5 out of 10..11 comes back as 1."
    )


@fine(chapter="01", title="Signs in a byte without signs")
class Uint8Symmetric:
    """(codes, scale, zero_point) of x on a symmetric grid in uint8: back comes scale * (code - zero_point), 0.0 as
    exactly 0.0, and everything else within half a scale."""

    def program(x):
        scale = x.abs().max().clamp(min=1e-30) / 127
        codes = torch.round(x / scale) + 128
        return codes.to(torch.uint8), scale, 128

    def tempting(x):
        scale = x.abs().max().clamp(min=1e-30) / 127
        codes = torch.round(x / scale) + 127.5  # the middle of 0..255
        return codes.to(torch.uint8), scale, 127.5

    def demo(program):
        codes, scale, zero_point = program(torch.tensor([-1.27, 0.0, 0.5, 1.27]))
        print("codes", codes.tolist(), f"scale {scale:.2f}", "zero point", zero_point)
        print("no value can get code 0; the middle of 0..255 is 127.5")

    def test(program):
        x = torch.tensor([-1.27, 0.0, 0.5, 1.27])
        codes, scale, zero_point = program(x)
        back = (codes.float() - zero_point) * scale
        assert codes.dtype == torch.uint8
        assert back[1] == 0.0
        assert ((back - x).abs() <= scale / 2 + 1e-6).all()

    hint = "What would 0.0 come back as, if the zero point were 127.5?"
    story = (
        '"Symmetric" does not mean a zero point of 0: in uint8 it is 128, an integer, so that 0.0 is a code. One '
        "code of 256 stays unused; that is the price."
    )


@bug("E3", chapter="02", title="Where the codes end")
class ClampTooFar:
    """Signed codes of x, with 0.0 at code 0. They fit into `bits` bits; what lies beyond them saturates."""

    def program(x, scale, bits):
        limit = 2**bits - 1
        return torch.round(x / scale).clamp(-limit, limit)

    def mended(x, scale, bits):
        limit = 2 ** (bits - 1) - 1
        return torch.round(x / scale).clamp(-limit, limit)

    def mended_again(x, scale, bits):
        return torch.round(x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def demo(program):
        x = torch.linspace(-1.27, 1.27, 1000)
        codes = program(x, 0.01, 8)
        print(f"codes {int(codes.min())}..{int(codes.max())}; stored as int8 they are the same:",
              torch.equal(codes.to(torch.int8).float(), codes))  # fmt: skip

    def test(program):
        codes = program(torch.tensor([2.0, -2.0]), 0.01, 8)
        assert codes.max() <= 127
        assert codes.min() >= -128

    hint = "When does a clamp do anything at all? Hand it something that it must clamp."
    story = (
        "2ⁿ − 1 counts all codes, signs included. With 8 bits the clamp stands at ±255 and never acts; a real of "
        "2.0 gets code 200, which int8 reads as −56."
    )


@bug("E2", chapter="01", title="Padding")
class RealOffset:
    """x, which has values on both sides of 0, on 256 evenly spaced reals: each value within one step (a 255th of
    the range), and 0.0, which is padding, as exactly 0.0."""

    def program(x):
        offset = x.min()
        scale = (x.max() - offset) / 255
        codes = torch.round((x - offset) / scale)
        return scale * codes + offset

    def mended(x):
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low) / 255
        zero_point = torch.round(-low / scale)
        codes = (torch.round(x / scale) + zero_point).clamp(0, 255)
        return scale * (codes - zero_point)

    def mended_again(x):
        return fake_quantize(x, choose_qparams(x.min(), x.max(), qmin=0, qmax=255))

    def demo(program):
        x = torch.linspace(-1, 2, 1000)
        print(f"largest error {(program(x) - x).abs().max():.5f}, half a step is {3 / 255 / 2:.5f}")

    def test(program):
        x = torch.tensor([-1.0, 0.0, 0.7, 1.9])
        assert program(x)[1] == 0.0

    hint = "The error is always below half a step. Of which value is that not good enough?"
    story = (
        "round((x − z)/s) with a real offset z puts the grid's first point on the minimum, and 0.0 falls between "
        "two others: padding, masks and ReLU's zeros come back as something else. An integer zero point keeps 0.0 "
        "a code."
    )


@bug("E6", chapter="01", title="The better of two grids")
class AlwaysAsymmetric:
    """x on the one of two grids that has the smaller mean squared error: symmetric (codes ±(2^(bits-1) - 1) over
    ±max|x|) or asymmetric (2^bits codes over min..max)."""

    def program(x, bits):
        # the asymmetric grid has a zero point to choose as well, so it is never the worse one
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low).clamp(min=1e-30) / (2**bits - 1)
        zero_point = torch.round(-low / scale)
        codes = (torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1)
        return scale * (codes - zero_point)

    def mended(x, bits):
        largest = 2 ** (bits - 1) - 1
        step = x.abs().max().clamp(min=1e-30) / largest
        symmetric = step * torch.round(x / step).clamp(-largest, largest)
        low, high = x.min().clamp(max=0), x.max().clamp(min=0)
        scale = (high - low).clamp(min=1e-30) / (2**bits - 1)
        zero_point = torch.round(-low / scale)
        asymmetric = scale * ((torch.round(x / scale) + zero_point).clamp(0, 2**bits - 1) - zero_point)
        return min(symmetric, asymmetric, key=lambda y: (y - x).square().mean().item())

    def mended_again(x, bits):
        half = 2 ** (bits - 1)
        even = choose_qparams(-x.abs().max(), x.abs().max(), qmin=1 - half, qmax=half - 1, symmetric=True)
        free = choose_qparams(x.min(), x.max(), qmin=0, qmax=2 * half - 1)
        candidates = {((fake_quantize(x, qp) - x) ** 2).sum().item(): fake_quantize(x, qp) for qp in (even, free)}
        return candidates[min(candidates)]

    def demo(program):
        after_relu = torch.arange(16) / 15
        symmetric = torch.round(after_relu * 7) / 7
        for name, y in (("symmetric", symmetric), ("chosen", program(after_relu, 4))):
            print(f"{name:>9}: mean squared error {(y - after_relu).square().mean():.5f}")

    def test(program):
        x = torch.arange(-7, 8) / 7
        assert torch.allclose(program(x, 4), x, atol=1e-6)

    hint = "For which 15 numbers has the symmetric grid of 4 bits no error at all?"
    story = (
        "Asymmetric wins by far after a ReLU, and by a few percent on weights; but on −7/7, −6/7 … 7/7 the "
        'symmetric grid is exact and the other is not. "Always more precise" is wrong, and its cross terms cost '
        "time."
    )


ROOM = Room(
    "ranges",
    "Ranges",
    (Decode, HalvesToEven, Floor, ClippedZeroPoint, Uint8Symmetric, ClampTooFar, RealOffset, AlwaysAsymmetric),
)
