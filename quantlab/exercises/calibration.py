"""Exercises of chapter 2: clamping and calibration."""

import inspect
from collections.abc import Collection, Mapping
from functools import cache

import numpy as np
import torch

from quantlab.affine import choose_qparams, fake_quantize
from quantlab.exercises.material import off_ties, uniform
from quantlab.judging import Exercise, Wrong, as_number, expect, two_ends

# --- 2.1 --------------------------------------------------------------------------------------------------------


def split_solution(x, scale, zero_point, qmin, qmax):
    """The code before the clamp says which elements are clipped; both sums are divided by all elements."""
    codes = torch.round(x / scale) + zero_point
    error = (scale * (codes.clamp(qmin, qmax) - zero_point) - x) ** 2
    clipped = (codes < qmin) | (codes > qmax)
    return error[~clipped].sum() / x.numel(), error[clipped].sum() / x.numel()


def _split_cases(random):
    """Some elements beyond either end, or one, or none; many on the last codes; a matrix among them."""
    for zero_point, qmin, qmax in ((1, 0, 3), (0, -4, 3), (8, 0, 15), (-3, -8, 7)):
        low, high = qmin - zero_point, qmax - zero_point
        for below, above in ((3, 3), (2, 0), (0, 2), (0, 0)):
            scale, steps = uniform(random, 0.1, 3.0), off_ties(random, 12, low - below, high + above)
            yield scale * steps.view(3, 4), scale, zero_point, qmin, qmax


def _split_edges():
    x = torch.tensor([-3.0, -0.3, 0.2, 0.51, 1.1, 2.6, 9.0, 1.6])
    for scale, zero_point, qmin, qmax in ((1.0, 1, 0, 3), (0.5, 0, -4, 3), (2.0, 8, 0, 15)):
        yield x, scale, zero_point, qmin, qmax


# --- 2.2 --------------------------------------------------------------------------------------------------------


def clip_solution(x, bits):
    """Try clips from a sixty-fourth of the farthest value up to it, in steps of some percent; keep the best."""
    half, best = 2 ** (bits - 1), None
    for fraction in 2.0 ** (-torch.arange(49) / 8):
        clip = fraction * x.abs().max()
        qp = choose_qparams(-clip, clip, qmin=-half, qmax=half - 1, symmetric=True)
        error = (fake_quantize(x, qp) - x).square().mean().item()
        if best is None or error < best[0]:
            best = error, clip.item()
    return best[1]


def _clip_error(x, clip, bits):
    half, clip = 2 ** (bits - 1), torch.tensor(float(clip))
    qp = choose_qparams(-clip, clip, qmin=-half, qmax=half - 1, symmetric=True)
    return (fake_quantize(x, qp) - x).square().mean().item()


@cache
def _least_clip_error(x: bytes, bits: int) -> float:
    values = torch.from_numpy(np.frombuffer(x, np.float32).copy())
    return _clip_error(values, clip_solution(values, bits), bits)


def _clip_cases(random):
    """Heavy tails and even data, of any size, lopsided either way: no rule of thumb fits them all."""
    for bits in (2, 4, 8):
        heavy = torch.randn(1000, generator=random) / torch.rand(1000, generator=random).clamp(min=0.02).sqrt()
        yield uniform(random, 0.01, 50.0) * heavy, bits
    even = uniform(random, 0.01, 50.0) * (2 * torch.rand(1000, generator=random) - 1)
    yield even, 3
    yield even.abs(), 6
    yield -even.abs(), 5


def _clip_edges():
    yield torch.linspace(-3, 3, 1001) ** 5, 4
    yield torch.linspace(-1, 1, 1001), 8
    yield torch.linspace(0, 0.1, 500), 2


def _clip_rule(clip, x, bits):
    """At most 1.02 times the least error of a fine and wide search."""
    number, farthest = as_number(clip), x.abs().max().item()
    expect(number is not None, f"Return one number, the clip; got {clip!r}.")
    expect(number > 0, f"The clip is a positive real number, in the units of x; got {number:.4g}.")
    mine, best = _clip_error(x, number, bits), _least_clip_error(x.numpy().tobytes(), bits)
    where = f"{bits} bits, clip {number:.4g} ({number / farthest:.1%} of the farthest value)"
    expect(
        mine <= 1.02 * best,
        f"{where}: {mine / best:.4f} times the least mean squared error; at most 1.02 was asked for. The best clip "
        "depends on the bits and on the data. Is your search fine enough, and wide enough?",
    )
    return f"{mine / best:.4f} times the least error in the last case."


