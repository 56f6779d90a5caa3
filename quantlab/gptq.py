"""GPTQ: round a weight column by column and let the columns still to come absorb the error.

Frantar, Ashkboos, Hoefler, Alistarh 2022 (arXiv 2210.17323). Notation: W (out, in) is the weight,
X (tokens, in) its input, H = 2/tokens XᵀX (in, in). GPTQ lowers ‖XWᵀ - XQᵀ‖², not ‖W - Q‖².
"""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams
from quantlab.arguments import check_int, check_real
from quantlab.granularity import QTensor, code_range, rows_or_groups

BLOCK = 128  # columns that are finished before the rest hears of their error; any size gives the same result


class Hessian:
    """H = 2/tokens XᵀX of a layer's input, summed up batch by batch. Layers that share an input share one."""

    def __init__(self, in_features: int):
        self.in_features = check_int(in_features, "in_features", 1)
        self.tokens = 0
        self._sum: Tensor | None = None  # XᵀX, float64, on the device of the inputs
        self._abs_sum: Tensor | None = None  # Σ|x| of each feature, float64
        self._factors: dict = {}

    def add(self, x: Tensor) -> "Hessian":
        """Count in a batch of inputs, (..., in_features). Returns self, so calls can be chained."""
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            check_real(x, "the input of a Hessian")  # says what is wrong
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"need inputs of {self.in_features} features, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.in_features)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        product = rows.T @ rows
        if not torch.isfinite(product.diagonal()).all():  # Σx²: no entry of XᵀX is larger
            check_real(x, "the input of a Hessian")
            raise ValueError(f"inputs as large as {rows.abs().max():.1e} overflow XᵀX; scale them down")
        if self._sum is None:
            shape = (self.in_features, self.in_features)
            self._sum = torch.zeros(shape, dtype=torch.float64, device=x.device)
            self._abs_sum = torch.zeros(self.in_features, dtype=torch.float64, device=x.device)
        self._sum += product
        self._abs_sum += rows.abs().sum(0, dtype=torch.float64)
        self.tokens += len(rows)
        self._factors.clear()
        return self

    @property
    def matrix(self) -> Tensor:
        """H, (in_features, in_features), float64. Raises ValueError before the first add."""
        if self._sum is None:
            raise ValueError("this Hessian has seen no inputs; call add(x) first")
        return self._sum * (2.0 / self.tokens)

    @property
    def mean_abs(self) -> Tensor:
        """mean |x| of each input feature, (in_features,), float64: what AWQ's scales come from."""
        if self._abs_sum is None:
            raise ValueError("this Hessian has seen no inputs; call add(x) first")
        return self._abs_sum / self.tokens

    def factor(self, *, act_order: bool, damping: float) -> "Factor":
        """The factorization that gptq_quantize works with, computed once for all layers that share this input."""
        key = (act_order, damping)
        if key not in self._factors:
            self._factors[key] = _factorize(self.matrix, act_order, damping)
        return self._factors[key]

    def output_error(self, weight: Tensor, weight_hat: Tensor) -> float:
        """‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖², without X: both are traces with H."""

        for w in (weight, weight_hat):
            check_weight(w, self)
        if weight.shape != weight_hat.shape:
            raise ValueError(f"need two weights of one shape, got {tuple(weight.shape)}, {tuple(weight_hat.shape)}")

        lost, whole = self.energy(weight - weight_hat), self.energy(weight)
        return (lost / whole.clamp(min=torch.finfo(torch.float64).tiny)).item()

    def energy(self, w: Tensor) -> Tensor:
        """‖XWᵀ‖² / tokens · 2 = tr(W H Wᵀ), float64."""
        if self._sum is None:
            raise ValueError("this Hessian has seen no inputs; call add(x) first")
        w = w.detach().double()
        return ((w @ self._sum) * w).sum() * (2.0 / self.tokens)


