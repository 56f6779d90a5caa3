"""Exercises of chapter 4: NF4 and other codebooks."""

import math

import torch

from quantlab.codebook import kmeans_levels, nearest_level, nf4_levels, normalize_blocks, quantize_codebook
from quantlab.exercises.material import student_t, uniform
from quantlab.judging import Exercise, Wrong, as_tensor, expect
from quantlab.metrics import sqnr_db


def look_up_solution(x, levels, block_size):
    """Each block over its largest magnitude; then count the midpoints below each value."""
    blocks = x.view(-1, block_size)
    absmax = blocks.abs().amax(1)
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(blocks / absmax[:, None], midpoints), absmax


def _flat_pair(answer, *arguments):
    """(codes, absmax), each flat: the task leaves their shapes free."""
    found = answer(*arguments)
    if not (isinstance(found, tuple | list) and len(found) == 2):
        raise Wrong("Return two things: codes, absmax.")
    return tuple(torch.as_tensor(part).flatten() for part in found)


def _look_up_cases(random):
    """Tables that are lopsided, that end before ±1, with few levels and with many; blocks of any size."""
    for count, block_size in ((2, 4), (5, 1), (16, 8), (40, 16), (7, 3)):
        levels = torch.rand(count, generator=random).sort().values * uniform(random, 1.2, 2.0) - uniform(random, 0.6, 1)
        x = torch.randn(6 * block_size, generator=random) * uniform(random, 0.01, 100.0)
        yield x * torch.logspace(-1, 1, 6).repeat_interleave(block_size), levels, block_size


def _look_up_edges():
    levels = torch.tensor([-1.0, -0.4, 0.0, 0.3, 1.0])
    yield torch.tensor([0.6, -1.2, 0.1, 0.3]), levels, 4
    yield torch.tensor([0.6, -1.2, 0.1, 0.3, 8.0, 1.0, -2.9, 7.0]), levels, 4


def nf4_solution():
    """Normal quantiles on both sides of the middle, the middle itself once, over the largest."""
    delta = 1 - (1 / 30 + 1 / 32) / 2
    quantile = torch.distributions.Normal(0, 1).icdf
    up, down = (quantile(torch.linspace(delta, 0.5, n))[:-1] for n in (9, 8))
    levels = torch.cat([-down, torch.zeros(1), up.flip(0)])
    return levels / levels.max()


def _nf4_rule(levels):
    levels = as_tensor(levels)
    expect(levels is not None and levels.ndim == 1, f"Return a tensor of levels, one row; got {levels!r}.")
    expect(
        bool(torch.isfinite(levels).all()),
        "A level is infinite: you asked for the quantile of 0 or of 1. The outermost probability is δ, below 1.",
    )
    expect(
        len(levels) == 16,
        f"Four bits have 16 codes; got {len(levels)} levels. Count: 8 positive, 7 negative, and 0 once.",
    )
    expect(bool((levels.diff() > 0).all()), "The levels must ascend, each above the one before.")
    expect(bool((levels == 0).any()), "0.0 itself must be one of the levels, exactly.")
    expect(
        (levels > 0).sum() == 8,
        f"NF4 has 8 positive and 7 negative levels; got {(levels > 0).sum()} and {(levels < 0).sum()}. "
        "Which side gets the nine points of linspace?",
    )
    expect(
        abs(levels.max() - 1) < 1e-6 and abs(levels.min() + 1) < 1e-6,
        f"The outermost levels are -1 and 1; got {levels.min():.7g} and {levels.max():.7g}. Divide by the largest.",
    )
    off = (levels - nf4_levels().double()).abs()
    expect(
        off.max() < 1e-6,
        f"The levels differ from the published ones by up to {off.max():.2g}, at index {int(off.argmax())}; 2e-7 can "
        "be reached. Is δ right, and does linspace run from δ to ½?",
    )
    return f"Largest difference to the published table: {off.max():.0e}."


def bits_solution(block_size, outer):
    """4 bits for the code, 8 bits for a block's absmax, a float32 for `outer` of those."""
    return 4 + 8 / block_size + 32 / (outer * block_size)


def _bits_cases(random):
    for most in (16, 64):
        yield tuple(int(n) for n in torch.randint(4, most, (2,), generator=random))


def _bits_edges():
    yield 64, 256
    yield 32, 16
    yield 16, 64
    yield 8, 8


