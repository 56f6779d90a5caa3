"""Exercises of chapter 7: integer arithmetic for real."""

import torch

from quantlab.checks import Exercise, expect
from quantlab.linear import int_linear


def int_product_solution(x_codes, x_zero, w_codes, w_zero):
    """Four terms, in integers wide enough to hold them; the first alone is a product of matrices."""
    x, w = x_codes.long(), w_codes.long()
    features = x.shape[1]
    return x @ w.T - x_zero * w.sum(1) - w_zero * x.sum(1, keepdim=True) + features * x_zero * w_zero


def _codes(tokens, features, outputs, seed=0):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (tokens, features), generator=random, dtype=torch.uint8)
    return x, torch.randint(-128, 128, (outputs, features), generator=random, dtype=torch.int8)


def _test_int_product(f):
    x, w = _codes(3, 4, 5)
    sums = f(x.clone(), 0, w.clone(), 0)
    expect(torch.is_tensor(sums), f"Return a tensor of sums; got {type(sums).__name__}.")
    expect(
        sums.shape == (3, 5), f"3 tokens and 5 rows of weights make a sum each: shape (3, 5), not {tuple(sums.shape)}."
    )
    _expect_wide_sums(f)
    expect(
        sums.tolist() == int_linear(x, 0, w).tolist(),
        "With both zero points 0 only the first term is left, x_codes times the transpose of w_codes; yours differs.",
    )
    _expect_real_zeros(f, x, w)
    got, right = f(x.clone(), 100, w.clone(), -7), int_linear(x, 100, w, -7)
    expect(
        got.tolist() == right.tolist(),
        f"With both zero points set your sums are off by {(got - right)[0, 0].item()}, the same everywhere or nearly; "
        f"K·zx·zw is {4 * 100 * -7}. What is its sign, and how often is it added?",
    )


def _expect_wide_sums(f):
    """A sum beyond 8 and 16 bits, and beyond the whole numbers that float32 holds."""
    terms = 2048
    x, w = torch.full((1, terms), 255, dtype=torch.uint8), torch.full((1, terms), 127, dtype=torch.int8)
    x[0, 0] = 254
    got, right = f(x, 0, w, 0).item(), 255 * 127 * terms - 127
    lost = abs(right - got)
    expect(
        got == right,
        f"{terms} products of up to 255·127 add up to {right}; got {got:.0f}, off by {lost:.0f}. "
        + ("float32 holds whole numbers only up to 2**24." if lost < 1000 else "Are your numbers wide enough?"),
    )


def _expect_real_zeros(f, x, w):
    """Codes equal to their zero point make every sum 0."""
    sums = f(torch.full((2, 4), 100, dtype=torch.uint8), 100, w.clone(), 0)
    expect(
        not sums.any(),
        f"x_codes equal to x_zero stand for real 0, so every sum must be 0; got "
        f"{sums[0].tolist()}. Sum which codes, over which dimension?",
    )
    sums = f(x.clone(), 0, torch.full((5, 4), -7, dtype=torch.int8), -7)
    expect(
        not sums.any(),
        f"w_codes equal to w_zero stand for real 0, so every sum must be 0; got "
        f"{sums[:, 0].tolist()} for three tokens. Sum which codes, over which dimension?",
    )


def largest_k_solution(x_bits, w_bits, accumulator_bits):
    """The largest product is (2**x_bits - 1) * 2**(w_bits - 1); one bit of the accumulator is the sign."""
    largest = (2**x_bits - 1) * 2 ** (w_bits - 1)
    return (2 ** (accumulator_bits - 1) - 1) // largest


def _test_largest_k(f):
    for x_bits, w_bits, bits in ((8, 8, 32), (8, 8, 16), (7, 8, 16), (4, 4, 16), (8, 4, 24)):
        found, right = f(x_bits, w_bits, bits), largest_k_solution(x_bits, w_bits, bits)
        expect(float(found).is_integer(), f"K counts terms: a whole number; got {found!r}. One more would not fit.")
        what = f"x of {x_bits} bits, weights of {w_bits} bits, an accumulator of {bits}"
        largest, limit = (2**x_bits - 1) * 2 ** (w_bits - 1), 2 ** (bits - 1)
        expect(
            found <= right,
            f"{what}: {found:.0f} terms can reach {found * largest:.0f}, and the accumulator ends at ±{limit}. "
            "Which code is the largest in size on each side? And one bit is the sign.",
        )
        expect(
            found == right,
            f"{what}: {found:.0f} terms fit, and more would: with one more the sum reaches at most "
            f"{(found + 1) * largest:.0f}, inside ±{limit}. "
            "Unsigned codes of b bits end at 2**b − 1, signed ones begin at −2**(b−1).",
        )


