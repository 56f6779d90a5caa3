"""Exercises of chapter 7: integer arithmetic for real."""

import torch

from quantlab.exercises.material import uniform, whole
from quantlab.judging import Exercise, as_tensor, expect
from quantlab.linear import int_linear


def int_product_solution(x_codes, x_zero, w_codes, w_zero):
    """Four terms, in integers wide enough to hold them; the first alone is a product of matrices."""
    x, w = x_codes.long(), w_codes.long()
    features = x.shape[1]
    return x @ w.T - x_zero * w.sum(1) - w_zero * x.sum(1, keepdim=True) + features * x_zero * w_zero


def _codes(random, tokens, features, outputs):
    x = torch.randint(0, 256, (tokens, features), generator=random, dtype=torch.uint8)
    return x, torch.randint(-128, 128, (outputs, features), generator=random, dtype=torch.int8)


def _int_product_cases(random):
    """The middle one is square, so that rows and columns mix up."""
    for tokens, features, outputs in ((3, 4, 5), (4, 4, 4), (2, 9, 3)):
        x, w = _codes(random, tokens, features, outputs)
        x_zero, w_zero = (whole(random, low, low + 256) for low in (0, -128))
        yield x, x_zero, w, w_zero


def _int_product_edges():
    """One of each: no zero points, each alone; a sum beyond float32, a w − zw and a product beyond 8 and 16 bits."""
    x, w = _codes(torch.Generator().manual_seed(0), 3, 4, 5)
    yield x, 0, w, 0
    yield x, 100, w, 0
    yield x, 0, w, -7
    yield torch.tensor([[5]], dtype=torch.uint8), 0, torch.tensor([[127]], dtype=torch.int8), -7
    x = torch.full((1, 2048), 255, dtype=torch.uint8)
    x[0, 0] = 254
    yield x, 0, torch.full((1, 2048), 127, dtype=torch.int8), 0


def _in_bits(dtype):
    """The product computed in a narrow type, q − z first."""

    def product(x_codes, x_zero, w_codes, w_zero):
        return ((x_codes.to(dtype) - x_zero) @ (w_codes.to(dtype) - w_zero).T).to(dtype)

    return product


def largest_k_solution(x_bits, w_bits, accumulator_bits):
    """The product of largest size is (2**x_bits - 1) · -2**(w_bits - 1), and the accumulator reaches -2**(bits - 1)."""
    largest = (2**x_bits - 1) * 2 ** (w_bits - 1)
    return 2 ** (accumulator_bits - 1) // largest


def _largest_k_cases(random):
    for low, high in ((12, 16), (16, 24), (24, 40)):
        x_bits, w_bits = torch.randint(2, 9, (2,), generator=random).tolist()
        yield x_bits, w_bits, whole(random, low, high)


def _largest_k_edges():
    yield from ((8, 8, 32), (8, 8, 16), (7, 8, 16), (8, 8, 8), (4, 4, 16), (8, 4, 24))


def saturating_solution(x_codes, w_codes):
    """Neighbours are added in 16 bits, which stop at their ends; the pairs then go into 32 bits."""
    products = x_codes.int() * w_codes.int()
    pairs = products.view(-1, 2).sum(1)
    return pairs.clamp(-(2**15), 2**15 - 1).sum().item()


def _saturating_cases(random):
    """Half of the codes lie at the ends, so that pairs saturate on both sides."""
    for count in (4, 10, 64):
        x, w = _codes(random, 1, count, 1)
        far = torch.rand(2, count, generator=random) < 0.6
        ends = torch.where(torch.rand(count, generator=random) < 0.5, 127, -128).to(torch.int8)
        yield torch.where(far[0], x.new_full((), 255), x)[0], torch.where(far[1], ends, w)[0]


def _saturating_edges():
    for x, w in (
        ([1, 2, 3, 4], [5, -6, 7, 8]),
        ([255, 255], [127, 127]),
        ([255, 255], [-128, -128]),
        ([255] * 4, [127] * 4),
        ([255, 0, 255, 0], [127] * 4),
    ):
        yield torch.tensor(x, dtype=torch.uint8), torch.tensor(w, dtype=torch.int8)


def roofline_solution(M, K, N, weight_bytes, bandwidth, rate):
    """Everything is moved once, in float32 but the weights; a multiplication and an addition a weight and token."""
    moved = K * N * weight_bytes + 4 * (M * K + M * N)
    return moved / bandwidth, 2 * M * K * N / rate


