"""Room 3: integers. Products of codes, and what they stand for."""

import torch

from quantlab.hunt.case import Room, bug, fine


@bug("E7", chapter="07", title="A product in int8")
class ScalesThatDoNotFactorOut:
    """x @ w.T computed from int8 codes, one scale for each row of w: within 3 % of the float product (Frobenius
    norm of the difference, relative)."""

    def program(x, w):
        x_scale = x.abs().amax(0).clamp(min=1e-30) / 127
        w_scale = w.abs().amax(1).clamp(min=1e-30) / 127
        x_codes, w_codes = torch.round(x / x_scale), torch.round(w / w_scale[:, None])
        return (x_codes @ w_codes.T) * x_scale * w_scale

    def mended(x, w):
        x_scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        w_scale = w.abs().amax(1).clamp(min=1e-30) / 127
        x_codes, w_codes = torch.round(x / x_scale), torch.round(w / w_scale[:, None])
        return (x_codes @ w_codes.T) * x_scale * w_scale

    def mended_again(x, w):
        x_scale = x.abs().max().clamp(min=1e-30) / 127
        w_scale = w.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        products = (x / x_scale).round().int() @ (w / w_scale).round().int().T
        return products.float() * (x_scale * w_scale.T)

    def demo(program):
        x = torch.cos(torch.arange(96 * 16) * 0.7).view(96, 16)
        w = torch.sin(torch.arange(16 * 16) * 1.3).view(16, 16)
        error = (program(x, w) - x @ w.T).norm() / (x @ w.T).norm()
        print(f"16 inputs, 16 outputs: relative error {error:.2%}")

    def test(program):
        x = torch.linspace(-1, 1, 32).view(4, 8)
        w = torch.cos(torch.arange(24.0)).view(3, 8)
        assert program(x, w).shape == (4, 3)
        x[:, 2] *= 20
        square = torch.cos(torch.arange(64.0)).view(8, 8)
        exact = x @ square.T
        assert (program(x, square) - exact).norm() <= 0.03 * exact.norm()

    hint = "Which of the two scales belongs to something that is summed over? Does the layer have to be square?"
    story = (
        "A scale for each input cannot be taken out of the sum over inputs; here it multiplies the *outputs*, "
        "which only a square layer with inputs of one size hides. A scale per token or per row does come out: W·X "
        "≈ s·s·(sum of codes)."
    )


@fine(chapter="07", title="The sum of four terms")
class CrossTerms:
    """The sum of (x - x_zero) * (w - w_zero) over codes x, w (int32 vectors) and zero points, which the program
    gets from sum(x * w), sum(x) and sum(w) without touching the vectors again."""

    def program(x, x_zero, w, w_zero):
        products, x_sum, w_sum = (x * w).sum(), x.sum(), w.sum()
        return products - x_zero * w_sum - w_zero * x_sum + len(x) * x_zero * w_zero

    def tempting(x, x_zero, w, w_zero):
        products, x_sum, w_sum = (x * w).sum(), x.sum(), w.sum()
        return products - x_zero * w_sum - w_zero * x_sum - len(x) * x_zero * w_zero

    def demo(program):
        x, w = torch.tensor([3, 7, 1]), torch.tensor([5, 0, 2])
        print("zero points taken off twice, and once put back:", int(program(x, 2, w, 1)))

    def test(program):
        x, w = torch.arange(40) % 11, torch.arange(40) % 7
        assert program(x, 5, w, 3) == ((x - 5) * (w - 3)).sum()

    hint = "Multiply (x − a)(w − b) out."
    story = (
        "(x − a)(w − b) = xw − aw − bx + ab. The last term has a plus: what both corrections took off was taken "
        "off twice. It is summed over all n terms, so it comes n times."
    )