def entropy_solution(codes):
    """Shares of the codes that occur; minus the mean of their logarithms to base 2."""
    shares = codes.flatten().int().bincount() / codes.numel()
    shares = shares[shares > 0]
    return -(shares * shares.log2()).sum().item()


def _entropy_cases(random):
    """Codes of any integer type and shape; few of them in use or many, with gaps, very unevenly."""
    for most, dtype in ((16, torch.uint8), (16, torch.int64), (3, torch.int32), (200, torch.uint8)):
        chances = torch.rand(most, generator=random) ** 3 * (torch.rand(most, generator=random) > 0.3) + 1e-9
        codes = torch.multinomial(chances, 120, replacement=True, generator=random).to(dtype)
        yield (codes.view(12, 10) if most == 16 else codes,)


def _entropy_edges():
    yield (torch.arange(16, dtype=torch.uint8).repeat(10),)
    yield (torch.tensor([0, 3, 3, 3], dtype=torch.uint8),)
    yield (torch.full((9,), 5, dtype=torch.uint8),)
    yield (torch.arange(8, dtype=torch.uint8).view(2, 4),)
    yield (torch.tensor([3, 3, 7], dtype=torch.uint8),)


def lloyd_solution(values, levels):
    """Everybody to the nearest level, each level to the mean of its own; a level without any stays."""
    codes = nearest_level(values, levels).long()
    sums = values.new_zeros(len(levels)).index_add(0, codes, values)
    counts = codes.bincount(minlength=len(levels))
    return torch.where(counts > 0, sums / counts.clamp(min=1), levels)


def _lloyd_cases(random):
    """Lopsided values, so that mean, median and middle differ; levels that nobody is nearest to, on either side."""
    for count, most in ((9, 3), (60, 5), (400, 16)):
        values = torch.randn(count, generator=random).exp() * uniform(random, 0.1, 10.0) - uniform(random, 0.0, 3.0)
        levels = (torch.randn(most, generator=random) * values.std() + values.mean()).sort().values
        yield values, levels
        yield values, torch.cat([levels[:1] - 50, levels, levels[-1:] + 100])


def _lloyd_edges():
    values = torch.tensor([0.0, 0.1, 0.9, 1.0, 1.4])
    yield values, torch.tensor([0.2, 0.5])
    yield values, torch.tensor([0.0, 1.0, 50.0])
    yield values, torch.tensor([-9.0, 0.2, 0.45, 0.9])


def _own(values, levels, k):
    """The values that are nearest to level k."""
    return values[nearest_level(values, levels) == k]


def _until_still(values, levels):
    for _ in range(100):
        levels = lloyd_solution(values, levels)
    return levels


def table_solution():
    """Blocks drawn as often as their errors count, by absmax squared; k-means on their scaled values."""
    values, absmax = normalize_blocks(student_t(3, 128_000, seed=1), block_size=32)
    random = torch.Generator().manual_seed(2)
    drawn = torch.multinomial(absmax**2, len(absmax), replacement=True, generator=random)
    return kmeans_levels(values.view(-1, 32)[drawn], 16)


def _table_rule(levels):
    levels = as_tensor(levels)
    expect(levels is not None and levels.ndim == 1, f"Return a tensor of levels, one row; got {levels!r}.")
    levels = levels.float()
    expect(2 <= len(levels) <= 16, f"Four bits have 16 codes; got {len(levels)} levels.")
    expect(
        bool(torch.isfinite(levels).all()) and bool((levels.diff() > 0).all()), "The levels must be finite and ascend."
    )
    x = student_t(3, 128_000, seed=0)
    mine, nf4 = (sqnr_db(x, quantize_codebook(x, t, block_size=32).dequantize()) for t in (levels, nf4_levels()))
    both = f"Your table reaches {mine:.2f} dB in blocks of 32, NF4 {nf4:.2f}; 0.6 more is asked."
    expect(
        mine > nf4 - 0.2,
        f"{both} The values to fit are those of ν = 3 after the division by absmax: they fill -1 to 1, most of them "
        "near 0, and one of each block is ±1.",
    )
    expect(
        mine > nf4 + 0.2,
        f"{both} That is where k-means ends when all scaled values count alike. But the error of a scaled value is "
        "multiplied by the absmax of its block: whose errors are large?",
    )
    expect(
        mine > nf4 + 0.6,
        f"{both} Nearly: it is the *squared* error that counts, and k-means may need more steps; 0.8 can be reached.",
    )
    return f"{mine:.2f} dB, {mine - nf4:.2f} more than NF4."


