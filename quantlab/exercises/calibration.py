"""Exercises of chapter 2: clamping and calibration."""

import torch

from quantlab.affine import QParams, choose_qparams, fake_quantize
from quantlab.checks import Exercise, expect
from quantlab.metrics import split_error
from quantlab.observers import MSE


def split_solution(x, scale, zero_point, qmin, qmax):
    """The code before the clamp says which elements are clipped; both sums are divided by all elements."""
    codes = torch.round(x / scale) + zero_point
    error = (scale * (codes.clamp(qmin, qmax) - zero_point) - x) ** 2
    clipped = (codes < qmin) | (codes > qmax)
    return error[~clipped].sum() / x.numel(), error[clipped].sum() / x.numel()


def _test_split(f):
    x = torch.tensor([-3.0, -0.3, 0.2, 0.5, 1.1, 2.6, 9.0, 1.6])
    for scale, zero_point, qmin, qmax in ((1.0, 1, 0, 3), (0.5, 0, -4, 3), (2.0, 8, 0, 15)):
        rounding, clipping = (float(part) for part in f(x.clone(), scale, zero_point, qmin, qmax))
        qp = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), qmin, qmax)
        right = split_error(x, qp)
        got = f"For scale {scale}, zero point {zero_point}, codes {qmin}..{qmax}: {rounding:.4g} + {clipping:.4g}"
        expect(
            abs(rounding + clipping - sum(right)) < 1e-4 * (1 + sum(right)),
            f"{got}; the parts must add up to the mean squared error over all elements, {sum(right):.4g}. "
            "Is each a sum divided by the number of ALL elements?",
        )
        expect(
            abs(rounding - right.rounding) < 1e-4 * (1 + sum(right)),
            f"{got}: the sum is right, but some elements stand on the wrong side. Clipped are those whose code, "
            "before the clamp, lies outside qmin..qmax, on either side.",
        )


def clip_solution(x, bits):
    """Try clips from a sixty-fourth of the farthest value up to it, in steps of a few percent; keep the best."""
    half, best = 2 ** (bits - 1), None
    for fraction in 2.0 ** (-torch.arange(97) / 16):
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


def _test_clip(f):
    worst = 0.0
    for name, x in (("heavy tails", _heavy(4000)), ("even data", torch.linspace(-1, 1, 4001))):
        for bits in (2, 4, 8):
            clip, farthest = float(f(x.clone(), bits)), x.abs().max().item()
            expect(clip > 0, f"The clip is a positive real number, in the units of x; got {clip:.4g}.")
            mine, best = _clip_error(x, clip, bits), _clip_error(x, clip_solution(x, bits), bits)
            worst = max(worst, mine / best)
            where = f"{name}, {bits} bits: clip {clip:.4g} ({clip / farthest:.0%} of the farthest value)"
            expect(
                mine <= 1.02 * best,
                f"{where} gives {mine / best:.2f} times the least mean squared error; the target is 1.02. "
                "Does the best clip depend on the bits and on the data? Is your search fine enough, and wide enough?",
            )
    return f"At most {worst:.3f} times the least error."


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


def _test_percentile(make):
    x = _heavy(80_000)
    x = x[x.abs().argsort()]  # the loudest last, so that whoever stops counting is found out
    sizes = {"one batch": [80_000], "ten batches": [8000] * 10, "odd batches": [1, 19_999, 60_000]}
    for percentile in (50, 99, 99.9):
        limits = {}
        exact = torch.quantile(x.abs(), percentile / 100).item()
        for name, parts in sizes.items():
            observer = make(percentile)
            for batch in x.split(parts):
                observer.update(batch.clone())
            limits[name] = limit = float(observer.limit())
            inside = (x.abs() <= limit).float().mean().item()
            expect(
                abs(limit - exact) <= 0.01 * x.abs().max().item(),
                f"percentile {percentile}, {name}: {inside:.2%} of |x| lie within your limit {limit:.4g}; it should be "
                f"{exact:.4g}, give or take 1 % of the largest |x|. Negative values count by their size, and every "
                "batch counts, not the last alone.",
            )
        expect(
            max(limits.values()) - min(limits.values()) <= 0.002 * x.abs().max().item(),
            f"percentile {percentile}: the limit depends on how the stream is cut: "
            + ", ".join(f"{name} {limit:.3f}" for name, limit in limits.items())
            + ". Does every batch count? And an average of the batches' percentiles is not the percentile of all.",
        )
    _test_growth(make)