@bug("E23", chapter="07", title="A dot product of bytes")
class PairsIn16Bits:
    """The exact sum of x * w for codes x in 0..255 and w in -128..127 (vectors of an even length)."""

    def program(x, w):
        products = x.to(torch.int32) * w.to(torch.int32)
        pairs = products[0::2] + products[1::2]  # two at a time, as the processor does it
        pairs = pairs.clamp(-(2**15), 2**15 - 1)  # 16 bits hold a product: 255 * 127 is 32,385
        return pairs.sum().item()

    def mended(x, w):
        return (x.to(torch.int32) * w.to(torch.int32)).sum().item()

    def mended_again(x, w):
        return round(torch.dot(x.to(torch.float64), w.to(torch.float64)).item())

    def demo(program):
        random = torch.Generator().manual_seed(0)
        x, w = torch.randint(0, 256, (512,), generator=random), torch.randint(-30, 30, (512,), generator=random)
        print("512 terms:", program(x, w), " exact:", (x * w).sum().item())

    def test(program):
        assert program(torch.tensor([255, 255]), torch.tensor([127, 127])) == 2 * 255 * 127

    hint = "One product fits into 16 bits. What is added next?"
    story = (
        "Two products are added before there is room for them: 2·255·127 saturates at 32,767. x86 processors "
        "without VNNI, with the usual instruction, do just that, so the same int8 model gives other numbers there; "
        '7-bit weights ("reduce_range") avoid it.'
    )


@bug("E8", chapter="08", title="Dynamic")
class DynamicBits:
    """(codes, scale) of activations x (tokens, inputs), dynamic int8: one scale for each token, so that codes *
    scale is within a 200th of the token's largest magnitude of x."""

    def program(x):
        bits = 8 if x.abs().max() > 1 else 4  # dynamic: quiet inputs need less precision
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / (2 ** (bits - 1) - 1)
        return torch.round(x / scale), scale

    def mended(x):
        scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return torch.round(x / scale), scale

    def mended_again(x):
        scale = torch.stack([row.abs().max() for row in x])[:, None].clamp(min=1e-30) / 126
        return (x / scale + 0.5).floor(), scale

    def demo(program):
        x = torch.linspace(-3, 3, 96).view(4, 24)
        codes, scale = program(x)
        error = (codes * scale - x).abs().amax(1) / x.abs().amax(1)
        print("largest error over largest value, of each token:", [f"{e:.4f}" for e in error.tolist()])

    def test(program):
        x = torch.linspace(-0.03, 0.02, 40).view(2, 20)
        codes, scale = program(x)
        assert ((codes * scale - x).abs() <= x.abs().amax(1, keepdim=True) / 200).all()

    hint = "The print-out shows one size of input. Multiply the input by a small number."
    story = (
        "Dynamic means that the *scale* is taken anew from each input (each token); the number of bits never "
        "changes. Here quiet inputs silently get 4 bits."
    )


@fine(chapter="07", title="A bias of its own size")
class BiasInAccumulator:
    """Integer codes of a bias, to be added to an int32 sum of products, which counts in units of x_scale *
    w_scale: in these units each code is at most one half away from the bias."""

    def program(bias, x_scale, w_scale):
        return torch.round(bias / (x_scale * w_scale)).to(torch.int32)  # no scale of its own, no zero point

    def tempting(bias, x_scale, w_scale):
        return torch.round(bias / (bias.abs().max() / 127)).to(torch.int32)  # 8 bits, like all the others

    def demo(program):
        print(
            "codes:", program(torch.tensor([0.5, -1.2]), 0.02, 0.001).tolist(), "- an int8 layer with codes beyond 127"
        )

    def test(program):
        bias = torch.tensor([0.513, -1.207])
        assert ((program(bias, 0.02, 0.001) * 0.02 * 0.001 - bias).abs() <= 0.5 * 0.02 * 0.001 + 1e-7).all()

    hint = "What are the units of the sum that the bias is added to?"
    story = (
        "The sum of products counts in steps of s_x·s_w, and so must whatever is added to it. The accumulator has "
        "32 bits, so the codes may be large, and a bias costs 4 bytes for each row, which is nothing."
    )


