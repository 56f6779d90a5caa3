"""GPTQ: round a weight column by column and let the columns still to come absorb the error.

Frantar, Ashkboos, Hoefler, Alistarh 2022 (arXiv 2210.17323). Notation: W (out, in) is the weight,
X (tokens, in) its input, H = 2/tokens XᵀX (in, in). GPTQ lowers ‖XWᵀ - XQᵀ‖², not ‖W - Q‖².
Read obq_steps, where it comes from, then gptq_steps, the plain loop, then gptq_quantize, the same, fast.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from quantlab.affine import QParams, choose_qparams
from quantlab.arguments import check_real
from quantlab.granularity import QTensor, code_range, rows_or_groups
from quantlab.hessian import Factor, Hessian, check_weight, factorize

__all__ = ["Factor", "Hessian", "factorize", "gptq_quantize", "gptq_steps", "obq_steps"]

BLOCK = 128  # columns that are finished before the others learn of their error; any size gives the same result
STEP = 16  # columns of a block that take up each other's errors one by one


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
        self.low, self.high = self.qmin - self.zero_point, self.qmax - self.zero_point  # of codes without zero_point

    def codes(self, w: Tensor) -> Tensor:
        """Round one column to its codes, still as floats."""
        return torch.round(w * self.inverse).add_(self.zero_point).clamp_(self.qmin, self.qmax)

    def qparams(self) -> QParams:
        return QParams(torch.stack(self.scales, 1), torch.stack(self.zero_points, 1), self.qmin, self.qmax)


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
    if check_real(row, "row").ndim != 1:
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


# --- the same, fast ---------------------------------------------------------------------------------------------


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


def _quantize_columns(W: Tensor, R: Tensor, grid: _Grid) -> Tensor:
    """The codes, (in, out) int8, of W (in, out), both transposed.

    With E = (W - Q) R the errors divided by U_ii, columns B still to come see
        W_B - E U_{<B,B}  =  W_B + (W - Q)_< R_{<,B} R_BB⁻¹,
    so only the small diagonal blocks of R are ever inverted, and no (in, in) inverse is formed.
    """
    codes = torch.empty(W.shape, dtype=torch.int8, device=W.device)
    removed = torch.empty_like(W)  # W - Q of the columns done
    across = R.to(W.dtype)
    # A block holds whole groups, so that a group's scale sees every update before it.
    size = BLOCK if grid.per_row else grid.group_size * max(1, BLOCK // grid.group_size)
    for a in range(0, len(W), size):
        b = min(a + size, len(W))
        U = torch.linalg.solve_triangular(R[a:b, a:b], torch.eye(b - a, dtype=R.dtype, device=R.device), upper=True)
        give = (U / U.diagonal()[:, None]).T.to(W.dtype).contiguous()  # row i: what columns 0..i give to column i
        block = W[a:b].clone()
        if a:
            block.addmm_(U.T.to(W.dtype), across[:a, a:b].T @ removed[:a])
        steps, values = _round_columns(block, give, grid, first=a)
        group = torch.arange(a, b, device=W.device) // grid.group_size
        codes[a:b] = steps.add_(torch.stack(grid.zero_points[group[0] :])[group - group[0]])
        removed[a:b] = W[a:b] - values
    return codes


def _round_columns(block: Tensor, give: Tensor, grid: _Grid, first: int) -> tuple[Tensor, Tensor]:
    """Codes less zero_point, and values, of one block of columns (rows here); each sees the errors of those before it.

    Six operations a column, each into memory that is there; of the errors only the last few go to each column by
    itself, those before them to STEP columns at once. On a CPU numpy does them, on the same memory: for a thousand rows
    it is the calls that cost, and numpy's cost less than torch's (benchmarks/gptq_speed.py times the whole).
    """
    codes, values, errors = (torch.empty_like(block) for _ in range(3))
    lib, own = (np, Tensor.numpy) if block.device.type == "cpu" else (torch, lambda x: x)
    rows = [list(own(x)) for x in (codes, values, errors)]
    for i, (code, value, error) in enumerate(zip(*rows, strict=True)):
        if grid.per_row and first + i == 0:
            grid.fit(grid.columns)
        elif not grid.per_row and (first + i) % grid.group_size == 0:
            group = slice(i, i + grid.group_size)
            grid.fit(torch.addmm(block[group], give[group, :i], errors[:i], alpha=-1))
        k = i % STEP
        if k == 0:
            near = own(torch.addmm(block[i : i + STEP], give[i : i + STEP, :i], errors[:i], alpha=-1))
            last, taken = own(errors[i : i + STEP]), own(give[i : i + STEP, i : i + STEP])
        if i == 0 or (first + i) % grid.group_size == 0:
            inverse, scale, low, high = (own(x) for x in (grid.inverse, grid.scale, grid.low, grid.high))
        w = near[k] - taken[k, :k] @ last[:k]
        lib.multiply(w, inverse, out=code)
        lib.round(code, out=code)
        lib.minimum(code, high, out=code)
        lib.maximum(code, low, out=code)
        lib.multiply(code, scale, out=value)
        lib.subtract(w, value, out=error)
    return codes, values
