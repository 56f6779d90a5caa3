"""Observers: what range should a grid cover? Each watches a stream of batches and then names a minimum and a maximum.

`update(x)` takes the next batch and returns the observer; `min_max()` gives what choose_qparams asks for.
"""

import math
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams
from quantlab.arguments import check_int, check_number, check_real
from quantlab.granularity import code_range

_CHUNK = 2**18  # values turned into float64 at a time: 2 MB, which stay in the cache


class _Observer:
    """What all five share: a batch is refused whole or taken whole, and no range is made up before any data."""

    _empty = True

    def update(self, x: Tensor) -> Self:
        """Take the next batch, of any shape and float dtype, and return the observer.

        Raises: ValueError if x is not floating point, is empty, or holds NaN, infinity or a number that float32
        cannot hold; the observer is then as it was.
        """
        x = check_real(x).detach()
        low, high = x.amin().item(), x.amax().item()
        self._take(x, low, high)
        self._empty = False
        return self

    def min_max(self) -> tuple[Tensor, Tensor]:
        """The range to cover: two float32 scalars. Raises ValueError before any data."""
        if self._empty:
            raise ValueError(f"{type(self).__name__} has seen no data; call update(x) first")
        low, high = self._range()
        return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)


class MinMax(_Observer):
    """The smallest and the largest value seen. Nothing that was seen is clipped.

    >>> [bound.item() for bound in MinMax().update(torch.tensor([1.0, -2.0])).update(torch.ones(3)).min_max()]
    [-2.0, 1.0]
    """

    def __init__(self):
        self._low, self._high = math.inf, -math.inf

    def _take(self, x: Tensor, low: float, high: float) -> None:
        self._low, self._high = min(self._low, low), max(self._high, high)

    def _range(self) -> tuple[float, float]:
        return self._low, self._high


class MovingAverage(_Observer):
    """A moving average of each batch's minimum and maximum, so it depends on how the stream is cut into batches.

        low ← low + momentum · (min of the batch − low)          Jacob et al. 2018, sec. 3.1; the same for high

    The first batch sets both. momentum 1 keeps the last batch alone. torch.ao's MovingAverageMinMaxObserver has
    this rule with 0.01, made for the thousands of batches of a training run.

    Raises: ValueError unless 0 < momentum <= 1.

    >>> observer = MovingAverage(momentum=0.5).update(torch.tensor([0.0, 8.0])).update(torch.tensor([0.0, 4.0]))
    >>> observer.min_max()[1].item()
    6.0
    """

    def __init__(self, *, momentum: float = 0.1):
        self.momentum = check_number(momentum, "momentum", above=0, high=1)

    def _take(self, x: Tensor, low: float, high: float) -> None:
        if self._empty:
            self._low, self._high = low, high
        self._low += self.momentum * (low - self._low)
        self._high += self.momentum * (high - self._high)

    def _range(self) -> tuple[float, float]:
        return self._low, self._high


class Histogram(_Observer):
    """Counts of all values seen, in bins [i·width, (i+1)·width), the same however the stream was cut into batches.

    width is 2**exponent, and i runs from -BINS to BINS - 1. The largest |x| alone decides on the exponent; when it
    grows, neighbouring bins are merged in pairs, which is exact because all edges are multiples of the width.
    """

    BINS = 4096  # on each side of 0
    # Width at which the smallest float32, 2**-149, has the last bin: nothing can ask for a finer one.
    _FINEST = -149 - 11

    def __init__(self):
        self.counts = torch.zeros(2 * self.BINS, dtype=torch.int64)
        self.exponent = self._FINEST
        self.low, self.high = math.inf, -math.inf  # of all values seen, exactly

    @property
    def width(self) -> float:
        """Real units a bin."""
        return 2.0**self.exponent

    def edges(self) -> Tensor:
        """The 2·BINS + 1 edges of the bins, float64."""
        return torch.arange(-self.BINS, self.BINS + 1, dtype=torch.float64) * self.width

    def _take(self, x: Tensor, low: float, high: float) -> None:
        if largest := max(-low, high):  # frexp gives (f, e) with largest < 2**e = BINS · 2**(e - 12)
            self._widen(math.frexp(largest)[1] - 12)
        for part in x.flatten().split(_CHUNK):
            part = part.double()
            index = torch.floor(part / self.width).long()
            index[part < 0] = index[part < 0].clamp(max=-1)  # where the quotient underflowed to -0.0
            self.counts += torch.bincount(index + self.BINS, minlength=2 * self.BINS).cpu()
        self.low, self.high = min(self.low, low), max(self.high, high)

    def _widen(self, exponent: int) -> None:
        """Merge bins until they are 2**exponent wide; never the other way."""
        if exponent <= self.exponent:
            return
        shift = min(exponent - self.exponent, 12)  # by 12 octaves all has come down to the bins -1 and 0
        index = (torch.arange(-self.BINS, self.BINS) >> shift) + self.BINS  # >> rounds down, also below 0
        self.counts = torch.zeros_like(self.counts).index_add_(0, index, self.counts)
        self.exponent = exponent


