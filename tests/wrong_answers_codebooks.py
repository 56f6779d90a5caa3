"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.codebook import kmeans_levels, nearest_level, nf4_levels, normalize_blocks
from quantlab.exercises.codebooks import lloyd_solution
from quantlab.exercises.material import student_t

quantile = torch.distributions.Normal(0, 1).icdf
DELTA = 1 - (1 / 30 + 1 / 32) / 2


def look_up(x, levels, block_size, borders=None, absmax=None):
    blocks = x.view(-1, block_size)
    absmax = blocks.abs().amax(1) if absmax is None else absmax(blocks)
    borders = (levels[:-1] + levels[1:]) / 2 if borders is None else borders(levels)
    return torch.bucketize(blocks / absmax[:, None], borders), absmax


def signed_extreme(x, levels, block_size):
    blocks = x.view(-1, block_size)
    absmax = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
    return torch.bucketize(blocks / absmax[:, None], (levels[:-1] + levels[1:]) / 2), absmax


def values_for_codes(x, levels, block_size):
    codes, absmax = look_up(x, levels, block_size)
    return levels[codes], absmax


def not_divided(x, levels, block_size):
    blocks = x.view(-1, block_size)
    return torch.bucketize(blocks, (levels[:-1] + levels[1:]) / 2), blocks.abs().amax(1)


def nf4(positive=9, negative=8, delta=DELTA, zero=True, divide=True):
    up, down = (quantile(torch.linspace(delta, 0.5, n))[:-1] for n in (positive, negative))
    levels = torch.cat([-down, torch.zeros(int(zero)), up.flip(0)])
    return levels / levels.max() if divide else levels


def both_middles():
    up, down = (quantile(torch.linspace(DELTA, 0.5, n)) for n in (8, 8))
    levels = torch.cat([-down, up.flip(0)])
    return levels / levels.max()


def equation_four():
    q = quantile(torch.arange(18) / 17)
    levels = (q[:-1] + q[1:]) / 2
    return levels[:16] / levels[:16].abs().max()


def with_nan(codes):
    shares = codes.flatten().int().bincount(minlength=16) / codes.numel()
    return -(shares * shares.log2()).sum().item()


def entropy(codes, log=torch.log2):
    shares = codes.flatten().int().bincount() / codes.numel()
    shares = shares[shares > 0]
    return -(shares * log(shares)).sum().item()


def lloyd(values, levels, middle=torch.mean, steps=1, empty=None):
    for _ in range(steps):
        codes = nearest_level(values, levels)
        own = [values[codes == k] for k in range(len(levels))]
        levels = torch.stack([middle(v) if empty is None or len(v) else torch.tensor(empty) for v in own])
    return levels


def normal_values():
    return torch.randn(128_000, generator=torch.Generator().manual_seed(2))


def scaled(x):
    return normalize_blocks(x, block_size=32)


def weighted(power, steps=40):
    values, absmax = scaled(student_t(3, 128_000, seed=1))
    weights, levels = absmax.repeat_interleave(32) ** power, nf4_levels()
    for _ in range(steps):
        codes = nearest_level(values, levels).long()
        sums = torch.zeros(16).index_add(0, codes, values * weights)
        levels = sums / torch.zeros(16).index_add(0, codes, weights)
    return levels


def as_it_was(values, levels):
    return levels


def many_steps(values, levels):
    for _ in range(50):
        levels = lloyd_solution(values, levels)
    return levels


def middle_of_extremes(values):
    return (values.amin() + values.amax()) / 2


