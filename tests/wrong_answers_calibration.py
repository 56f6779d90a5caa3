"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import torch

from quantlab.exercises.calibration import StreamingPercentile, split_solution
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


WRONG = {
    "2.1": [
        (means_of_parts, "must add up"),
        (at_the_edges, "on the wrong side"),
        (upper_side_only, "on either side"),
        (wrong_order, "on the wrong side"),
        (lambda x, s, z, lo, hi: (0.0, ((x - x.clamp(s * (lo - z), s * (hi - z))) ** 2).mean()), "must add up"),
    ],
    "2.2": [
        (lambda x, bits: x.abs().max(), "times the least mean squared error"),
        (lambda x, bits: 3 * x.std(), "Does the best clip depend on the bits"),
        (lambda x, bits: x.abs().quantile(0.999), "times the least"),
        (lambda x, bits: 0.5, "times the least"),
        (lambda x, bits: -x.abs().max(), "a positive real number"),
    ],
    "2.3": [
        (KeepsEverything, "Keep counts, not values"),
        (LastBatch, "every batch counts"),
        (StopsWhenFull, "every batch counts"),
        (Averages, "batch"),
        (FixedBins, "beyond your last bin"),
        (Signed, "by their size"),
        (lambda percentile: MinMax(), "AttributeError"),
    ],
    "2.4": [
        (by_position, "may stand and begin anywhere"),
        (by_token, "no window of 8"),
        (share_of_calibration, "the share should be"),
        (blocks_only, "the share should be"),
        (without_order, "Order is what makes a window"),
    ],
    "2.5": [
        (lambda x, w, bits: (x.min(), x.max()), "the target is 0.5"),
        (lambda x, w, bits: MSE(bits=bits).update(x).min_max(), "Which columns of the weight"),
        (lambda x, w, bits: (-0.2, 0.2), "the target is 0.5"),
        (lambda x, w, bits: (x.max(), x.min()), "ValueError"),
    ],
}