# --- 2.3 --------------------------------------------------------------------------------------------------------


class StreamingPercentile:
    """A histogram of |x| with 4096 bins; when a value does not fit, neighbours merge and the bins are twice as wide."""

    def __init__(self, percentile):
        self.percentile, self.width = percentile, 1e-30
        self.counts = torch.zeros(4096, dtype=torch.int64)

    def update(self, x):
        x = x.abs().flatten()
        while x.max() >= 4096 * self.width:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros_like(merged)])
            self.width *= 2
        self.counts += torch.bincount((x / self.width).long().clamp(max=4095), minlength=4096)

    def limit(self):
        below = self.counts.cumsum(0)
        needed = below[-1] * self.percentile / 100
        return ((below < needed).sum().item() + 1) * self.width


def _watch(make, percentile, x, sizes):
    """(limit after one batch, limit after batches of these sizes, how many numbers the observer then holds)."""
    whole, parts = (_made(make, percentile) for _ in range(2))
    whole.update(x.clone())
    for batch in x.split(sizes):
        parts.update(batch.clone())
    return whole.limit(), parts.limit(), _held(parts)


def _made(make, percentile):
    """An observer of the learner's class."""
    try:
        inspect.signature(make).bind(percentile)
    except TypeError as error:
        raise Wrong(f"The class is made with one argument, percentile: {error}.") from None
    observer = make(percentile)
    for method in ("update", "limit"):
        expect(
            callable(getattr(observer, method, None)), f"The class has no method {method}; update and limit it needs."
        )
    return observer


def _percentile_cases(random):
    """Heavy tails; in any order, and with the loudest last, so that whoever stops counting is found out."""
    for percentile in (50, 90, 99, 99.9):
        heavy = torch.randn(60_000, generator=random) / torch.rand(60_000, generator=random).clamp(min=0.02).sqrt()
        x = uniform(random, 0.001, 1000.0) * heavy
        yield percentile, x[x.abs().argsort()] if percentile != 90 else x, [1, 19_999, 40_000 - 300, 300]


def _percentile_edges():
    small, random = torch.linspace(0, 1, 1000), torch.Generator().manual_seed(0)
    yield 99, torch.cat([small, 1000 * small]), [1000, 1000]
    yield 99, torch.cat([1000 * small, small]), [1000, 1000]
    yield 99, small - 0.3, [500, 500]
    yield 99, -small, [1000]
    yield 50, torch.cat([small, 1000 * small]), [1000, 1000]
    yield 99, torch.cat([1000 * small, small]).view(100, 20), [50, 50]  # batches may be matrices
    yield 99, torch.rand(100_000, generator=random), [2000] * 50


def _percentile_rule(result, percentile, x, sizes):
    (whole, parts), held = (as_number(limit) for limit in result[:2]), result[2]
    expect(None not in (whole, parts), f"limit() should return a number; got {result[0]!r}.")
    exact, largest = torch.quantile(x.abs().flatten()[: 2**24], percentile / 100).item(), x.abs().max().item()
    for name, limit in (("in one batch", whole), (f"in batches of {_listed(sizes)}", parts)):
        inside = (x.abs() <= limit).float().mean().item()
        expect(
            abs(limit - exact) <= 0.01 * largest,
            f"percentile {percentile}, {len(x):,} rows {name}: {inside:.2%} of |x| lie within your limit {limit:.4g}; "
            f"it should be {exact:.4g}, give or take 1 % of the largest |x|, {largest:.4g}. {_about_limit(name)}",
        )
    expect(
        abs(whole - parts) <= 0.002 * largest,
        f"percentile {percentile}: the limit depends on how the stream is cut: {whole:.4g} in one batch, {parts:.4g} "
        f"in batches of {_listed(sizes)}. {_about_limit('in batches')}",
    )
    expect(
        held <= 50_000,
        f"After {x.numel():,} values your observer holds {held:,} numbers, over 50,000. Keep counts, not values.",
    )


def _about_limit(name: str) -> str:
    if name == "in one batch":
        return "Negative values count by their size. And are the bins fine enough for values of this size?"
    return (
        "Every batch counts, not the first or last alone. What becomes of values beyond your last bin, and of those "
        "counted before the bins grew? An average of the batches' percentiles is not the percentile of all."
    )


def _listed(sizes: list) -> str:
    return ", ".join(map(str, sizes[:4])) + ", …" * (len(sizes) > 4)