class Percentile(Histogram):
    """The range that leaves out the same share of the values at each end, (100 - percentile) / 2 percent.

    Of n values, floor(n · (100 - percentile) / 200) at each end may lie outside. The bounds are the outer edges of
    the bins in which the outermost values inside lie: at most one bin (2**-11 of the largest |x|) too wide, and
    never wider than what was seen.

    Raises: ValueError unless 0 < percentile <= 100.

    >>> observer = Percentile(percentile=98).update(torch.cat([torch.rand(99), torch.tensor([1000.0])]))
    >>> observer.min_max()[1].item() < 2
    True
    """

    def __init__(self, *, percentile: float = 99.9):
        super().__init__()
        self.percentile = check_number(percentile, "percentile", above=0, high=100)

    def _range(self) -> tuple[float, float]:
        below = self.counts.cumsum(0)
        count = int(below[-1])
        # As a fraction: 100 - 99.9 in binary is a little less than 0.1, and of 2000 values none would be left out.
        cut = int(count * (100 - Fraction(str(self.percentile))) / 200)
        first = int((below <= cut).sum())
        last = int((below < count - cut).sum())
        edges = self.edges()
        return max(self.low, edges[first].item()), min(self.high, edges[last + 1].item())


class MSE(Histogram):
    """The range whose grid has the least expected squared error, rounding and clipping together.

    Candidates: (f·low, g·high) with low <= 0 <= high the range seen, widened to hold 0, and f, g among the 57
    fractions 2**(-j/8), j = 0..56, from 1 down to 1/128; symmetric=True has f = g. The grid of each is that of
    choose_qparams with the codes of `bits`; the values of a bin count as spread evenly over it. The root of the
    squared error is then within two bin widths of the best candidate's, whatever the data.

    Raises: ValueError unless bits is 1..8 (2..8 if symmetric).

    >>> x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    >>> low, high = MSE(bits=2, symmetric=True).update(x).min_max()
    >>> bool(low > x.min() / 2), bool(high < x.max() / 2)
    (True, True)
    """

    FRACTIONS = 2.0 ** (-torch.arange(57, dtype=torch.float32) / 8)

    def __init__(self, *, bits: int = 8, symmetric: bool = False):
        super().__init__()
        self.qmin, self.qmax = code_range(bits, symmetric=symmetric)
        self.symmetric = symmetric

    def candidates(self) -> tuple[Tensor, Tensor]:
        """The lows and the highs tried, float32, (candidates, 1)."""
        lows, highs = self.FRACTIONS * min(self.low, 0.0), self.FRACTIONS * max(self.high, 0.0)
        if not self.symmetric:  # all pairs; a side without values has one bound, 0
            lows, highs = (t.unique() for t in (lows, highs))
            lows, highs = (t.flatten() for t in torch.meshgrid(lows, highs, indexing="ij"))
        return lows[:, None], highs[:, None]

    def expected_error(self, qp: QParams) -> Tensor:
        """The mean squared error of each grid over the histogram, float64; scales and zero points (grids, 1).

        All values between two borders go to one point c, and cost ∫x² - 2c ∫x + c² ∫1 together.
        """
        points = qp.scale.double() * (torch.arange(qp.qmin, qp.qmax + 1) - qp.zero_point)  # (grids, codes)
        middle, (left, right) = (points[:, 1:] + points[:, :-1]) / 2, self.edges()[[0, -1]]
        borders = torch.nn.functional.pad(middle.clamp(left, right), (1, 1))
        borders[:, 0], borders[:, -1] = left, right
        mass, sums, squares = (moment.diff(dim=1) for moment in self._moments(borders))
        return (squares - 2 * points * sums + points.square() * mass).sum(1) / self.counts.sum()

    def _moments(self, x: Tensor) -> list[Tensor]:
        """∫1, ∫t and ∫t² over the values t seen up to x; those of a bin are spread evenly over it."""
        edges, density = self.edges(), self.counts.float() / self.width
        bins = torch.floor(x / self.width).long().add_(self.BINS).clamp_(max=2 * self.BINS - 1)
        moments = []
        for power in (1, 2, 3):
            primitive = edges**power / power
            before = torch.nn.functional.pad((density * primitive.diff()).cumsum(0), (1, 0))
            moments.append(before[bins] + density[bins] * (x**power / power - primitive[bins]))
        return moments

    def _range(self) -> tuple[float, float]:
        lows, highs = self.candidates()
        errors = []
        for low, high in zip(lows.split(512), highs.split(512), strict=True):  # of at most 256 codes each
            qp = choose_qparams(low, high, qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric)
            errors.append(self.expected_error(qp))
        best = int(torch.cat(errors).argmin())
        return lows[best].item(), highs[best].item()