def _test_growth(make):
    """Values 1,000 times larger in the second batch, and a stream that must not be kept."""
    observer, small = make(99), torch.linspace(0, 1, 1000)
    for batch in (small, 1000 * small):
        observer.update(batch.clone())
    exact = torch.quantile(torch.cat([small, 1000 * small]), 0.99).item()
    limit = float(observer.limit())
    expect(
        abs(limit - exact) <= 10,
        f"When a second batch is 1,000 times as large, the limit should be {exact:.0f} (± 10); got {limit:.4g}. "
        "What becomes of values beyond your last bin, and of those counted before the bins grew?",
    )
    observer = make(99)
    for i in range(50):
        observer.update(torch.rand(2000, generator=torch.Generator().manual_seed(i)))
    held = _held(vars(observer))
    expect(
        held <= 50_000,
        f"After 100,000 values your observer holds {held:,} numbers; 50,000 are allowed. Keep counts, not values.",
    )


def _held(thing) -> int:
    """How many numbers a value holds, in tensors, lists and dicts."""
    if isinstance(thing, torch.Tensor):
        return thing.numel()
    if isinstance(thing, dict):
        return sum(map(_held, thing.values()))
    if isinstance(thing, list | tuple | set):
        return sum(map(_held, thing))
    return getattr(thing, "size", 1) if not callable(getattr(thing, "size", 1)) else 1


def overlap_solution(calibration, test, length):
    """The windows of the calibration text as a set; then ask for each window of the test text."""
    known = {tuple(w) for w in calibration.unfold(0, length, 1).tolist()}
    windows = [tuple(w) for w in test.unfold(0, length, 1).tolist()]
    return sum(w in known for w in windows) / len(windows)


def _test_overlap(f):
    random = torch.Generator().manual_seed(0)
    text, other = (torch.randint(0, 2000, (600,), generator=random) for _ in range(2))
    copied = torch.cat([other, text[100:300]])
    nine = torch.tensor([9, 2, 3, 4, 9, 9])
    cases = (
        (text, text, 8, 1.0, "A text against itself", "Every one of its windows is known."),
        (other, text, 8, 0.0, "Unrelated texts", "They share tokens, as all texts do, but no window of 8."),
        (text.flip(0), text, 8, 0.0, "The same tokens backwards", "Order is what makes a window."),
        (copied, text, 8, 193 / 593, "A third was copied from the test", "A copy may stand and begin anywhere."),
        (text, text[5:105], 8, 1.0, "A short piece of a long text", "The share is that of the TEST's windows."),
        (nine[1:4], nine, 3, 1 / 4, "One known window of four", "Six tokens have four windows of 3, not three."),
    )
    for calibration, test, length, right, what, why in cases:
        share = float(f(calibration.clone(), test.clone(), length))
        expect(abs(share - right) < 1e-6, f"{what}: the share should be {right:.3f}; got {share:.3f}. {why}")


def output_range_solution(x, weight, bits):
    """Search the fractions of both ends, as MSE does, but compare what comes out of the layer."""
    gram, best = weight.T @ weight, None  # ‖E Wᵀ‖² = Σ (E G) ∘ E, one small product for each candidate
    fractions = 2.0 ** (-torch.arange(25) / 4)
    for f in fractions:
        for g in fractions:
            low, high = f * x.min(), g * x.max()
            qp = choose_qparams(low, high, qmin=0, qmax=2**bits - 1)
            error = fake_quantize(x, qp) - x
            size = ((error @ gram) * error).sum().item()
            if best is None or size < best[0]:
                best = size, low.item(), high.item()
    return best[1], best[2]