def _held(thing) -> int:
    """How many numbers a value holds, in tensors, containers of any kind and objects."""
    if isinstance(thing, torch.Tensor):
        return thing.numel()
    if isinstance(thing, Mapping):
        return sum(map(_held, thing.values()))
    if hasattr(thing, "size") and not callable(thing.size):
        return int(thing.size)
    if isinstance(thing, Collection) and not isinstance(thing, str):
        return sum(map(_held, thing))
    return sum(map(_held, vars(thing).values())) if hasattr(thing, "__dict__") and not callable(thing) else 1


# --- 2.4 --------------------------------------------------------------------------------------------------------


def overlap_solution(calibration, test, length):
    """The windows of the calibration text as a set; then ask for each window of the test text."""
    known = {tuple(w) for w in calibration.unfold(0, length, 1).tolist()}
    windows = [tuple(w) for w in test.unfold(0, length, 1).tolist()]
    return sum(w in known for w in windows) / len(windows)


def _overlap_cases(random):
    """Texts that repeat themselves, copies that begin anywhere, tokens whose digits could be mistaken."""
    words = torch.tensor([1, 2, 3, 12, 23, 31, 123, 231])
    for length in (2, 3, 5):
        text, other = (words[torch.randint(0, 8, (60,), generator=random)] for _ in range(2))
        start, end = sorted(torch.randint(0, 59, (2,), generator=random).tolist())
        yield text, torch.cat([other, text[start : end + 1], other[:20]]), length
        yield other.repeat(2), torch.cat([text, text[:25], other[start : end + 1]]), length


def _overlap_edges():
    yield torch.tensor([2, 3, 4]), torch.tensor([9, 2, 3, 4, 9, 9]), 3
    yield torch.tensor([7, 7, 5, 6]), torch.tensor([5, 6, 7, 5, 6]), 2
    yield torch.tensor([12, 3, 45]), torch.tensor([2, 3, 4, 2, 3]), 2
    yield torch.tensor([1, 2, 1]), torch.tensor([1, 2, 1, 2, 5]), 2
    random = torch.Generator().manual_seed(0)
    text, other = (torch.randint(0, 2000, (300,), generator=random) for _ in range(2))
    yield text, text, 8
    yield other, text, 8
    yield text.flip(0), text, 8
    yield torch.cat([other, text[100:250]]), text, 8
    yield text, text[5:105], 8
    yield text[5:105], text, 8


# --- 2.5 --------------------------------------------------------------------------------------------------------


def output_range_solution(x, weight, bits):
    """Search the fractions of both ends, as MSE does, but compare what comes out of the layer."""
    gram, best = weight.T @ weight, None  # ‖E Wᵀ‖² = Σ (E G) ∘ E, one small product for each candidate
    fractions = 2.0 ** (-torch.arange(13) / 2)
    for f in fractions:
        for g in fractions:
            qp = choose_qparams(f * x.min(), g * x.max(), qmin=0, qmax=2**bits - 1)
            error = fake_quantize(x, qp) - x
            size = ((error @ gram) * error).sum().item()
            if best is None or size < best[0]:
                best = size, (f * x.min()).item(), (g * x.max()).item()
    return best[1], best[2]


def _layers(random):
    """Loud columns, on both sides of 0 or on one, to which the weight hardly listens, or as much as to the others."""
    for bits, listens, side in ((4, 0.005, 0), (2, 1.0, 0), (6, 0.02, 1), (3, 0.01, -1)):
        loud = torch.zeros(48).index_fill(0, torch.randperm(48, generator=random)[:3], 1.0)
        x = torch.randn(160, 48, generator=random)
        x = torch.where(loud == 1, (x.abs() * side if side else x) * uniform(random, 6.0, 12.0), x)
        weight = torch.randn(24, 48, generator=random) * torch.where(loud == 1, listens, 1.0)
        yield uniform(random, 0.1, 10.0) * x, weight, bits


def _layer_edges():
    """Even columns within ±1, and three that are louder by no power of two: a coarse search misses the best ends."""
    random = torch.Generator().manual_seed(0)
    for bits, louder in ((4, 2**2.5), (2, 2**1.5), (3, 2**3.5)):
        x = 2 * torch.rand(160, 48, generator=random) - 1
        x[:, [5, 20, 40]] *= louder
        weight = torch.randn(24, 48, generator=random)
        weight[:, [5, 20, 40]] *= 0.001
        yield x, weight, bits
    for seed in (1, 2):
        random.manual_seed(seed)
        yield torch.randn(160, 48, generator=random) ** 3, torch.randn(24, 48, generator=random), 2


