"""Observers: against their definitions as plain loops over all data, however the stream is cut into batches."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import choose_qparams, fake_quantize, mse
from quantlab.observers import MSE, Entropy, Histogram, MinMax, MovingAverage, Percentile

INDEPENDENT = {  # of how the stream is cut
    "minmax": MinMax,
    "percentile": Percentile,
    "mse": lambda: MSE(bits=4),
    "mse, symmetric": lambda: MSE(bits=3, symmetric=True),
    "entropy": lambda: Entropy(bits=4),
}
ALL = INDEPENDENT | {"moving average": MovingAverage}
FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def normal(count=20_000, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def heavy(count=20_000):
    """Many values near 0 and a few far out."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(count, generator=random) / torch.rand(count, generator=random).clamp(min=1e-3).sqrt()


STREAMS = {
    "normal": normal(),
    "heavy tails": heavy(),
    "relu": normal().relu(),
    "uniform": torch.rand(4000, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "far from zero": normal() * 0.1 + 10,
    "negative": -heavy().abs() - 0.5,
    "two humps": torch.cat([normal() * 0.1 - 1, normal(seed=1) * 0.3 + 3]),
    "one outlier": torch.cat([normal(), torch.tensor([40.0])]),
}


@pytest.fixture(params=STREAMS)
def stream(request):
    return STREAMS[request.param]


def cut(x, sizes):
    """The stream in batches of these sizes, in turn."""
    parts, i, k = [], 0, 0
    while i < len(x):
        parts.append(x[i : i + sizes[k % len(sizes)]])
        i, k = i + sizes[k % len(sizes)], k + 1
    return parts


def watch(observer, batches):
    for batch in batches:
        observer.update(batch)
    return observer


def bounds(observer):
    return tuple(bound.item() for bound in observer.min_max())


# --- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_no_range_before_data(make):
    with pytest.raises(ValueError, match="has seen no data; call update"):
        make().min_max()


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (torch.tensor([1.0, math.nan]), "must be finite"),
        (torch.tensor([1.0, math.inf]), "must be finite"),
        (torch.empty(0, 3), "is empty"),
        (torch.tensor([1, 2]), "must be floating point"),
        ([1.0], "must be a tensor"),
        (torch.tensor([1e300], dtype=torch.float64), "must fit into float32"),
        (torch.tensor([-1e300], dtype=torch.float64), "must fit into float32"),
    ],
)
def test_a_bad_batch_is_refused_and_changes_nothing(make, bad, told):
    observer = make()
    with pytest.raises(ValueError, match=told):
        observer.update(bad)
    with pytest.raises(ValueError, match="no data"):
        observer.min_max()
    observer.update(normal(100))
    before = bounds(observer)
    with pytest.raises(ValueError, match=told):
        observer.update(bad)
    assert bounds(observer) == before


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_what_comes_out_suits_choose_qparams(make, stream):
    observer, stream = make(), stream[-2000:]
    assert observer.update(stream) is observer
    low, high = observer.min_max()
    assert low.dtype == high.dtype == torch.float32
    assert low.shape == high.shape == ()
    assert low <= high
    assert min(stream.min(), 0) <= low
    assert high <= max(stream.max(), 0)
    assert torch.isfinite(choose_qparams(low, high, qmin=0, qmax=15).scale)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_batches_may_have_any_shape_and_layout_and_are_not_changed(make):
    x, grad = normal(240), normal(240).requires_grad_()
    whole, before = bounds(make().update(x)), x.clone()
    for batch in (x.view(2, 3, 40), x.view(24, 10).T, x.view(1, 240)[:, :], grad):
        assert bounds(make().update(batch)) == whole
    assert torch.equal(x, before)
    assert len(bounds(make().update(x[0]))) == 2  # a scalar


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_float_dtype(make, dtype):
    x = normal(1000).to(dtype)
    assert bounds(make().update(x)) == pytest.approx(bounds(make().update(x.float())), rel=1e-6)