def saturating_solution(x_codes, w_codes):
    """Neighbours are added in 16 bits, which stop at their ends; the pairs then go into 32 bits."""
    products = x_codes.int() * w_codes.int()
    pairs = products.view(-1, 2).sum(1)
    return pairs.clamp(-(2**15), 2**15 - 1).sum().item()


def _test_saturating(f):
    def dot(x, w):
        return float(f(torch.tensor(x, dtype=torch.uint8), torch.tensor(w, dtype=torch.int8)))

    small = dot([1, 2, 3, 4], [5, -6, 7, 8])
    expect(
        small == 46,
        f"1·5 − 2·6 + 3·7 + 4·8 = 46, and nothing saturates; got {small:g}. "
        "Is a product of two codes computed in 8 bits?",
    )
    _expect_ends_of_int16(dot)
    four = dot([255] * 4, [127] * 4)
    expect(
        four == 2 * 32767,
        f"Four products are two pairs: each stops at 32767, and their sum, in 32 bits, is 65534; got {four:g}. "
        "What is added in 16 bits, and what in 32?",
    )
    neighbours = dot([255, 0, 255, 0], [127] * 4)
    expect(
        neighbours == 2 * 255 * 127,
        f"Codes 255, 0, 255, 0: no pair of neighbours saturates, the sum is 64770; got {neighbours:g}. "
        "A pair is elements 0 and 1, 2 and 3, and so on.",
    )
    x, w = _codes(1, 4096, 1, seed=3)
    got, right = float(f(x[0], w[0])), saturating_solution(x[0], w[0])
    expect(got == right, f"4096 random codes: the sum should be {right}, got {got:g}.")


def _expect_ends_of_int16(dot):
    high = dot([255, 255], [127, 127])
    expect(
        high != 64770, "255·127 + 255·127 = 64770 does not fit in 16 bits with a sign; you returned it all the same."
    )
    expect(
        high == 32767,
        f"255·127 + 255·127 should stop at the largest int16; got {high:g}. "
        + ("That is what wraps around: clamp before you convert." if high == 64770 - 65536 else "Which number is it?"),
    )
    low = dot([255, 255], [-128, -128])
    expect(low == -32768, f"255·(−128) twice should stop at the smallest int16, −32768; got {low:g}.")


def roofline_solution(M, K, N, weight_bytes, bandwidth, rate):
    """Everything is moved once, in float32 but the weights; a multiplication and an addition a weight and token."""
    moved = K * N * weight_bytes + 4 * (M * K + M * N)
    return moved / bandwidth, 2 * M * K * N / rate


def _test_roofline(f):
    both = f(1, 1000, 1000, 4, 1e9, 1e9)
    expect(isinstance(both, tuple | list) and len(both) == 2, f"Return two numbers of seconds; got {both!r}.")
    moving, computing = both
    expect(
        abs(computing - 2e-3) < 1e-5,
        f"1000·1000 weights and one token at 1e9 operations a second take 0.002 s; got {computing:.3g}. "
        "A multiplication and an addition for each.",
    )
    expect(
        abs(moving - 4.008e-3) < 1e-6,
        f"1000·1000 weights of 4 bytes, 1000 inputs, 1000 outputs at 1e9 bytes a second: 0.004008 s; got {moving:.4g}.",
    )
    moving, computing = f(100, 1000, 500, 1, 2e9, 4e9)
    expect(
        abs(computing - 2 * 100 * 1000 * 500 / 4e9) < 1e-6,
        f"M = 100, K = 1000, N = 500 at 4e9 operations a second: 0.025 s; got {computing:.3g}.",
    )
    right = (500_000 + 4 * 100 * 1500) / 2e9
    expect(
        abs(moving - right) < 1e-7,
        f"M = 100, K = 1000, N = 500, weights of 1 byte at 2e9 bytes a second: {right:.4g} s; got {moving:.4g}. "
        "All tokens share one reading of the weights; inputs (M, K) and outputs (M, N) are float32.",
    )
    return "At M = 1 the weights are nearly all that moves."


def per_token_solution(x, w_codes, w_scale, kernel):
    """The kernel makes whole numbers; the scales of rows and tokens both factor out of its sums."""
    x_scale = x.abs().amax(1, keepdim=True) / 127
    codes = (x / x_scale).round().int() + 128
    return kernel(codes, 128, w_codes) * x_scale * w_scale


