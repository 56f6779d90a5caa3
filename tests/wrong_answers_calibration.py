"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab import choose_qparams, fake_quantize
from quantlab.exercises.calibration import StreamingPercentile, clip_solution, overlap_solution, split_solution
from quantlab.observers import MSE, MinMax


def means_of_parts(x, scale, zero_point, qmin, qmax):
    codes = torch.round(x / scale) + zero_point
    error = (scale * (codes.clamp(qmin, qmax) - zero_point) - x) ** 2
    clipped = (codes < qmin) | (codes > qmax)
    return error[~clipped].mean(), error[clipped].mean()


def at_the_edges(x, scale, zero_point, qmin, qmax):
    """Takes every element on the last grid point for clipped."""
    codes = (torch.round(x / scale) + zero_point).clamp(qmin, qmax)
    error = (scale * (codes - zero_point) - x) ** 2
    clipped = (codes == qmin) | (codes == qmax)
    return error[~clipped].sum() / x.numel(), error[clipped].sum() / x.numel()


def upper_side_only(x, scale, zero_point, qmin, qmax):
    codes = torch.round(x / scale) + zero_point
    error = (scale * (codes.clamp(qmin, qmax) - zero_point) - x) ** 2
    clipped = codes > qmax
    return error[~clipped].sum() / x.numel(), error[clipped].sum() / x.numel()


def wrong_order(*arguments):
    return split_solution(*arguments)[::-1]


class KeepsEverything:
    def __init__(self, percentile):
        self.percentile, self.seen = percentile, []

    def update(self, x):
        self.seen.append(x.abs().flatten())

    def limit(self):
        return torch.quantile(torch.cat(self.seen), self.percentile / 100)


class LastBatch(KeepsEverything):
    def update(self, x):
        self.seen = [x.abs().flatten()]


class Averages:
    """The mean of the batches' percentiles."""

    def __init__(self, percentile):
        self.percentile, self.sum, self.count = percentile, 0.0, 0

    def update(self, x):
        self.sum, self.count = self.sum + torch.quantile(x.abs(), self.percentile / 100), self.count + 1

    def limit(self):
        return self.sum / self.count


class StopsWhenFull(KeepsEverything):
    def update(self, x):
        self.seen = [torch.cat([*self.seen, x.abs().flatten()])[:50_000]]


class FixedBins(StreamingPercentile):
    """Bins laid out for the first batch; what comes later and lies outside goes into the last one."""

    def update(self, x):
        x = x.abs().flatten()
        if self.width == 1e-30:
            self.width = max(x.max().item(), 50.0) / 4000
        self.counts += torch.bincount((x / self.width).long().clamp(max=4095), minlength=4096)


class Signed(StreamingPercentile):
    def update(self, x):
        super().update(x.clamp(min=0))


def by_position(calibration, test, length):
    count = min(len(calibration), len(test)) - length + 1
    same = [torch.equal(calibration[i : i + length], test[i : i + length]) for i in range(count)]
    return sum(same) / len(same)


def by_token(calibration, test, length):
    return torch.isin(test, calibration).float().mean()


def share_of_calibration(calibration, test, length):
    known = {tuple(w) for w in test.unfold(0, length, 1).tolist()}
    windows = [tuple(w) for w in calibration.unfold(0, length, 1).tolist()]
    return sum(w in known for w in windows) / len(windows)


def blocks_only(calibration, test, length):
    """Windows that do not overlap: a copy that begins between two of them is missed."""
    known = {tuple(w) for w in calibration.unfold(0, length, length).tolist()}
    windows = [tuple(w) for w in test.unfold(0, length, length).tolist()]
    return sum(w in known for w in windows) / len(windows)


def without_order(calibration, test, length):
    known = {tuple(sorted(w)) for w in calibration.unfold(0, length, 1).tolist()}
    windows = [tuple(sorted(w)) for w in test.unfold(0, length, 1).tolist()]
    return sum(w in known for w in windows) / len(windows)