@pytest.mark.parametrize("make", INDEPENDENT.values(), ids=INDEPENDENT)
def test_the_cut_into_batches_does_not_matter(make, stream):
    x = stream[-2000:]  # the outlier stands last
    whole = bounds(make().update(x))
    for sizes in ([1000], [1, 7, 400]):
        assert bounds(watch(make(), cut(x, sizes))) == whole


@pytest.mark.parametrize("make", [MinMax, MovingAverage, Percentile, Entropy])
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-44, -1e-44, 3.4e38, -3.4e38])
@pytest.mark.parametrize("count", [1, 300])
def test_the_range_of_a_constant_ends_there(make, value, count):
    x = torch.full((count,), value)
    low, high = bounds(watch(make(), [x, x]))
    exact = x[0].item()
    assert min(low, 0) == pytest.approx(min(exact, 0), rel=1e-6, abs=0)
    assert max(high, 0) == pytest.approx(max(exact, 0), rel=1e-6, abs=0)


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-44, -1e-44, 3.4e38, -3.4e38])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_brings_a_constant_back(value, symmetric):
    x = torch.full((300,), value, dtype=torch.float64)
    low, high = MSE(bits=8, symmetric=symmetric).update(x).min_max()
    back = fake_quantize(x, choose_qparams(low, high, qmin=-128, qmax=127, symmetric=symmetric))
    assert (back - x).abs().max() <= abs(value) / 250 + 1.2e-38  # no scale is below the least normal float32


# --- MinMax and MovingAverage -----------------------------------------------------------------------------------


def test_minmax_is_the_minimum_and_the_maximum(stream):
    assert bounds(watch(MinMax(), cut(stream, [999]))) == (stream.min().item(), stream.max().item())


@pytest.mark.parametrize("momentum", [1.0, 0.5, 0.1, 0.01])
def test_moving_average_is_its_recurrence(momentum):
    batches = cut(heavy(), [100, 250])
    low, high = batches[0].min().item(), batches[0].max().item()
    for batch in batches[1:]:
        low = (1 - momentum) * low + momentum * batch.min().item()
        high = (1 - momentum) * high + momentum * batch.max().item()
    assert bounds(watch(MovingAverage(momentum=momentum), batches)) == pytest.approx((low, high), rel=1e-6)


def test_minmax_and_moving_average_equal_torchs_observers():
    torchs = pytest.importorskip("torch.ao.quantization.observer")
    batches = cut(heavy(), [100, 250])
    pairs = (
        (MinMax(), torchs.MinMaxObserver()),
        (MovingAverage(momentum=0.01), torchs.MovingAverageMinMaxObserver(averaging_constant=0.01)),
    )
    for ours, theirs in pairs:
        watch(ours, batches)
        for batch in batches:
            theirs(batch)
        assert bounds(ours) == pytest.approx((theirs.min_val.item(), theirs.max_val.item()), rel=1e-5)


@pytest.mark.parametrize("momentum", [0, -0.1, 1.1, math.nan])
def test_momentum_is_checked(momentum):
    with pytest.raises(ValueError, match="momentum must be"):
        MovingAverage(momentum=momentum)


# --- the histogram ----------------------------------------------------------------------------------------------


def counts_by_hand(values, exponent):
    """floor(value / 2**exponent) of each value, in exact fractions: {bin: how many}."""
    found = {}
    for value in values:
        index = math.floor(Fraction(value) / Fraction(2) ** exponent)
        found[index] = found.get(index, 0) + 1
    return found


def exponent_by_hand(values):
    """The finest bins whose outermost ones hold the largest |x|, but none finer than 2**-160."""
    largest, exponent = max(abs(Fraction(v)) for v in values), -160
    while largest >= 4096 * Fraction(2) ** exponent:
        exponent += 1
    return exponent