def _unseen(x):
    """Inputs like x, the same for the same x: each column's values are drawn anew from its own."""
    rows = torch.randint(0, len(x), x.shape, generator=torch.Generator().manual_seed(1))
    return x.gather(0, rows)


def _output_error(x, weight, bits, low, high):
    fresh = _unseen(x)
    qp = choose_qparams(torch.tensor(float(low)), torch.tensor(float(high)), qmin=0, qmax=2**bits - 1)
    return ((fake_quantize(fresh, qp) - fresh) @ weight.T).square().sum().item()


@cache
def _least_output_error(x: bytes, weight: bytes, shape: tuple, bits: int) -> float:
    x, weight = (torch.from_numpy(np.frombuffer(t, np.float32).copy()).view(-1, shape[1]) for t in (x, weight))
    return _output_error(x, weight, bits, *output_range_solution(x, weight, bits))


def _output_rule(ends, x, weight, bits):
    """At most 1.1 times the output error, on other inputs, of what a search over both ends finds."""
    low, high = two_ends(ends)
    mine, whole = (_output_error(x, weight, bits, *ends) for ends in ((low, high), (x.min(), x.max())))
    best = _least_output_error(x.numpy().tobytes(), weight.numpy().tobytes(), weight.shape, bits)
    expect(
        mine <= 1.1 * best,
        f"[{low:.3g}, {high:.3g}] at {bits} bits gives {mine / best:.2f} times the output error, on inputs that you "
        f"have not seen, that a search over both ends reaches; 1.1 was asked for (x.min() to x.max(): "
        f"{whole / best:.2f}). {_about_range(x, weight)}{_FINER if mine < 2.2 * best else ''}",
    )
    return f"{mine / whole:.2f} times the output error of x.min() to x.max() in the last case."


_FINER = " Or is it only that your search is too coarse? Steps by a constant factor, √2 say, are fine everywhere."


def _about_range(x, weight) -> str:
    """Whether the loudest columns are those that the weight listens to."""
    loudest = x.abs().amax(0).topk(3).indices
    deaf = weight.square().mean(0)[loudest].mean() < 0.1 * weight.square().mean()
    sides = "" if -x.min() > x.max() / 2 and x.max() > -x.min() / 2 else " And give each end a factor of its own."
    if deaf:
        return f"The weight hardly listens to the loud columns: the error of x does not know that.{sides}"
    return f"Here the weight listens to the loud columns as well: do not cut them off unseen.{sides}"


