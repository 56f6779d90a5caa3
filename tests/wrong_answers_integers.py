"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch


def four_terms(x, zx, w, zw, signs=(1, -1, -1, 1), wide=torch.long):
    x, w = x.to(wide), w.to(wide)
    terms = x @ w.T, zx * w.sum(1), zw * x.sum(1, keepdim=True), x.shape[1] * zx * zw
    return sum(sign * term for sign, term in zip(signs, terms, strict=True))


def in_eight_bits(x, zx, w, zw):
    return (x.to(torch.int8) - zx) @ (w - zw).T


def in_pairs(x, w, clamp=True, stride=1, end=32767):
    p = (x.int() * w.int()).view(2, -1).T if stride > 1 else (x.int() * w.int()).view(-1, 2)
    return p.sum(1).clamp(-end - 1, end).sum().item() if clamp else p.sum(1).to(torch.int16).sum().item()


def scaled(x, w_codes, w_scale, kernel, x_scale, zero=128, by_rows=True):
    sums = kernel((x / x_scale).round().clamp(-128, 127).int() + zero, zero, w_codes)
    return sums * x_scale * (w_scale if by_rows else 1)


def one_token_at_a_time(x, w_codes, w_scale, kernel):
    return torch.cat([scaled(row[None], w_codes, w_scale, kernel, row.abs().max() / 127) for row in x])


def per_token_zero_points(x, w_codes, w_scale, kernel):
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-low / scale).round().int()
    return kernel(((x / scale).round() + zero).clamp(0, 255).int(), zero, w_codes) * scale * w_scale


def moving(M, K, N, b, bandwidth):
    return (K * N * b + 4 * (M * K + M * N)) / bandwidth


def without_abs(x, w_codes, w_scale, kernel):
    scale = x.amax(1, keepdim=True) / 127
    codes = (x / scale).round().clamp(-128, 127).int()
    return kernel(codes, 0, w_codes) * scale * w_scale


def rounded_down(x, w_codes, w_scale, kernel):
    scale = x.abs().amax(1, keepdim=True) / 127
    return kernel((x / scale).floor().int() + 128, 128, w_codes) * scale * w_scale


WRONG = {
    "7.1": [
        (lambda x, zx, w, zw: x @ w.T, "RuntimeError"),
        (in_eight_bits, "was expected"),
        (lambda x, zx, w, zw: (x.to(torch.int8) - zx) @ (w - zw).T, "was expected"),
        (lambda x, zx, w, zw: (x.short() - zx) @ (w.short() - zw).T, "16 bits are not wide enough"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw, wide=torch.float32), "up to 2**24"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw, (1, 0, 0, 0)), "stand for real 0"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw, (1, 1, 1, 1)), "two of the four terms have a minus"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw, (1, -1, 0, 0)), "third term is missing"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw, (1, -1, -1, 0)), "K·zx·zw"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw, (1, -1, -1, -1)), "minus times minus"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw) - (x.shape[1] - 1) * zx * zw, "once for each of the K"),
        (lambda x, zx, w, zw: four_terms(x, zx, w, zw).T, "shape (3, 5)"),
        (lambda x, zx, w, zw: four_terms(w, zw, x, zx), "shape (3, 5)"),
        (lambda x, zx, w, zw: (x.int() - zx) @ (w - zw).int().T, "was expected"),  # w − zw in int8
    ],
    "7.2": [
        (lambda x, w, a: (2 ** (a - 1) - 1) // (2**x * 2 ** (w - 1)), "More would fit"),
        (lambda x, w, a: 2**a // ((2**x - 1) * 2 ** (w - 1)), "one bit is the sign"),
        (lambda x, w, a: (2 ** (a - 1) - 1) // ((2**x - 1) * (2 ** (w - 1) - 1)), "farther from 0"),
        (lambda x, w, a: (2 ** (a - 1) - 1) / ((2**x - 1) * 2 ** (w - 1)), "whole number"),
        (lambda x, w, a: (2 ** (a - 1) - 1) // (2**x - 1) ** 2, "was expected"),
        (lambda x, w, a: a // (x + w), "count in numbers, not in bits"),
    ],
    "7.3": [
        (lambda x, w: (x.int() * w.int()).sum().item(), "came back all the same"),
        (lambda x, w: (x.int() * w.int()).clamp(-32768, 32767).sum().item(), "was expected"),
        (lambda x, w: in_pairs(x, w, clamp=False), "wraps around"),
        (lambda x, w: (x.int() * w.int()).sum().clamp(-32768, 32767).item(), "Only the pairs"),
        (lambda x, w: in_pairs(x, w, stride=2), "neighbours"),
        (lambda x, w: in_pairs(x, w, end=32768), "was expected"),
        (lambda x, w: (x * w.to(torch.uint8)).view(-1, 2).int().sum().item(), "widen both first"),
    ],
    "7.4": [
        (lambda M, K, N, b, bw, r: (moving(M, K, N, b, bw), M * K * N / r), "A multiplication and an addition"),
        (lambda M, K, N, b, bw, r: (K * N * b / bw, 2 * M * K * N / r), "are moved, too"),
        (lambda M, K, N, b, bw, r: (M * moving(1, K, N, b, bw), 2 * M * K * N / r), "share one reading"),
        (lambda M, K, N, b, bw, r: max(moving(M, K, N, b, bw), 2 * M * K * N / r), "Two times"),
        (lambda M, K, N, b, bw, r: ((K * N + M * K + M * N) * b / bw, 2 * M * K * N / r), "are float32"),
        (lambda M, K, N, b, bw, r: (moving(M, K, N, b, bw), 2 * K * N / r), "every one of the M tokens"),
        (lambda M, K, N, b, bw, r: (2 * M * K * N / r, moving(M, K, N, b, bw)), "The order is"),
    ],
    "7.5": [
        (lambda x, w, s, kernel: x @ (s[:, None] * w.float()).T, "never called"),
        (one_token_at_a_time, "6 times"),
        (per_token_zero_points, "one zero point for all tokens"),
        (lambda x, w, s, kernel: scaled(x, w, s, kernel, x.abs().max() / 127), "others lost"),
        (
            lambda x, w, s, kernel: scaled(x, w, s, kernel, x.abs().amax(1, keepdim=True) / 127, by_rows=False),
            "both scales",
        ),
        (lambda x, w, s, kernel: kernel(x.round().int(), 0, w) * s, "others lost"),
        (lambda x, w, s, kernel: scaled(x, w, s, kernel, x.abs().amax(1, keepdim=True) / 15), "0.0075 for each"),
        (lambda x, w, s, kernel: scaled(x, w, s, kernel, x.abs().amax(1, keepdim=True) / 63), "0.0075 for each"),
        (
            lambda x, w, s, kernel: scaled(x, w, s, kernel, x.abs().amax(1, keepdim=True) / 127)[0],
            "shape (tokens, rows)",
        ),
        (without_abs, "may be negative"),
        (rounded_down, "rounded to nearest"),
    ],
}