EXERCISES = {
    "4.1": Exercise(
        "look-up",
        hints=(
            "A block is a row of x.view(-1, block_size): its largest magnitude is .abs().amax(1).",
            "Divide every row by its own magnitude: blocks / absmax[:, None].",
            "torch.bucketize(values, borders) counts the borders below each value; the borders lie half way "
            "between neighbouring levels.",
        ),
        solution=look_up_solution,
        use=_flat_pair,
        cases=_look_up_cases,
        edges=_look_up_edges,
        slips={
            "Magnitude: the sign does not count.": (".abs().amax(1)", ".amax(1)"),
            "Magnitude: the sign does not count, and absmax is positive.": (
                ".abs().amax(1)", ".gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]"
            ),
            "A block is a row of x.view(-1, block_size): each has its own absmax.": (
                "x.view(-1, block_size)", "x.view(1, -1)"
            ),
            "The borders are not the levels: they lie half way between two neighbours.": (
                "(levels[:-1] + levels[1:]) / 2", "levels"
            ),
            "Nearest means: the border between two levels is half way, not at the upper one.": (
                "(levels[:-1] + levels[1:]) / 2", "levels[1:]"
            ),
            "Nearest means: the border between two levels is half way, not at the lower one.": (
                "(levels[:-1] + levels[1:]) / 2", "levels[:-1]"
            ),
            "Did you divide by absmax first?": ("blocks / absmax[:, None]", "blocks"),
            "Divide by absmax, do not multiply.": ("blocks / absmax", "blocks * absmax"),
            "A code is the index of a level, a whole number, not the level.": (
                "torch.bucketize(blocks / absmax[:, None], midpoints), absmax",
                "levels[torch.bucketize(blocks / absmax[:, None], midpoints)], absmax",
            ),
            "The order is codes, absmax.": (
                "torch.bucketize(blocks / absmax[:, None], midpoints), absmax",
                "absmax, torch.bucketize(blocks / absmax[:, None], midpoints)",
            ),
        },
    ),
    "4.2": Exercise(
        "NF4",
        hints=(
            "torch.distributions.Normal(0, 1).icdf gives quantiles of a tensor of probabilities.",
            "Positive side: the quantiles at torch.linspace(δ, 0.5, 9), without the last, which is 0. Negative side: "
            "the same with 8 points, and a minus.",
            "torch.cat([minus the 7, torch.zeros(1), the 8 turned round with .flip(0)]), divided by its maximum.",
        ),
        solution=nf4_solution,
        edges=lambda: [()],
        rule=_nf4_rule,
    ),
    "4.3": Exercise(
        "bits of double quantization",
        hints=(
            "Three kinds of numbers are stored: codes, 8-bit magnitudes, float32 magnitudes of magnitudes.",
            "A number that n weights share costs each of them its bits over n.",
            "The float32 is shared by outer blocks, and so by outer * block_size weights.",
        ),
        solution=bits_solution,
        cases=_bits_cases,
        edges=_bits_edges,
        tolerance=1.3e-4,  # three decimals are enough
        slips={
            "The absmax of a block takes 8 bits now, not 32.": ("8 / block_size", "32 / block_size"),
            "That is without double quantization: absmax take 8 bits, and runs of them share a float32.": (
                "8 / block_size + 32 / (outer * block_size)", "32 / block_size"
            ),
            "The float32 of each run of blocks is stored too.": (" + 32 / (outer * block_size)", ""),
            "The float32 is shared by outer blocks, and so by outer · block_size weights.": (
                "32 / (outer * block_size)", "32 / outer"
            ),
            "The codes are stored too: 4 bits each.": ("return 4 + ", "return "),
            "One number in float32 takes 32 bits.": ("32 / (outer", "8 / (outer"),
            "The 8 bits of an absmax are shared by the weights of its block.": ("8 / block_size", "8"),
            "block_size is the number of weights in a block; it varies.": ("block_size", "64", "def bits_solution(64",
                                                                           "def bits_solution(block_size"),
            "outer is the number of blocks with one float32; it varies.": ("(outer *", "(256 *"),
            "The one mean of a tensor does not count, nor a second float32.": ("32 / (outer", "64 / (outer"),
        },
    ),
    "4.4": Exercise(
        "entropy of the codes",
        hints=(
            "First the share of each code: codes.flatten().int().bincount() / codes.numel().",
            "The entropy is the sum of −share · log₂(share).",
            "Keep the shares above 0 only: shares[shares > 0]; log2 is a method of tensors.",
        ),
        solution=entropy_solution,
        cases=_entropy_cases,
        edges=_entropy_edges,
        smallest=1e-4,
        slips={
            "That is right in nats. Bits need the logarithm to base 2.": ("log2()", "log()"),
            "nan: 0 · log 0 counts as 0. Leave codes that do not occur out.": ("shares[shares > 0]", "shares"),
            "Entropy is not negative: mind the minus before the sum.": ("return -", "return "),
            "That is the logarithm of the number of codes in use, as if all were used alike.": lambda codes: math.log2(
                len(codes.unique())
            ),
            "Each logarithm counts as often as its code occurs: multiply by the share.": (
                "(shares * shares.log2()).sum()", "shares.log2().sum()"
            ),
            "The sum over the codes was asked for, not the mean.": (".sum().item()", ".mean().item()"),
            "Shares, not counts: divide by the number of codes.": (" / codes.numel()", " / 1"),
        },
    ),
    "4.5": Exercise(
        "one step of k-means",
        hints=(
            "nearest_level(values, levels) says who belongs to which level.",
            "The mean of the values of level k is values[codes == k].mean(); a loop over k will do.",
            "Where no code equals k, keep levels[k]: torch.where, or an if inside the loop.",
        ),
        solution=lloyd_solution,
        cases=_lloyd_cases,
        edges=_lloyd_edges,
        slips={
            "Nobody is nearest to some level, so it has no mean: 0 / 0. Leave such a level where it is.": (
                "torch.where(counts > 0, sums / counts.clamp(min=1), levels)", "sums / counts"
            ),
            "A level that nobody is nearest to should stay where it is, not go to 0.": (
                "torch.where(counts > 0, sums / counts.clamp(min=1), levels)", "sums / counts.clamp(min=1)"
            ),
            "The mean of its values, not their median.": lambda values, levels: torch.stack(
                [_own(values, levels, k).median() if len(_own(values, levels, k)) else v for k, v in enumerate(levels)]
            ),
            "The mean of its values, not the middle between the smallest and the largest.": (
                lambda values, levels: torch.stack(
                    [
                        (_own(values, levels, k).amin() + _own(values, levels, k).amax()) / 2
                        if len(_own(values, levels, k))
                        else v
                        for k, v in enumerate(levels)
                    ]
                )
            ),
            "The levels have not moved.": ("torch.where(counts > 0, sums / counts.clamp(min=1), levels)", "levels"),
            "One step was asked for; these are two.": lambda values, levels: lloyd_solution(
                values, lloyd_solution(values, levels)
            ),
            "One step was asked for, not all of them until nothing moves.": lambda values, levels: _until_still(
                values, levels
            ),
            "As many levels come out as went in, a lonely one as well.": (
                "torch.where(counts > 0, sums / counts.clamp(min=1), levels)", "(sums / counts)[counts > 0]"
            ),
            "The nearest level: its border to the next lies half way.": (
                "nearest_level(values, levels).long()",
                "(torch.bucketize(values, levels, right=True) - 1).clamp(min=0)",
            ),
            "A mean: divide by the number of values of the level.": ("sums / counts.clamp(min=1)", "sums"),
        },
    ),
    "4.6": Exercise(
        "a table for heavy tails",
        hints=(
            "x - x̂ = absmax · (value - level): the squared error of a scaled value counts absmax² times.",
            "Lloyd's step with weights: a level moves to Σ weight · value / Σ weight over its own values. Repeat it "
            "some 30 times, from NF4 or from kmeans_levels.",
            "values, absmax = normalize_blocks(student_t(3, 128_000, seed=1), block_size=32); a value's weight is "
            "absmax.repeat_interleave(32) ** 2. Or let kmeans_levels see each block as often as it should count: "
            "torch.multinomial draws them.",
        ),
        solution=table_solution,
        edges=lambda: [()],
        rule=_table_rule,
        seconds=60.0,
    ),
}  # fmt: skip
