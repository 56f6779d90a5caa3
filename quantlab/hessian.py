"""What GPTQ and AWQ know of a layer's input X (tokens, in): H = 2/tokens XᵀX, (in, in), and the mean |x|."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_flag, check_int, check_kind, check_number, check_real, check_tensor

BLOCK = 256  # columns of XᵀX that are summed up at a time


class Hessian:
    """H = 2/tokens XᵀX of a layer's input, summed up batch by batch. Layers that share an input share one."""

    def __init__(self, in_features: int):
        self.in_features = check_int(in_features, "in_features", 1)
        self.tokens = 0
        self._sum: Tensor | None = None  # XᵀX, float64, on the device of the inputs
        self._mirrored = True  # whether both triangles of it are filled
        self._abs_sum: Tensor | None = None  # Σ|x| of each feature, float64
        self._factors: dict = {}

    def add(self, x: Tensor) -> "Hessian":
        """Count in a batch of inputs, (..., in_features). Returns self, so calls can be chained."""
        if not (check_tensor(x, "the input of a Hessian").is_floating_point() and x.numel()):
            check_real(x, "the input of a Hessian")  # says what is wrong
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"need inputs of {self.in_features} features, got shape {tuple(x.shape)}")
        rows = x.detach().reshape(-1, self.in_features)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if not torch.isfinite(rows.square().sum(0)).all():  # Σx²: no entry of XᵀX is larger
            check_real(x, "the input of a Hessian")
            raise ValueError(f"inputs as large as {rows.abs().max():.1e} overflow XᵀX; scale them down")
        if self._sum is None:
            shape = (self.in_features, self.in_features)
            self._sum = torch.zeros(shape, dtype=torch.float64, device=x.device)
            self._abs_sum = torch.zeros(self.in_features, dtype=torch.float64, device=x.device)
        for a, b in self._blocks():  # XᵀX is symmetric: what lies above the diagonal is copied when it is asked for
            self._sum[a:, a:b] += rows[:, a:].T @ rows[:, a:b]
        self._mirrored = False
        self._abs_sum += rows.abs().sum(0, dtype=torch.float64)
        self.tokens += len(rows)
        self._factors.clear()
        return self

    def _blocks(self) -> list[tuple[int, int]]:
        """First and last column of each block of columns."""
        return [(a, min(a + BLOCK, self.in_features)) for a in range(0, self.in_features, BLOCK)]

    def _whole_sum(self) -> Tensor:
        """XᵀX with both triangles. Raises ValueError before the first add."""
        if self._sum is None:
            raise ValueError("this Hessian has seen no inputs; call add(x) first")
        for a, b in () if self._mirrored else self._blocks():
            self._sum[a:b, b:] = self._sum[b:, a:b].T
        self._mirrored = True
        return self._sum

    @property
    def matrix(self) -> Tensor:
        """H, (in_features, in_features), float64. Raises ValueError before the first add."""
        return self._whole_sum() * (2.0 / self.tokens)

    @property
    def mean_abs(self) -> Tensor:
        """mean |x| of each input feature, (in_features,), float64: what AWQ's scales come from."""
        if self._abs_sum is None:
            raise ValueError("this Hessian has seen no inputs; call add(x) first")
        return self._abs_sum / self.tokens

    def factor(self, *, act_order: bool, damping: float) -> "Factor":
        """The factorization that gptq_quantize works with, computed once for all layers that share this input."""
        key = check_flag(act_order, "act_order"), check_number(damping, "damping", low=0, high=1000)
        if key not in self._factors:
            self._factors[key] = _factorize(self.matrix, *key)
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
        w = w.detach().double()
        return ((w @ self._whole_sum()) * w).sum() * (2.0 / self.tokens)


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
    if check_real(H, "H").ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"H must be a square matrix, got shape {tuple(H.shape)}")
    return _factorize(H.double().clone(), act_order, damping)


def _factorize(H: Tensor, act_order: bool, damping: float) -> Factor:
    """factorize, in the memory of H: a layer of 10,000 features has an H of 800 MB, and each copy costs as much."""
    damping, act_order = check_number(damping, "damping", low=0, high=1000), check_flag(act_order, "act_order")
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


def check_weight(weight: Tensor, hessian: Hessian) -> None:
    """Raise a ValueError unless weight is a finite matrix with the Hessian's number of columns."""
    check_kind(hessian, "hessian", Hessian)
    if check_real(weight, "weight").ndim != 2 or weight.shape[1] != hessian.in_features:
        raise ValueError(f"need a weight (out, {hessian.in_features}), got shape {tuple(weight.shape)}")