@bug("E29", chapter="03", title="A scale for each output")
class WrongAxis:
    """(codes, scale) of GPT-2's kind of weight, (inputs, outputs) with y = x @ weight: int8, one scale for each
    output, so that codes * scale is close to the weight."""

    def program(weight):
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127  # one for each output channel
        return torch.round(weight / scale), scale

    def mended(weight):
        scale = weight.abs().amax(0, keepdim=True).clamp(min=1e-30) / 127
        return torch.round(weight / scale), scale

    def mended_again(weight):
        rows = weight.T.contiguous()  # as nn.Linear has it
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        return torch.round(rows / scale).T, scale.T

    def demo(program):
        weight = torch.sin(torch.arange(64 * 64.0)).view(64, 64)
        codes, scale = program(weight)
        error = (codes * scale - weight).norm() / weight.norm()
        print(f"64 inputs, 64 outputs: {scale.numel()} scales, relative error {error:.2%}")

    def test(program):
        weight = torch.sin(torch.arange(8 * 24.0)).view(8, 24)
        assert program(weight)[1].numel() == 24

    hint = "A square matrix hides something. Count the scales of one that is not square."
    story = (
        "nn.Linear stores (outputs, inputs), GPT-2's Conv1D (inputs, outputs): the row of the one is the column "
        "of the other. A scale for each *input* cannot even be taken out of the sum. Test the axis with a layer "
        "that is not square."
    )


@bug("E19", chapter="09", title="LLM.int8()")
class WeightOnly:
    """x @ w.T as LLM.int8() has it: the inputs (columns of x) with a magnitude of 6 or more in float, all others
    in int8 codes times int8 codes, one scale for each token and one for each row of w."""

    def program(x, w):
        loud = (x.abs() >= 6).any(0)
        scale = w[:, ~loud].abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        w_codes = torch.round(w[:, ~loud] / scale)
        return x[:, loud] @ w[:, loud].T + x[:, ~loud] @ (w_codes * scale).T

    def mended(x, w):
        loud = (x.abs() >= 6).any(0)
        scale = w[:, ~loud].abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        w_codes = torch.round(w[:, ~loud] / scale)
        x_scale = x[:, ~loud].abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        x_codes = torch.round(x[:, ~loud] / x_scale)
        return x[:, loud] @ w[:, loud].T + (x_codes @ w_codes.T) * x_scale * scale.T

    def mended_again(x, w):
        quiet = x.abs().amax(0) < 6
        a, b = x[:, quiet], w[:, quiet]
        sa, sb = (t.abs().max(1).values.clamp(min=1e-30) / 127 for t in (a, b))
        integers = (a / sa[:, None]).round().int() @ (b / sb[:, None]).round().int().T
        return integers * torch.outer(sa, sb) + torch.nn.functional.linear(x[:, ~quiet], w[:, ~quiet])

    def demo(program):
        x = torch.cos(torch.arange(12 * 32) * 0.9).view(12, 32)
        x[:, 5] *= 40
        w = torch.sin(torch.arange(16 * 32.0)).view(16, 32)
        error = (program(x, w) - x @ w.T).norm() / (x @ w.T).norm()
        print(f"one loud input of 32: relative error {error:.3%}")

    def test(program):
        w = torch.tensor([[0.5, 0.3]])
        one, other = (program(torch.tensor([[1.0, small]]), w) for small in (0.5001, 0.5010))
        assert torch.equal(one, other)

    hint = "If x is rounded too, two inputs that are very close give the very same output. Do they?"
    story = (
        "The print-out is *too* good: only the weights are rounded. LLM.int8() rounds weights and activations, "
        "vector by vector, and multiplies integers; it keeps the loud inputs in float just because activations "
        "are rounded."
    )


ROOM = Room(
    "integers",
    "Integers",
    (ScalesThatDoNotFactorOut, CrossTerms, PairsIn16Bits, DynamicBits, BiasInAccumulator, WrongAxis, WeightOnly),
)