def as_dict(histogram):
    return {i - 4096: c for i, c in enumerate(histogram.counts.tolist()) if c}


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOAT32, min_size=1, max_size=30), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_the_histogram_is_that_of_all_data(values, sizes):
    x = torch.tensor(values, dtype=torch.float32)
    histogram = watch(Histogram(), cut(x, sizes))
    assert histogram.exponent == exponent_by_hand(values)
    assert as_dict(histogram) == counts_by_hand(values, histogram.exponent)
    assert (histogram.low, histogram.high) == (min(values), max(values))


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOAT32, min_size=1, max_size=30), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_any_data_in_any_batches(values, sizes):
    x = torch.tensor(values, dtype=torch.float32)
    for make in INDEPENDENT.values():
        low, high = bounds(watch(make(), cut(x, sizes)))
        assert (low, high) == bounds(make().update(x))
        assert min(min(values), 0) <= low <= high <= max(max(values), 0)


@pytest.mark.parametrize("first", [-1e-44, -1e-300, 1e-300, 1e-20, -1.0])
@pytest.mark.parametrize("second", [3e38, -3e38, 1e-10])
def test_growth_by_many_octaves_at_once(first, second):
    values = [first, -first, second]
    x = torch.tensor(values, dtype=torch.float64)
    histogram = watch(Histogram(), [x[:1], x[1:2], x[2:]])
    assert torch.equal(histogram.counts, Histogram().update(x).counts)
    assert as_dict(histogram) == counts_by_hand(values, histogram.exponent)


def test_chunks_of_a_large_batch_are_counted_once():
    x = heavy(3 * 2**18 + 5)
    histogram = Histogram().update(x)
    assert int(histogram.counts.sum()) == len(x)
    expected = np.histogram(x.double().numpy(), bins=histogram.edges().numpy())[0]
    assert histogram.counts.tolist() == expected.tolist()


def test_memory_does_not_grow_with_the_stream():
    histogram = Histogram()
    for scale in (1, 1e-3, 1e5, 7.0):
        histogram.update(normal(1000) * scale)
    assert histogram.counts.shape == (8192,)
    held = [v for v in vars(histogram).values() if isinstance(v, torch.Tensor)]
    assert sum(v.numel() for v in held) == 8192


# --- Percentile -------------------------------------------------------------------------------------------------


def percentile_by_hand(x, percentile):
    """Sort, and leave out the same number at each end."""
    values = sorted(x.tolist())
    out = math.floor(len(values) * (100 - Fraction(str(percentile))) / 200)
    return values[out], values[len(values) - 1 - out]


@pytest.mark.parametrize("percentile", [100, 99.99, 99.9, 99, 50, 1])
def test_percentile_is_within_one_bin_of_the_sorted_values(percentile, stream):
    observer = watch(Percentile(percentile=percentile), cut(stream, [777]))
    (low, high), (exact_low, exact_high) = bounds(observer), percentile_by_hand(stream, percentile)
    assert exact_low - observer.width <= low <= exact_low
    assert exact_high <= high <= exact_high + observer.width


@settings(max_examples=100, deadline=None)
@given(st.lists(FLOAT32, min_size=1, max_size=40), st.sampled_from([100, 99.9, 95, 80, 50]))
def test_percentile_of_any_data(values, percentile):
    x = torch.tensor(values, dtype=torch.float32)
    observer = Percentile(percentile=percentile).update(x)
    (low, high), (exact_low, exact_high) = bounds(observer), percentile_by_hand(x, percentile)
    assert exact_low - observer.width <= low <= exact_low <= exact_high <= high <= exact_high + observer.width


def test_percentile_is_numpys_quantile():
    x = heavy()
    low, high = bounds(observer := Percentile(percentile=98).update(x))
    expected = np.quantile(x.numpy(), [0.01, 0.99], method="inverted_cdf")
    assert abs(high - expected[1]) <= observer.width
    assert abs(low - expected[0]) <= 2 * observer.width  # ranks at the lower end differ by one value