def _test_per_token(f):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 64, generator=random) * torch.tensor([1e-3, 1.0, 100.0, 0.1, 3.0, 1e3])[:, None]
    w_codes = torch.randint(-127, 128, (8, 64), generator=random, dtype=torch.int8)
    w_scale = torch.rand(8, generator=random) * 0.01 + 0.001
    calls = []
    kernel = _counted(calls)
    y = f(x.clone(), w_codes.clone(), w_scale.clone(), kernel)
    expect(calls != [], "The kernel was never called: the product must be one of integers.")
    expect(torch.is_tensor(y) and y.shape == (6, 8), "Return the outputs, a tensor of shape (tokens, rows).")
    expect(len(calls) == 1, f"The kernel was called {len(calls)} times; one call can do all tokens.")
    right = x @ (w_scale[:, None] * w_codes.float()).T
    errors = ((y - right).norm(dim=1) / right.norm(dim=1)).tolist()
    worst = max(errors)
    shown = ", ".join(f"{e:.2g}" for e in errors)
    expect(
        max(errors[2], errors[5]) < 0.5,
        f"Even the tokens with the largest numbers are wrong: relative errors {shown}. "
        "Are both scales in the result, and the codes in 0..255 with their zero point?",
    )
    expect(
        worst < 0.5,
        f"The large tokens are right, the small ones lost: relative errors {shown}. One scale for all tokens is the "
        "largest token's.",
    )
    expect(
        worst <= 0.03, f"Relative errors of the tokens {shown}; 0.03 for each can be reached. Is the grid used fully?"
    )
    return f"Largest relative error of a token {worst:.3f}."


def _counted(calls):
    """int_linear that notes each call and takes 8-bit codes alone, as a kernel does."""

    def kernel(x_codes, x_zero, w_codes):
        calls.append(x_codes)
        low, high = x_codes.min().item(), x_codes.max().item()
        expect(
            (0 <= low and high <= 255) or (-128 <= low and high <= 127),
            f"The kernel takes x_codes of 8 bits, 0..255 or −128..127; got {low:g}..{high:g}.",
        )
        expect(
            torch.as_tensor(x_zero).numel() == 1,
            "The kernel knows one zero point for all tokens, and got several. Symmetric codes have one everywhere.",
        )
        return int_linear(x_codes, x_zero, w_codes)

    return kernel


EXERCISES = {
    "7.1": Exercise(
        "the integer product",
        _test_int_product,
        (
            "Begin by making both codes wider: products of 8-bit codes do not fit into 8 bits, and sums need 32.",
            "x.sum(1, keepdim=True) has a row for each token, w.sum(1) an entry for each row of weights.",
            "x @ w.T − zx·(sum of each row of w) − zw·(sum of each row of x) + K·zx·zw, with K = x.shape[1].",
        ),
        int_product_solution,
    ),
    "7.2": Exercise(
        "how many terms fit",
        _test_largest_k,
        (
            "What is the product of largest size? Take the code that is farthest from 0 on each side.",
            "Unsigned b bits end at 2**b − 1; signed b bits begin at −2**(b−1), which is farther out than their end.",
            "The accumulator ends at 2**(bits − 1) − 1; divide it by the largest product, and round down.",
        ),
        largest_k_solution,
    ),
    "7.3": Exercise(
        "a dot product that saturates",
        _test_saturating,
        (
            "Three steps: the products, in a wide type; the sum of each two neighbours, clamped; the sum of those.",
            "view(-1, 2).sum(1) adds neighbours; clamp holds them to what an int16 can be.",
            "An int16 lies in −32768 … 32767. The last sum has 32 bits and is not clamped.",
        ),
        saturating_solution,
    ),
    "7.4": Exercise(
        "bytes and operations",
        _test_roofline,
        (
            "Count first: how many weights, inputs, outputs, multiplications?",
            "Weights are read once for all tokens. Each meets each token once: a multiplication and an addition.",
            "bytes = K·N·weight_bytes + 4·M·K + 4·M·N, operations = 2·M·K·N; divide each by its rate.",
        ),
        roofline_solution,
    ),
    "7.5": Exercise(
        "a scale for each token",
        _test_per_token,
        (
            "The kernel makes whole numbers only. What may be multiplied onto its sums afterwards?",
            "One scale a token, (tokens, 1): its largest |x| over 127. Symmetric, so that one zero point serves all.",
            "codes = round(x / x_scale) + 128; the result is the kernel's sums times x_scale times w_scale.",
        ),
        per_token_solution,
    ),
}