WRONG = {
    "4.1": [
        (lambda x, levels, size: look_up(x, levels, size, absmax=lambda b: b.amax(1)), "the sign does not count"),
        (signed_extreme, "absmax is positive"),
        (lambda x, levels, size: look_up(x, levels, len(x)), "a row of x.view"),
        (lambda x, levels, size: look_up(x, levels, size, borders=lambda v: v), "half way"),
        (lambda x, levels, size: look_up(x, levels, size, borders=lambda v: v[1:]), "half way"),
        (lambda x, levels, size: look_up(x, levels, size, borders=lambda v: v[:-1]), "half way"),
        (not_divided, "divide by absmax first"),
        (lambda x, levels, size: (torch.bucketize(x, levels), x.view(-1, size).abs().amax(1)), "was expected"),
        (values_for_codes, "index of a level"),
        (lambda x, levels, size: look_up(x, levels, size)[0], "two things"),
        (lambda x, levels, size: look_up(x, levels, size)[::-1], "The order is codes"),
        (lambda x, levels, size: look_up(x, levels, 4), "Your code stopped"),
        (lambda x, levels, size: look_up(x, levels, size, absmax=lambda b: b.square().mean(1).sqrt()), "was expected"),
    ],
    "4.2": [
        (equation_four, "infinite"),
        (lambda: nf4(delta=1.0), "infinite"),
        (lambda: nf4(9, 9), "got 17 levels"),
        (lambda: nf4(8, 8), "got 15 levels"),
        (lambda: nf4(zero=False), "got 15 levels"),
        (lambda: nf4(8, 9), "8 positive"),
        (both_middles, "ascend"),
        (lambda: nf4().flip(0), "ascend"),
        (lambda: nf4(divide=False), "Divide by the largest"),
        (lambda: nf4(delta=1 - 1 / 32), "Is δ right"),
        (lambda: torch.arange(-7, 9) / torch.tensor([7.0] * 8 + [8.0] * 8), "differ from the published"),
        (lambda: quantile(torch.linspace(1 - DELTA, DELTA, 16)) / quantile(torch.tensor(DELTA)), "0.0 itself"),
        (lambda: nf4()[:, None], "one row"),
    ],
    "4.3": [
        (lambda block, outer: 4 + 32 / block, "without double quantization"),
        (lambda block, outer: 4.2, "was expected"),
        (lambda block, outer: 4 + 8 / block, "stored too"),
        (lambda block, outer: 4 + 8 / block + 32 / outer, "shared by outer blocks"),
        (lambda block, outer: 8 / block + 32 / (outer * block), "4 bits each"),
        (lambda block, outer: 4 + 8 / block + 8 / (outer * block), "takes 32 bits"),
        (lambda block, outer: 4 + 8 / block + 32 / 256 / block, "it varies"),
        (lambda block, outer: 4 + 8 / 64 + 32 / outer / 64, "it varies"),
        (lambda block, outer: 4 + (8 + 32) / block / outer, "was expected"),
    ],
    "4.4": [
        (lambda codes: entropy(codes, torch.log), "nats"),
        (with_nan, "0 · log 0"),
        (lambda codes: -entropy(codes), "not negative"),
        (lambda codes: 4.0, "0.8113"),
        (lambda codes: torch.log2(torch.tensor(1.0 * len(codes.unique()))).item(), "as if all were used alike"),
        (lambda codes: entropy(codes, torch.log10), "was expected"),
        (lambda codes: entropy(codes.flatten()[: len(codes)]), "was expected"),
        (lambda codes: entropy(codes.clamp(max=15)), "was expected"),
    ],
    "4.5": [
        (lloyd, "no mean"),
        (lambda v, levels: lloyd(v, levels, empty=0.0), "should stay where it is"),
        (lambda v, levels: lloyd(v, levels, middle=torch.median, empty=50.0), "not their median"),
        (as_it_was, "have not moved"),
        (lambda v, levels: (levels[:-1] + levels[1:]) / 2, "of shape"),
        (lambda v, levels: lloyd(v, levels, middle=middle_of_extremes, empty=50.0), "not the middle between"),
        (lambda v, levels: lloyd_solution(v, lloyd_solution(v, levels)), "these are two"),
        (many_steps, "until nothing moves"),
        (lambda v, levels: lloyd(v, levels, middle=torch.sum, empty=50.0), "divide by the number"),
    ],
    "4.6": [
        (nf4_levels, "count alike"),
        (lambda: kmeans_levels(scaled(student_t(3, 128_000, seed=1))[0]), "count alike"),
        (lambda: kmeans_levels(scaled(normal_values())[0]), "of ν = 3"),
        (lambda: kmeans_levels(student_t(3, 128_000, seed=1)), "after the division"),
        (lambda: torch.linspace(-1, 1, 16), "after the division"),
        (lambda: weighted(power=1), "squared"),
        (lambda: torch.linspace(-1, 1, 17), "16 codes"),
        (lambda: nf4_levels().flip(0), "ascend"),
    ],
}