def test_percentile_counts_in_decimal():
    x = torch.cat([torch.zeros(1998), torch.tensor([-1.0, 1.0])])
    low, high = bounds(Percentile(percentile=99.9).update(x))  # 2000 · 0.05 % = 1 value at each end
    assert -0.001 < low <= high < 0.001


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_percentile_is_checked(percentile):
    with pytest.raises(ValueError, match="percentile must be"):
        Percentile(percentile=percentile)


# --- MSE --------------------------------------------------------------------------------------------------------


def errors_by_hand(x, bits, symmetric):
    """The mean squared error over all data of each candidate of the docstring: {(low, high): error}."""
    least, largest = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    fractions = [2 ** (-j / 8) for j in range(57)]
    half, found = 2 ** (bits - 1), {}
    for f in fractions:  # one row for each g; a side without values has one bound, 0
        highs = sorted({g * largest for g in ([f] if symmetric else fractions)})
        low, high = torch.full((len(highs), 1), f * least), torch.tensor(highs)[:, None]
        qp = choose_qparams(low, high, qmin=-half, qmax=half - 1, symmetric=symmetric)
        errors = (fake_quantize(x.flatten().expand(len(low), -1), qp) - x.flatten()).double().square().mean(1)
        found |= zip(zip(low[:, 0].tolist(), high[:, 0].tolist(), strict=True), errors.tolist(), strict=True)
        if least == 0 and not symmetric:
            break
    return found


def true_error(x, low, high, bits, symmetric):
    half = 2 ** (bits - 1)
    qp = choose_qparams(torch.tensor(low), torch.tensor(high), qmin=-half, qmax=half - 1, symmetric=symmetric)
    return mse(x, fake_quantize(x, qp))


@pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (4, False), (2, False), (8, True), (4, True), (2, True)])
def test_mse_is_within_two_percent_of_the_best_candidate(bits, symmetric, stream):
    x = stream[-2000:]  # the outlier stands last
    observer = watch(MSE(bits=bits, symmetric=symmetric), cut(x, [500]))
    best = min(errors_by_hand(x, bits, symmetric).values())
    assert true_error(x, *bounds(observer), bits, symmetric) <= 1.02 * best


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=20), st.sampled_from([1, 2, 4, 8]))
def test_mse_is_within_two_bins_of_the_best_candidate_whatever_the_data(values, bits):
    """An error moves by no more than its value does, and counting by bins moves no value by more than one."""
    x, symmetric = torch.tensor(values, dtype=torch.float32), bits == 2
    observer = MSE(bits=bits, symmetric=symmetric).update(x)
    best = min(errors_by_hand(x, bits, symmetric).values())
    slack = 2 * observer.width + 1e-6 * max(abs(v) for v in values)  # float32 arithmetic
    assert true_error(x, *bounds(observer), bits, symmetric) ** 0.5 <= best**0.5 + slack


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["normal", "relu", "negative", "far from zero"])
def test_mse_tries_the_candidates_of_its_docstring(name, symmetric):
    x = STREAMS[name][:100]
    lows, highs = MSE(bits=4, symmetric=symmetric).update(x).candidates()
    found = set(zip(lows.flatten().tolist(), highs.flatten().tolist(), strict=True))
    expected = errors_by_hand(x, 4, symmetric)
    assert len(found) == len(expected)
    assert all(min(abs(a - c) + abs(b - d) for c, d in expected) < 1e-5 for a, b in list(found)[::50])
    assert min(map(abs, sum(found, ()))) == pytest.approx(min(map(abs, sum(expected, ()))), rel=1e-5)