def _roofline_cases(random):
    """K is large: K − 1 additions are as good as K."""
    for M, weight_bytes in ((1, 4), (64, 0.5), (300, 1)):
        K, N = torch.randint(1000, 3000, (2,), generator=random).tolist()
        yield M, K, N, weight_bytes, uniform(random, 1e9, 1e11), uniform(random, 1e9, 1e12)


def _roofline_edges():
    yield 1, 1000, 1000, 4, 1e9, 1e9
    yield 100, 1000, 500, 1, 2e9, 4e9
    yield 100, 1000, 10, 1, 1e9, 1e9


def per_token_solution(x, w_codes, w_scale, kernel):
    """The kernel makes whole numbers; the scales of rows and tokens both factor out of its sums."""
    x_scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / x_scale).round().int() + 128
    return kernel(codes, 128, w_codes) * x_scale * w_scale


def _per_token_cases(random):
    """Tokens of very different size, some of whose extremes are negative only."""
    for tokens, outputs in ((6, 128), (3, 160)):
        x = 2 * torch.rand(tokens, 128, generator=random) - 1
        x[0], x[1] = torch.where(x[0] > 0, x[0] / 1.5, x[0]), torch.where(x[1] < 0, x[1] / 1.5, x[1])
        x = x * 10 ** (6 * torch.rand(tokens, 1, generator=random) - 3)
        w_codes = torch.randint(-127, 128, (outputs, 128), generator=random, dtype=torch.int8)
        yield x, w_codes, torch.rand(outputs, generator=random) * 0.01 + 0.001


def _with_kernel(answer, x, w_codes, w_scale):
    """(what the answer returns, how often it called the kernel): int_linear that takes 8-bit codes alone."""
    calls = []

    def kernel(x_codes, x_zero, w_codes):
        calls.append(x_codes)
        x_codes, zero = torch.as_tensor(x_codes), torch.as_tensor(x_zero)
        low, high = x_codes.min().item(), x_codes.max().item()
        expect(
            (0 <= low and high <= 255) or (-128 <= low and high <= 127),
            f"The kernel takes x_codes of 8 bits, 0..255 or −128..127; got {low:g}..{high:g}.",
        )
        expect(bool((x_codes == x_codes.round()).all()), "The kernel takes codes: whole numbers. Round first.")
        expect(
            zero.numel() == 1,
            "The kernel knows one zero point for all tokens, and got several. Symmetric codes have one everywhere.",
        )
        return int_linear(x_codes.long(), int(zero), torch.as_tensor(w_codes).long())

    return answer(x, w_codes, w_scale, kernel), len(calls)


def _per_token_rule(result, x, w_codes, w_scale):
    """Each token's outputs within 0.0075 of the float product's: the whole 8-bit grid, rounded to nearest."""
    y, calls = as_tensor(result[0]), result[1]
    right = x.double() @ (w_scale[:, None] * w_codes.double()).T
    expect(calls > 0, "The kernel was never called: the product must be one of integers.")
    expect(
        y is not None and y.shape == right.shape,
        f"Return the outputs, a tensor of shape (tokens, rows) = {tuple(right.shape)}.",
    )
    expect(calls == 1, f"The kernel was called {calls} times; one call can do all tokens.")
    errors = (y - right).norm(dim=1) / right.norm(dim=1)
    shown, sizes = ", ".join(f"{e:.2g}" for e in errors.tolist()), x.abs().amax(1)
    expect(
        errors[sizes.argmax()].item() < 0.3,
        f"Even the token with the largest numbers is wrong: relative errors {shown}. Are both scales in the result, "
        "and the codes those of the zero point that the kernel is told?",
    )
    expect(
        errors.max().item() < 0.05,
        f"Some tokens are right, others lost: relative errors {shown}. One scale for all tokens is the largest "
        "token's; and the largest value of a token may be negative.",
    )
    expect(
        errors.max().item() <= 0.0075,
        f"Relative errors of the tokens {shown}; 0.0075 for each can be reached. Is the grid of 8 bits used fully, and "
        "rounded to nearest?",
    )
    return f"Largest relative error of a token {errors.max():.4f}."


