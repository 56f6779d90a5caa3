"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.exercises import dynamic_static


def codes_of(x, scale, zero_point):
    return torch.clamp(torch.round(x / scale) + zero_point, 0, 255)


def dynamic(x, w, s):
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = max(high - low, 1e-30) / 255
    return dynamic_static.static_solution(x, w, s, scale, round(-low / scale))


def in_int8(x, w, s, scale, zero_point):
    codes = (codes_of(x, scale, zero_point) - zero_point).to(torch.int8)
    return (codes @ w.T).float() * scale * s


def per_token(x, w, s, *, levels=127, dim=1, keep=True, smallest=1e-30, round=torch.round, scales=True):
    scale = (x.abs().amax(dim, keepdim=keep) / levels).clamp(min=smallest)
    sums = round(x / scale) @ w.float().T
    return sums * scale * s if scales else sums * s


def without_abs(x, w, s):
    scale = x.amax(1, keepdim=True) / 127
    return torch.round(x / scale.clamp(min=1e-30)) @ w.float().T * scale * s


def remembered():
    """Fixes its scales at the first call."""
    kept = []

    def layer(x, w, s):
        kept.append((x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30))
        return torch.round(x / kept[0]).clamp(-127, 127) @ w.float().T * kept[0] * s

    return layer


def counted(**wrong):
    """The formula with one term changed."""

    def count(M, K, N, way):
        right = dynamic_static.bytes_solution(M, K, N, way)
        return right + (wrong[way](M, K, N) if way in wrong else 0)

    return count


def alarm(*, grace=0.5, both=True, wide_first=False, zero=True, middle=False):
    def f(x, scale, zero_point, limit):
        zero_point = 128 if middle else zero_point
        low, high = -scale * zero_point, scale * (255 - zero_point)
        outside = x > high + grace * scale
        if both:
            outside = outside | (x < low - grace * scale)
        narrow = outside.float().mean() > limit
        top, bottom = x.quantile(0.95).item() if wide_first else x.max().item(), x.min().item()
        used = max(top, 0) - min(bottom, 0) if zero else top - bottom
        if wide_first and used < (high - low) / 2:
            return "wide"
        return "narrow" if narrow else "wide" if used < (high - low) / 2 else "fine"

    return f


def any_clipped(x, scale, zero_point, limit):
    high, low = scale * (255.5 - zero_point), -scale * (zero_point + 0.5)
    return "narrow" if x.max() > high or x.min() < low else dynamic_static.alarm_solution(x, scale, zero_point, limit)