@dataclass(frozen=True)
class Factor:
    """H (columns in `order`, damped) = R Rᵀ with R upper triangular. Then U = R⁻¹ is the paper's Cholesky of H⁻¹."""

    R: Tensor  # (in, in), float64
    order: Tensor | None  # column order, most important first; None: as they are
    damping: float  # the fraction of mean(diag H) that was added in the end


def factorize(H: Tensor, *, act_order: bool = False, damping: float = 0.01) -> Factor:
    """One Cholesky of H read backwards, in place of the paper's Cholesky, inverse, Cholesky.

    Damping adds damping * mean(diag H) to the diagonal. If H is still not positive definite, ten times
    as much is tried (from 0.01 up, with a warning), up to 1000. A column that never fires (H_ii = 0)
    gets H_ii = 1: it is rounded to nearest and passes no error on.
    """
    return _factorize(H.double().clone(), act_order, damping)


def _factorize(H: Tensor, act_order: bool, damping: float) -> Factor:
    """factorize, in the memory of H: a layer of 10,000 features has an H of 800 MB, and each copy costs as much."""
    if not 0 <= damping <= 1000:
        raise ValueError(f"damping must be at least 0 and at most 1000, got {damping}")
    diagonal = H.diagonal().clone()
    H.diagonal()[diagonal == 0] = 1.0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else None
    H = H.flip(0, 1) if order is None else H[order.flip(0)[:, None], order.flip(0)]
    used, undamped = damping, H.diagonal().clone()
    while used <= 1000:
        H.diagonal().copy_(undamped + used * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(H)
        if not failed and torch.isfinite(lower.diagonal()).all():
            del H
            return Factor(lower.flip(0, 1), order, used)
        used = max(10 * used, 0.01)
        warnings.warn(
            f"the Hessian is not positive definite with damping {damping:g}; trying {used:g} "
            "(more calibration tokens than in_features avoid this)",
            stacklevel=4,
        )
    raise ValueError("the Hessian is not positive definite even with damping 1000; are its inputs finite?")


def gptq_quantize(
    weight: Tensor,
    hessian: Hessian,
    *,
    bits: int,
    group_size: int | None = None,
    symmetric: bool = False,
    act_order: bool = False,
    damping: float = 0.01,
) -> QTensor:
    """The weight rounded by GPTQ: larger error in W than round-to-nearest, smaller error in the layer's output.

    Column i in turn: q = the grid point nearest to w_i, e = (w_i - q) / U_ii, and w_j -= e U_ij for j > i
    (the paper's Algorithm 1; U upper triangular, UᵀU = H⁻¹). group_size=None gives one scale a row, from
    the original weight; else a group's scale comes from its weights as updated when its first column is due.
    act_order takes the columns by falling diag H; QTensor.group_index then maps columns to groups.

    Shapes: weight (out, in), hessian of in features. The loop runs in float64 if weight is, else in float32.
    Raises: ValueError for a weight that is not a finite matrix, other features than the Hessian's, bits
    outside 1..8 (2..8 if symmetric), group_size < 1, damping < 0.

    >>> x = torch.tensor([[1.0, 1.0], [1.0, 0.8]])
    >>> w = torch.tensor([[0.4, 0.4, ], [1.0, 0.0]])
    >>> q = gptq_quantize(w, Hessian(2).add(x), bits=1, damping=0.0)
    >>> q.dequantize().tolist()   # row 1: 0.4 and 0.4 on the grid 0, 0.4; row 2: 1 and 0 on 0, 1
    [[0.4000000059604645, 0.4000000059604645], [1.0, 0.0]]
    """
    check_weight(weight, hessian)
    granularity = rows_or_groups(group_size)
    factor = hessian.factor(act_order=act_order, damping=damping)
    columns = weight.detach().T if factor.order is None else weight.detach().T[factor.order]
    columns = columns.to(torch.float64 if weight.dtype == torch.float64 else torch.float32).contiguous()
    grid = _Grid(columns, bits, group_size, symmetric)
    codes = _quantize_columns(columns, factor.R.to(columns.device), grid)
    groups = torch.arange(len(columns), device=columns.device) // grid.group_size
    if factor.order is not None:  # back to the caller's column order
        inverse = torch.argsort(factor.order)
        codes, groups = codes[inverse], groups[inverse]
    index = groups.to(torch.int32) if factor.order is not None and group_size is not None else None
    return QTensor(codes.T.contiguous(), grid.qparams(), bits, granularity, symmetric, weight.dtype, index)


def check_weight(weight: Tensor, hessian: Hessian) -> None:
    """Raise a ValueError unless weight is a finite matrix with the Hessian's number of columns."""
    check_real(weight, "weight")
    if weight.ndim != 2 or weight.shape[1] != hessian.in_features:
        raise ValueError(f"need a weight (out, {hessian.in_features}), got shape {tuple(weight.shape)}")


def gptq_steps(weight: Tensor, hessian: Hessian, *, bits: int, damping: float = 0.01) -> Tensor:
    """The weight before and after each column, (in + 1, out, in): how GPTQ gets there, one scale a row.

    In state k the first k columns are on the grid and the others have taken up their errors. The plain loop of
    the paper, for looking at small layers; gptq_quantize gives the last state faster.
    """
    check_weight(weight, hessian)
    factor = hessian.factor(act_order=False, damping=damping)
    U = torch.linalg.inv(factor.R)
    W, grid = weight.detach().double().clone(), _Grid(weight.detach().double().T, bits, None, False)
    grid.fit(grid.columns)
    states = [W.clone()]
    for i in range(W.shape[1]):
        q = grid.scale * (grid.codes(W[:, i]) - grid.zero_point)
        error = (W[:, i] - q) / U[i, i]
        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
        W[:, i] = q
        states.append(W.clone())
    return torch.stack(states)


def obq_steps(row: Tensor, hessian: Hessian, *, bits: int, damping: float = 0.01) -> tuple[Tensor, list[int]]:
    """One row by Optimal Brain Quantization: (its weights before and after each step, (in + 1, in); the order).

    Of the weights still free, the one with the least (w_i - q)² / [H⁻¹]_ii goes to the nearest grid point q, the others
    move by (q - w_i) / [H⁻¹]_ii * [H⁻¹]_:,i, and i leaves H⁻¹ (Frantar, Alistarh 2022, arXiv 2208.11580, eq. 4).
    Every row has an order and an inverse of its own, in³ operations each; GPTQ fixes the order and shares the inverse.
    The grid is that of gptq_quantize with one scale a row. Raises: ValueError as gptq_quantize, or if row is no vector.

    >>> x = torch.tensor([[2.0, 2, 2, 1], [1, 2, 0, 2], [2, 1, 1, 0], [0, 0, 2, 0]])
    >>> states, order = obq_steps(torch.tensor([1.4, 0.4, 0.1, 3.0]), Hessian(4).add(x), bits=2, damping=0.0)
    >>> order, states[-1].round(decimals=4).tolist()
    ([3, 2, 1, 0], [2.0, 0.0, 0.0, 3.0])
    """
    if row.ndim != 1:
        raise ValueError(f"need one row of a weight, got shape {tuple(row.shape)}")
    check_weight(row[None], hessian)
    R = hessian.factor(act_order=False, damping=damping).R.to(row.device)
    inverse = torch.cholesky_inverse(R.flip(0, 1)).flip(0, 1)
    w, grid = row.detach().double().clone(), _Grid(row.detach().double()[:, None], bits, None, False)
    grid.fit(grid.columns)
    states, order, free = [w.clone()], [], torch.ones(len(w), dtype=torch.bool, device=w.device)
    for _ in range(len(w)):
        q = grid.scale * (grid.codes(w) - grid.zero_point)
        i = int(((w - q).square() / inverse.diagonal()).masked_fill(~free, torch.inf).argmin())
        w -= (w[i] - q[i]) / inverse[i, i] * inverse[i]
        free[i], w[i] = False, q[i]
        inverse -= torch.outer(inverse[i], inverse[i]) / inverse[i, i].clone()
        inverse[i], inverse[:, i], inverse[i, i] = 0.0, 0.0, 1.0  # exactly: nothing moves i again
        states.append(w.clone())
        order.append(i)
    return torch.stack(states), order


@dataclass
class _Grid:
    """The grid in force for the current column, and those of all groups so far. A column of W is a row here."""

    columns: Tensor  # (in, out), transposed: a column of W lies in one piece of memory
    bits: int
    group_size: int | None
    symmetric: bool
    scales: list = field(default_factory=list)
    zero_points: list = field(default_factory=list)

    def __post_init__(self):
        self.qmin, self.qmax = code_range(self.bits, symmetric=self.symmetric)
        self.per_row, self.group_size = self.group_size is None, self.group_size or len(self.columns)
        self.group_size = min(self.group_size, len(self.columns))

    def fit(self, group: Tensor) -> None:
        """Take the grid from the minimum and maximum of these columns, one scale a row of W."""
        qp = choose_qparams(group.amin(0), group.amax(0), qmin=self.qmin, qmax=self.qmax, symmetric=self.symmetric)
        self.scales.append(qp.scale)
        self.zero_points.append(qp.zero_point)
        self.scale, self.inverse = qp.scale.to(group.dtype), (1.0 / qp.scale).to(group.dtype)
        self.zero_point = qp.zero_point.to(group.dtype)

    def codes(self, w: Tensor) -> Tensor:
        """Round one column to its codes, still as floats."""
        return torch.round(w * self.inverse).add_(self.zero_point).clamp_(self.qmin, self.qmax)

    def qparams(self) -> QParams:
        return QParams(torch.stack(self.scales, 1), torch.stack(self.zero_points, 1), self.qmin, self.qmax)


def _quantize_columns(W: Tensor, R: Tensor, grid: _Grid) -> Tensor:
    """The codes, (in, out) int8, of W (in, out), both transposed.

    With E = (W - Q) R the errors divided by U_ii, columns B still to come see
        W_B - E U_{<B,B}  =  W_B + (W - Q)_< R_{<,B} R_BB⁻¹,
    so only the small diagonal blocks of R are ever inverted, and no (in, in) inverse is formed.
    """
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    removed = torch.empty_like(W)  # W - Q of the columns done
    # A block holds whole groups, so that a group's scale sees every update before it.
    size = BLOCK if grid.per_row else grid.group_size * max(1, BLOCK // grid.group_size)
    for a in range(0, len(W), size):
        b = min(a + size, len(W))
        U = torch.linalg.solve_triangular(R[a:b, a:b], torch.eye(b - a, dtype=R.dtype, device=R.device), upper=True)
        U = U.T.to(W.dtype).contiguous()  # row i: what columns 0..i give to column i
        block = W[a:b].clone()
        if a:
            block.addmm_(U, R[:a, a:b].T.to(W.dtype) @ removed[:a])
        codes[a:b], values = _quantize_block(block, U, grid, first=a)
        removed[a:b] = W[a:b] - values
    return codes


def _quantize_block(block: Tensor, U: Tensor, grid: _Grid, first: int) -> tuple[Tensor, Tensor]:
    """Codes and values of one block of columns (rows here); each column sees the errors of those before it."""
    codes, values, errors = (torch.empty_like(block) for _ in range(3))
    pivots = U.diagonal().tolist()
    for i in range(len(block)):
        if grid.per_row and first + i == 0:
            grid.fit(grid.columns)
        elif not grid.per_row and (first + i) % grid.group_size == 0:
            group = slice(i, i + grid.group_size)
            grid.fit(torch.addmm(block[group], U[group, :i], errors[:i], alpha=-1))
        w = torch.addmv(block[i], errors[:i].T, U[i, :i], alpha=-1)
        codes[i] = grid.codes(w)
        values[i] = grid.scale * (codes[i] - grid.zero_point)
        errors[i] = (w - values[i]) / pivots[i]
    return codes.to(torch.int8), values