EXERCISES = {
    "2.1": Exercise(
        "split the error",
        hints=(
            "Compute the codes without clamping first: they tell you who will be clipped.",
            "clipped = (codes < qmin) | (codes > qmax); then dequantize the clamped codes and square the error.",
            "error[clipped].sum() / x.numel(), and the same with ~clipped. Rounding comes first in the answer.",
        ),
        solution=split_solution,
        cases=_split_cases,
        edges=_split_edges,
        slips={
            "Each part is a sum divided by the number of ALL elements, not a mean over its own.": (
                "error[~clipped].sum() / x.numel()", "error[~clipped].mean()",
                "error[clipped].sum() / x.numel()", "error[clipped].mean()",
            ),
            "Each part is divided by the number of elements: sums alone grow with the tensor.": (" / x.numel()", ""),
            "What lies on the last code, or rounds to it, is not clipped: only what was beyond it before the clamp.": (
                "codes < qmin", "codes <= qmin", "codes > qmax", "codes >= qmax"
            ),
            "Clipped are those beyond qmin as well.": ("(codes < qmin) | ", ""),
            "Clipped are those beyond qmax as well.": (" | (codes > qmax)", ""),
            "The order is rounding, clipping.": ("error[~clipped]", "error[clipped]", ", error[clipped]",
                                                 ", error[~clipped]"),
            "What rounds to the last code is not clipped, even a little beyond the last grid point.": (
                "(codes < qmin) | (codes > qmax)",
                "(x < scale * (qmin - zero_point)) | (x > scale * (qmax - zero_point))",
            ),
            "Nothing is left to clip: look at the codes before the clamp.": (
                "torch.round(x / scale) + zero_point", "(torch.round(x / scale) + zero_point).clamp(qmin, qmax)"
            ),
            "The errors are squared.": (") ** 2", ").abs()"),
            "A code is shifted by zero_point: it decides who is clipped.": ("torch.round(x / scale) + zero_point",
                "torch.round(x / scale)", "(codes.clamp(qmin, qmax) - zero_point)", "codes.clamp(qmin, qmax)"),
        },
        tolerance=1e-3,
        smallest=1e-6,
    ),
    "2.2": Exercise(
        "the best clip",
        hints=(
            "Exercise 1.5 again, but near the best now: try many clips, keep the one with the least error.",
            "The best may lie at a fiftieth of the farthest value, or at all of it. Steps by a constant factor "
            "cover both.",
            "for fraction in 2.0 ** (-torch.arange(49) / 8): clip = fraction * x.abs().max(); then choose_qparams "
            "and fake_quantize as in the text.",
        ),
        solution=clip_solution,
        cases=_clip_cases,
        edges=_clip_edges,
        rule=_clip_rule,
        rounds=1,
    ),
    "2.3": Exercise(
        "a percentile that streams",
        hints=(
            "Keep counts of |x| in bins of one width, and let the width grow when a value does not fit.",
            "Twice the width: counts.view(-1, 2).sum(1) merges neighbours, and the upper half of the bins is free.",
            "limit(): counts.cumsum(0), the first bin at which it reaches percentile / 100 of all, times the width.",
        ),
        solution=StreamingPercentile,
        cases=_percentile_cases,
        edges=_percentile_edges,
        rule=_percentile_rule,
        use=_watch,
        rounds=1,
        seconds=5.0,
    ),
    "2.4": Exercise(
        "catch a leak",
        hints=(
            "t.unfold(0, length, 1) gives all windows of a tensor of tokens, one a row.",
            "A set answers 'have I seen this?' at once, and tuples can be put into sets.",
            "Divide the number of the test's windows that are in the set by the number of the test's windows.",
        ),
        solution=overlap_solution,
        cases=_overlap_cases,
        edges=_overlap_edges,
        slips={
            "The share is that of the TEST's windows.": (
                "calibration.unfold", "test.unfold_", "in test.unfold(", "in calibration.unfold(", "unfold_", "unfold"
            ),
            "Windows overlap: a copy may begin anywhere.": ("unfold(0, length, 1)", "unfold(0, length, length)"),
            "The test's windows overlap too: all of them count.": ("test.unfold(0, length, 1)",
                                                                   "test.unfold(0, length, length)"),
            "The calibration text's windows overlap too: a copy may begin anywhere.": (
                "calibration.unfold(0, length, 1)", "calibration.unfold(0, length, length)"
            ),
            "Order is what makes a window: the same tokens in another order are another one.": (
                "tuple(w)", "tuple(sorted(w))"
            ),
            "Single tokens are shared by all texts: compare windows.": ("length, 1", "1, 1"),
            "A window that occurs twice in the test counts twice: a list of windows, not a set.": (
                "[tuple(w) for w in test.unfold(0, length, 1).tolist()]",
                "{tuple(w) for w in test.unfold(0, length, 1).tolist()}",
            ),
            "n tokens have n - length + 1 windows: the last one is missing.": (
                "for w in test.unfold", "for w in test[:-1].unfold"
            ),
            "Divide by the number of windows, not of tokens.": ("/ len(windows)", "/ len(test)"),
            "A share was asked for: divide by the number of windows.": (" / len(windows)", ""),
            "A copy may stand anywhere: ask the whole other text, not the same place of it.": lambda a, b, length: (
                sum(map(torch.equal, a.unfold(0, length, 1), b.unfold(0, length, 1)))
                / (min(len(a), len(b)) - length + 1)
            ),
            "Compare tokens, not the digits that they are written in: 2 3 is not in 12 3.": lambda a, b, length: (
                sum(" ".join(map(str, w)) in " ".join(map(str, a.tolist())) for w in b.unfold(0, length, 1).tolist())
                / (len(b) - length + 1)
            ),
        },
    ),
    "2.5": Exercise(
        "a range for the output",
        hints=(
            "The MSE observer does not know the weight. You do: compare x @ weight.T with and without rounding.",
            "Search both ends, each by itself: a dozen fractions from 1 down, in steps of √2, by the output error.",
            "((fake_quantize(x, qp) - x) @ weight.T).square().sum() is what to make small.",
        ),
        solution=output_range_solution,
        cases=_layers,
        edges=_layer_edges,
        rule=_output_rule,
        rounds=1,
    ),
}  # fmt: skip