def _test_output_range(f):
    (x, fresh), weight = _planted(), _planted_weight()
    low, high = (float(bound) for bound in f(x.clone(), weight.clone(), 4))
    low0, high0 = (bound.item() for bound in MSE(bits=4).update(x).min_max())

    def error(a, b):
        qp = choose_qparams(torch.tensor(a), torch.tensor(b), qmin=0, qmax=15)
        difference = (fake_quantize(fresh, qp) - fresh) @ weight.T
        return (difference.square().sum() / (fresh @ weight.T).square().sum()).item()

    share = error(low, high) / error(low0, high0)
    expect(
        share <= 0.5,
        f"Your range [{low:.3g}, {high:.3g}] gives {share:.2f} times the output error of the MSE observer's "
        f"[{low0:.3g}, {high0:.3g}] on fresh data; the target is 0.5. Which columns of the weight read the outliers?",
    )
    return f"{share:.2f} times the output error of the MSE observer's range, on data you have not seen."


def _heavy(count):
    """Heavy tails, always the same; never two equal in size."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, generator=random) / torch.rand(count, generator=random).clamp(min=0.02).sqrt()


def _planted():
    """Two batches of inputs (256, 64): four of the columns are ten times as large as the others."""
    random = torch.Generator().manual_seed(0)
    size = torch.where(torch.arange(64) % 16 == 3, 10.0, 1.0)
    return [torch.randn(256, 64, generator=random) * size for _ in range(2)]


def _planted_weight():
    """(32, 64); what reads the large columns is a two-hundredth of the rest."""
    random = torch.Generator().manual_seed(1)
    size = torch.where(torch.arange(64) % 16 == 3, 0.005, 1.0)
    return torch.randn(32, 64, generator=random) * size


EXERCISES = {
    "2.1": Exercise(
        "split the error",
        _test_split,
        (
            "Compute the codes without clamping first: they tell you who will be clipped.",
            "clipped = (codes < qmin) | (codes > qmax); then dequantize the clamped codes and square the error.",
            "error[clipped].sum() / x.numel(), and the same with ~clipped. Rounding comes first in the answer.",
        ),
        split_solution,
    ),
    "2.2": Exercise(
        "the best clip",
        _test_clip,
        (
            "Exercise 1.5 again, but near the best now: try many clips, keep the one with the least error.",
            "The best may lie at a fiftieth of the farthest value, or at all of it. Steps by a constant factor "
            "cover both.",
            "for fraction in 2.0 ** (-torch.arange(97) / 16): clip = fraction * x.abs().max(); then choose_qparams "
            "and fake_quantize as in the text.",
        ),
        clip_solution,
    ),
    "2.3": Exercise(
        "a percentile that streams",
        _test_percentile,
        (
            "Keep counts of |x| in bins of one width, and let the width grow when a value does not fit.",
            "Twice the width: counts.view(-1, 2).sum(1) merges neighbours, and the upper half of the bins is free.",
            "limit(): counts.cumsum(0), the first bin at which it reaches percentile / 100 of all, times the width.",
        ),
        StreamingPercentile,
    ),
    "2.4": Exercise(
        "catch a leak",
        _test_overlap,
        (
            "t.unfold(0, length, 1) gives all windows of a tensor of tokens, one a row.",
            "A set answers 'have I seen this?' at once, and tuples can be put into sets.",
            "Divide the number of the test's windows that are in the set by the number of the test's windows.",
        ),
        overlap_solution,
    ),
    "2.5": Exercise(
        "a range for the output",
        _test_output_range,
        (
            "The MSE observer does not know the weight. You do: compare x @ weight.T with and without rounding.",
            "Search as the MSE observer does (both ends, some twenty fractions each), with the output's error.",
            "((fake_quantize(x, qp) - x) @ weight.T).square().sum() is what to make small.",
        ),
        output_range_solution,
    ),
}