WRONG = {
    "8.1": [
        (lambda x, w, s, a, z: (torch.round(x / a)) @ w.float().T * a * s, "must be cut"),
        (
            lambda x, w, s, a, z: ((torch.round(x / a) + z).long().to(torch.uint8).float() - z) @ w.float().T * a * s,
            "cast to uint8 before",
        ),
        (lambda x, w, s, a, z: codes_of(x, a, z) @ w.float().T * a * s, "subtracted from the codes again"),
        (lambda x, w, s, a, z: (codes_of(x, a, z) - z) @ w.float().T * a, "w_scale"),
        (lambda x, w, s, a, z: (codes_of(x, a, z) - z) @ w.float().T * s, "multiply by its scale"),
        (lambda x, w, s, a, z: (codes_of(x, a, z) - z) @ w.float().T, "integer sums"),
        (lambda x, w, s, a, z: dynamic(x, w, s), "was expected"),
        (lambda x, w, s, a, z: x @ w.float().T * s, "weight-only layer"),
        (
            lambda x, w, s, a, z: (torch.floor(x / a) + z).clamp(0, 255).sub(z) @ w.float().T * a * s,
            "floor is not round",
        ),
        (in_int8, "widen the codes first"),
        (lambda x, w, s, a, z: dynamic_static.static_solution(x, w, s, a, z).T, "was expected"),
        (lambda x, w, s, a, z: dynamic_static.static_solution(x, w, s, a, z) + 1e-6, "was expected"),
        (lambda x, w, s, a, z: dynamic_static.static_solution(x, w, s, 0.02, 100), "was expected"),
    ],
    "8.2": [
        (dynamic, "was expected"),
        (lambda x, w, s: per_token(x, w, s, dim=0), "size of tensor"),
        (lambda x, w, s: dynamic_static.static_solution(x, w, s, 0.02, 100), "was expected"),
        (remembered(), "size of tensor"),
        (lambda x, w, s: per_token(x, w, s, scales=False), "multiply by its scale"),
        (lambda x, w, s: per_token(x, w, torch.ones(len(s))), "w_scale"),
        (lambda x, w, s: per_token(x, w, s, levels=7), "8 were meant"),
        (lambda x, w, s: per_token(x, w, s, levels=128), "128 does not exist"),
        (lambda x, w, s: per_token(x, w, s, levels=255), "9 bits"),
        (lambda x, w, s: x @ w.float().T * s, "weight-only layer"),
        (lambda x, w, s: per_token(x, w, s, round=lambda t: t), "weight-only layer"),
        (lambda x, w, s: per_token(x, w, s, round=torch.floor), "floor is not round"),
        (lambda x, w, s: per_token(x, w, s, round=torch.trunc), "towards 0"),
        (lambda x, w, s: per_token(x, w, s, smallest=0.0), "0/0"),
        (lambda x, w, s: per_token(x, w, s, keep=False), "size of tensor"),
        (without_abs, "may be negative"),
    ],
    "8.3": [
        (counted(tensor=lambda M, K, N: -4 * M * K, token=lambda M, K, N: -4 * M * K), "twice: once for its range"),
        (counted(static=lambda M, K, N: 4 * M * K), "reads the float input once"),
        (counted(static=lambda M, K, N: -4 * N), "was expected"),
        (counted(static=lambda M, K, N: -M * K), "was expected"),
        (counted(tensor=lambda M, K, N: -16), "was expected"),
        (counted(token=lambda M, K, N: 8 * M), "no zero point"),
        (counted(token=lambda M, K, N: -4 * M), "written once and read once"),
        (counted(static=lambda M, K, N: 8), "only read"),
        (lambda M, K, N, way: dynamic_static.bytes_solution(M, K, N, "static"), "The ways differ"),
        (lambda M, K, N, way: dynamic_static.bytes_solution(M, N, K, way), "stands for each of the out rows"),
        (lambda M, K, N, way: dynamic_static.bytes_solution(M, K, N, way) / 7, "whole number"),
    ],
    "8.4": [
        (any_clipped, "One value outside is enough"),
        (alarm(both=False), "a lowest value as well"),
        (alarm(grace=0.0), "rounded back onto it"),
        (alarm(grace=1.0), "not a whole one"),
        (alarm(zero=False), "hold 0 as well"),
        (alarm(wide_first=True), "was expected"),
        (alarm(middle=True), "use zero_point"),
        (lambda x, s, z, limit: bool(x.max() > s * (255 - z)), "was expected"),
        (lambda x, s, z, limit: "fine", "It never rings"),
        (lambda x, s, z, limit: dynamic_static.alarm_solution(x, s, z, 0.001), "was expected"),
    ],
    "8.5": [
        (lambda stories, chinese, count: stories[:count], "Chinese misses it"),
        (lambda stories, chinese, count: chinese[:count], "stories misses it"),
        (lambda stories, chinese, count: torch.cat([stories, chinese]), "At most 200"),
        (lambda stories, chinese, count: torch.cat([stories[:256], chinese[:256]]), "At most 200"),
        (lambda stories, chinese, count: torch.rand(count), "one row of token ids"),
        (lambda stories, chinese, count: torch.cat([stories[:2], chinese[: count - 2]]), "stories misses it"),
    ],
}