def test_expected_error_is_the_integral_over_each_bin():
    """Against the same integral as a sum over 500 points of each bin."""
    observer = MSE(bits=3).update(torch.tensor([-3.0, -0.2, 0.1, 0.3, 2.9, 7.0]))
    qp = choose_qparams(torch.tensor([[-2.0]]), torch.tensor([[4.0]]), qmin=-4, qmax=3)
    fine = (torch.arange(500, dtype=torch.float64) + 0.5) / 500 * observer.width
    points = torch.cat([edge + fine for edge, c in zip(observer.edges(), observer.counts, strict=False) if c])
    by_sum = (fake_quantize(points[None], qp) - points).square().mean().item()
    assert observer.expected_error(qp).item() == pytest.approx(by_sum, rel=1e-4)


def test_mse_at_one_bit_and_with_one_side_only():
    low, high = bounds(MSE(bits=1).update(normal().abs()))
    assert low == 0
    assert 1 < high < 2.5


@pytest.mark.parametrize(("bits", "symmetric"), [(0, False), (9, False), (1, True), (2.5, False), ("4", False)])
def test_mse_bits_are_checked(bits, symmetric):
    with pytest.raises(ValueError, match="bits must be"):
        MSE(bits=bits, symmetric=symmetric)


# --- Entropy ----------------------------------------------------------------------------------------------------


def divergences_by_hand(counts, levels):
    """KL(P || Q) for each number of bins kept, as the talk tells it: {i: nats}. counts are those of |x|."""
    full, found = np.flatnonzero(counts), {}  # empty bins have no part in P or Q
    for i in range(levels, max(full[-1] + 1, levels) + 1):
        kept = full[full < i]
        raw = counts[kept].astype(float)
        rest = counts.sum() - raw.sum()
        if len(kept) == 0 or (rest > 0 and kept[-1] != i - 1):  # P's last bin holds the rest, Q's is empty
            found[i] = math.inf
            continue
        p = raw.copy()
        p[-1] += rest
        level = kept * levels // i
        q = (np.bincount(level, raw) / np.maximum(np.bincount(level), 1))[level]
        p, q = p / p.sum(), q / q.sum()
        found[i] = (p * np.log(p / q)).sum()
    return found


def folded(histogram):
    counts = histogram.counts.numpy()
    return counts[4096:] + counts[:4096][::-1]


@pytest.mark.parametrize("bits", [8, 3])
def test_entropy_is_its_loop_over_the_same_histogram(bits, stream):
    observer = watch(Entropy(bits=bits), cut(stream, [999]))
    expected = divergences_by_hand(folded(observer), 2 ** (bits - 1))
    i, kl = observer.divergences()
    assert i.tolist() == list(expected)
    assert np.allclose(kl.numpy(), list(expected.values()), rtol=1e-9, atol=1e-9)
    least = min(expected.values())
    best = max(k for k, v in expected.items() if v <= least + 1e-9)
    low, high = bounds(observer)
    assert max(-low, high) == pytest.approx(min(best * observer.width, stream.abs().max().item()), rel=1e-6)


@pytest.mark.parametrize("name", ["normal", "heavy tails", "one outlier"])
def test_entropy_is_about_that_of_the_raw_data(name):
    """The talk's own 2048 bins from 0 to the largest |x|; other bins, so a threshold near by."""
    x = STREAMS[name]
    counts, edges = np.histogram(x.abs().numpy(), bins=2048, range=(0, x.abs().max().item()))
    found = divergences_by_hand(counts, 128)
    plain = edges[min(found, key=found.get)]
    assert max(map(abs, bounds(Entropy().update(x)))) == pytest.approx(plain, rel=0.15)


@settings(max_examples=12, deadline=None)
@given(st.lists(FLOAT32, min_size=1, max_size=30), st.sampled_from([2, 4]))
def test_entropy_of_any_data_is_its_loop(values, bits):
    observer = Entropy(bits=bits).update(torch.tensor(values, dtype=torch.float32))
    expected = divergences_by_hand(folded(observer), 2 ** (bits - 1))
    assert np.allclose(observer.divergences()[1].numpy(), list(expected.values()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_entropy_bits_are_checked(bits):
    with pytest.raises(ValueError, match="bits must be"):
        Entropy(bits=bits)