EXERCISES = {
    "7.1": Exercise(
        "the integer product",
        hints=(
            "Begin by making both codes wider: products of 8-bit codes do not fit into 8 bits, and sums need 32.",
            "x.sum(1, keepdim=True) has a row for each token, w.sum(1) an entry for each row of weights.",
            "x @ w.T − zx·(sum of each row of w) − zw·(sum of each row of x) + K·zx·zw, with K = x.shape[1].",
        ),
        solution=int_product_solution,
        cases=_int_product_cases,
        edges=_int_product_edges,
        slips={
            "8 bits are not wide enough for q − z, products and sums: use .int() or .long() first.": _in_bits(
                torch.int8
            ),
            "16 bits are not wide enough for such sums: use .int() or .long() first.": _in_bits(torch.int16),
            "float32 holds whole numbers only up to 2**24; sums of products go beyond.": (".long()", ".float()"),
            "That is the first term alone. Codes equal to their zero point stand for real 0, and must add nothing.": (
                " - x_zero * w.sum(1) - w_zero * x.sum(1, keepdim=True) + features * x_zero * w_zero", ""
            ),
            "Multiply (q − zx)(q − zw) out once more: two of the four terms have a minus.": (
                "- x_zero * w.sum(1) - w_zero", "+ x_zero * w.sum(1) + w_zero"
            ),
            "The term of x_zero is subtracted.": ("- x_zero", "+ x_zero"),
            "The term of w_zero is subtracted.": ("- w_zero", "+ w_zero"),
            "The third term is missing: w_zero times the sum of each token's codes.": (
                " - w_zero * x.sum(1, keepdim=True) + features * x_zero * w_zero", ""
            ),
            "The second term is missing: x_zero times the sum of each row of w_codes.": (
                " - x_zero * w.sum(1)", "", " + features * x_zero * w_zero", ""
            ),
            "The fourth term is missing: K·zx·zw was subtracted twice.": (" + features * x_zero * w_zero", ""),
            "The fourth term is added: minus times minus.": ("+ features", "- features"),
            "zx·zw is added once for each of the K inputs.": ("features * x_zero", "x_zero"),
            "The zero points are swapped: the sum over x_codes meets w_zero.": (
                "- x_zero * w.sum(1) - w_zero *", "- w_zero * w.sum(1) - x_zero *"
            ),
            "That is the sum of the rows of w for every token, and of x for every row: shapes (rows,), (tokens, 1).": (
                "x.sum(1, keepdim=True)", "x.sum()"
            ),
            "Rows are tokens, columns are rows of w_codes: yours is turned.": (
                "x @ w.T - x_zero * w.sum(1) - w_zero * x.sum(1, keepdim=True)",
                "w @ x.T - x_zero * w.sum(1, keepdim=True) - w_zero * x.sum(1)",
            ),
        },
    ),
    "7.2": Exercise(
        "how many terms fit",
        hints=(
            "What is the product of largest size? Take the code that is farthest from 0 on each side.",
            "Unsigned b bits end at 2**b − 1; signed b bits begin at −2**(b−1), which is farther out than their end.",
            "The accumulator begins at −2**(bits − 1); divide it by the largest product, and round down.",
        ),
        solution=largest_k_solution,
        cases=_largest_k_cases,
        edges=_largest_k_edges,
        slips={
            "More would fit: unsigned codes of b bits end at 2**b − 1, not at 2**b.": ("(2**x_bits - 1)", "2**x_bits"),
            "More would fit: the largest unsigned code is 2**b − 1, one less than 2**b.": (
                "(2**x_bits - 1)", "2**x_bits", "2 ** (accumulator_bits - 1) //", "(2 ** (accumulator_bits - 1) - 1) //"
            ),
            "Too many: the accumulator has a sign, and one bit is the sign.": (
                "(accumulator_bits - 1)", "accumulator_bits"
            ),
            "Too many: signed codes begin at −2**(b−1), which is farther from 0 than the last one.": (
                "2 ** (w_bits - 1)\n", "(2 ** (w_bits - 1) - 1)\n"
            ),
            "More would fit: signed codes of b bits are at most 2**(b−1) in size.": (
                "2 ** (w_bits - 1)\n", "2**w_bits\n"
            ),
            "More would fit: the weights' codes have a sign, and are not as large as unsigned ones.": (
                "2 ** (w_bits - 1)\n", "(2**w_bits - 1)\n"
            ),
            "Too many: the codes of x are unsigned, up to 2**b − 1.": ("(2**x_bits - 1)", "2 ** (x_bits - 1)"),
            "K counts terms: round down to a whole number.": ("// largest", "/ largest"),
            "K counts terms, and one more would not fit: round down.": ("2 ** (accumulator_bits - 1) // largest",
                "round(2 ** (accumulator_bits - 1) / largest)"),
            "K products do not have K times as many bits: count in numbers, not in bits.": (
                "2 ** (accumulator_bits - 1) // largest", "accumulator_bits // (x_bits + w_bits)"
            ),
        },
    ),
    "7.3": Exercise(
        "a dot product that saturates",
        hints=(
            "Three steps: the products, in a wide type; the sum of each two neighbours, clamped; the sum of those.",
            "view(-1, 2).sum(1) adds neighbours; clamp holds them to what an int16 can be.",
            "An int16 lies in −32768 … 32767. The last sum has 32 bits and is not clamped.",
        ),
        solution=saturating_solution,
        cases=_saturating_cases,
        edges=_saturating_edges,
        slips={
            "A sum that does not fit in 16 bits with a sign came back all the same: clamp each pair.": (
                ".clamp(-(2**15), 2**15 - 1)", ""
            ),
            "Converting to int16 wraps around: clamp before you convert.": (
                ".clamp(-(2**15), 2**15 - 1)", ".to(torch.int16)"
            ),
            "Only the pairs are added in 16 bits; what is added from them has 32, and is not clamped.": (
                "pairs.clamp(-(2**15), 2**15 - 1).sum()", "pairs.sum().clamp(-(2**15), 2**15 - 1)"
            ),
            "The pairs are right, and their sum in 32 bits is not clamped again.": (
                "2**15 - 1).sum()", "2**15 - 1).sum().clamp(-(2**15), 2**15 - 1)"
            ),
            "A pair is elements 0 and 1, 2 and 3, and so on: neighbours.": ("view(-1, 2).sum(1)", "view(2, -1).sum(0)"),
            "The largest int16 is 2**15 − 1 = 32767.": ("2**15 - 1)", "2**15)"),
            "The smallest int16 is −2**15 = −32768.": ("-(2**15),", "-(2**15) + 1,"),
            "Small sums saturate at both ends: below as well.": ("clamp(-(2**15), 2**15 - 1)", "clamp(max=2**15 - 1)"),
            "Large sums saturate at both ends: above as well.": ("clamp(-(2**15), 2**15 - 1)", "clamp(min=-(2**15))"),
            "A product of two codes does not fit in 8 bits: widen both first.": lambda x_codes, w_codes: (
                (x_codes * w_codes.to(torch.uint8)).view(-1, 2).int().sum().item()
            ),
        },
    ),
    "7.4": Exercise(
        "bytes and operations",
        hints=(
            "Count first: how many weights, inputs, outputs, multiplications?",
            "Weights are read once for all tokens. Each meets each token once: a multiplication and an addition.",
            "bytes = K·N·weight_bytes + 4·M·K + 4·M·N, operations = 2·M·K·N; divide each by its rate.",
        ),
        solution=roofline_solution,
        cases=_roofline_cases,
        edges=_roofline_edges,
        tolerance=7e-4,  # K - 1 additions for K of 1000 and more
        slips={
            "A multiplication and an addition for each weight and token: two operations.": ("2 * M * K", "M * K"),
            "Inputs (M, K) and outputs (M, N) are moved, too.": (" + 4 * (M * K + M * N)", ""),
            "The inputs (M, K) are moved, too.": ("M * K + M * N)", "M * N)"),
            "The outputs (M, N) are moved, too.": ("M * K + M * N)", "M * K)"),
            "All tokens share one reading of the weights.": ("K * N * weight_bytes", "M * K * N * weight_bytes"),
            "Inputs and outputs are float32 whatever the weights are: 4 bytes each.": (
                "4 * (M * K + M * N)", "weight_bytes * (M * K + M * N)"
            ),
            "Inputs and outputs have bytes as well: 4 each.": ("4 * (M * K + M * N)", "(M * K + M * N)"),
            "Every weight meets every one of the M tokens.": ("2 * M * K", "2 * K"),
            "Two times, to move and to compute; not the larger of them.": (
                "moved / bandwidth, 2 * M * K * N / rate", "max(moved / bandwidth, 2 * M * K * N / rate)"
            ),
            "The order is moving, computing.": (
                "moved / bandwidth, 2 * M * K * N / rate", "2 * M * K * N / rate, moved / bandwidth"
            ),
            "The weights have weight_bytes each.": ("K * N * weight_bytes", "K * N * 4"),
            "Seconds are bytes over bytes a second, operations over operations a second.": (
                "moved / bandwidth, 2 * M * K * N / rate", "bandwidth / moved, rate / (2 * M * K * N)"
            ),
        },
    ),
    "7.5": Exercise(
        "a scale for each token",
        hints=(
            "The kernel makes whole numbers only. What may be multiplied onto its sums afterwards?",
            "One scale a token, (tokens, 1): its largest |x| over 127. Symmetric, so that one zero point serves all.",
            "codes = round(x / x_scale) + 128; the result is the kernel's sums times x_scale times w_scale.",
        ),
        solution=per_token_solution,
        cases=_per_token_cases,
        use=_with_kernel,
        rule=_per_token_rule,
    ),
}  # fmt: skip