class Entropy(Histogram):
    """[-t, t] within what was seen, where t loses least information about |x|, as a KL divergence counts it.

    For each t = i bins, from 2**(bits-1) bins on: P is the histogram of |x| below t with all that lies beyond
    added to its last bin. Q is the same histogram without the rest, its i bins merged into 2**(bits-1) levels
    (bin j into level floor(j · levels / i)), the mass of each level spread evenly over its non-empty bins.
    The t with the least KL(P || Q) wins, the widest among equals; where Q is 0 and P is not, KL is infinite.

    Source: Migacz, "8-bit inference with TensorRT", GTC 2017. Differences: the talk has 2048 bins and the threshold
    (i + 0.5) bins (here 2048 to 4096, and i), and leaves open what happens when levels does not divide i.

    Raises: ValueError unless bits is 2..8.

    >>> low, high = Entropy().update(torch.randn(10_000, generator=torch.Generator().manual_seed(0))).min_max()
    >>> bool(-5 < low < -2), bool(2 < high < 5)
    (True, True)
    """

    def __init__(self, *, bits: int = 8):
        super().__init__()
        self.levels = 2 ** (check_int(bits, "bits", 2, 8) - 1)

    def divergences(self) -> tuple[Tensor, Tensor]:
        """The candidates i, in bins, and KL(P || Q) of each, in nats, float64."""
        counts = (self.counts[self.BINS :] + self.counts[: self.BINS].flip(0)).double()  # of |x|
        used = int(counts.nonzero().max()) + 1
        i = torch.arange(self.levels, max(used, self.levels) + 1)

        def below(t: Tensor) -> Tensor:  # sums over the bins below each edge
            return torch.cat([t.new_zeros(1), t.cumsum(0)])

        mass, filled, plogp = below(counts), below((counts > 0).double()), below(torch.xlogy(counts, counts))
        ends = -(-torch.arange(self.levels + 1) * i[:, None] // self.levels)  # (candidates, levels + 1)
        of_level, filled = mass[ends].diff(dim=1), filled[ends].diff(dim=1)
        rest, last = mass[-1] - mass[i], counts[i - 1]
        # Σ P log P − Σ P log Q, in counts: within a level Q is one number, so each needs one term.
        p = plogp[i - 1] + torch.xlogy(last + rest, last + rest)
        q = torch.xlogy(of_level, of_level / filled.clamp(min=1)).sum(1)
        q += torch.xlogy(rest, of_level[:, -1] / filled[:, -1].clamp(min=1))
        kl = (p - q) / mass[-1] - torch.log(mass[-1] / mass[i])
        return i, kl.masked_fill((last == 0) & (rest > 0) | (mass[i] == 0), math.inf)

    def _range(self) -> tuple[float, float]:
        i, kl = self.divergences()
        threshold = i[kl <= kl.min() + 1e-9].max().item() * self.width  # equal but for rounding: the widest
        return max(self.low, -threshold), min(self.high, threshold)