def one_factor(x, weight, bits):
    """The best factor, but the same for both ends."""
    best = None
    for part in 2.0 ** (-torch.arange(25) / 4):
        qp = choose_qparams(part * x.min(), part * x.max(), qmin=0, qmax=2**bits - 1)
        error = ((fake_quantize(x, qp) - x) @ weight.T).square().sum()
        best = min(best or (error, part), (error, part))
    return best[1] * x.min(), best[1] * x.max()


def joined(calibration, test, length):
    """Texts of digits, which have no borders between tokens."""
    text = "".join(map(str, calibration.tolist()))
    found = ["".join(map(str, w)) in text for w in test.unfold(0, length, 1).tolist()]
    return sum(found) / len(found)


def distinct(calibration, test, length):
    known, asked = ({tuple(w) for w in t.unfold(0, length, 1).tolist()} for t in (calibration, test))
    return len(known & asked) / len(asked)


WRONG = {
    "2.1": [
        (means_of_parts, "not a mean over its own"),
        (at_the_edges, "is not clipped: only what was beyond"),
        (upper_side_only, "beyond qmin as well"),
        (wrong_order, "The order is rounding, clipping"),
        (lambda x, s, z, lo, hi: (0.0, ((x - x.clamp(s * (lo - z), s * (hi - z))) ** 2).mean()), "was expected"),
        (lambda x, s, z, lo, hi: split_solution(x, s, z, lo, hi)[0], "2 results"),
        (lambda x, s, z, lo, hi: [v * x.numel() for v in split_solution(x, s, z, lo, hi)], "divided by the number"),
        (lambda x, s, z, lo, hi: [v.sqrt() for v in split_solution(x, s, z, lo, hi)], "was expected"),
    ],
    "2.2": [
        (lambda x, bits: x.abs().max(), "times the least mean squared error"),
        (lambda x, bits: 3 * x.std(), "The best clip depends on the bits"),
        (lambda x, bits: x.abs().quantile(0.999), "times the least"),
        (lambda x, bits: 0.5, "times the least"),
        (lambda x, bits: -x.abs().max(), "a positive real number"),
        (lambda x, bits: clip_solution(x, 4), "depends on the bits"),
        (lambda x, bits: clip_solution(x.clamp(min=0), bits), "times the least"),
        (lambda x, bits: clip_solution(x, bits) * 2 ** (bits - 1), "times the least"),
        (lambda x, bits: (clip_solution(x, bits), 0.0), "one number"),
    ],
    "2.3": [
        (KeepsEverything, "Keep counts, not values"),
        (LastBatch, "not the first or last alone"),
        (StopsWhenFull, "Keep counts, not values"),
        (Averages, "An average of the batches' percentiles"),
        (FixedBins, "beyond your last bin"),
        (Signed, "by their size"),
        (lambda percentile: MinMax(), "no method limit"),
        (lambda: StreamingPercentile(99), "one argument, percentile"),
        (lambda percentile: StreamingPercentile(99), "percentile 50"),
    ],
    "2.4": [
        (by_position, "not the same place of it"),
        (by_token, "compare windows"),
        (share_of_calibration, "TEST's windows"),
        (blocks_only, "Windows overlap"),
        (without_order, "Order is what makes a window"),
        (joined, "was expected"),
        (distinct, "counts twice"),
        (lambda *texts: 100 * overlap_solution(*texts), "was expected"),
    ],
    "2.5": [
        (lambda x, w, bits: (x.min(), x.max()), "1.1 was asked for"),
        (lambda x, w, bits: MSE(bits=bits).update(x).min_max(), "hardly listens to the loud columns"),
        (lambda x, w, bits: (-0.2, 0.2), "1.1 was asked for"),
        (lambda x, w, bits: (x.max(), x.min()), "low must lie below high"),
        (lambda x, w, bits: (-2 * x.abs().median(), 2 * x.abs().median()), "1.1 was asked for"),
        (lambda x, w, bits: (-x.std(), x.std()), "1.1 was asked for"),
        (one_factor, "each end a factor of its own"),
        (lambda x, w, bits: x.max(), "Return two numbers"),
    ],
}
