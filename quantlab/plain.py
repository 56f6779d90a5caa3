"""Definitions, written as loops: slow, obvious, and what the library is tested against."""

import numpy as np
import torch
from torch import Tensor


def quantize_by_hand(x: list[float], scale: float, zero_point: int, qmin: int, qmax: int) -> list[int]:
    """The codes of a list of numbers, one at a time, in float32 (np.rint rounds half to even).

    >>> quantize_by_hand([-9.0, 0.0, 0.6, 9.0], scale=0.5, zero_point=1, qmin=0, qmax=3)
    [0, 1, 2, 3]
    """
    inverse, codes = np.float32(1) / np.float32(scale), []
    for value in x:
        code = int(np.rint(np.float32(value) * inverse)) + zero_point
        codes.append(max(qmin, min(qmax, code)))
    return codes


def gptq(
    weight: Tensor, H: Tensor, *, bits: int, group_size: int | None = None, symmetric: bool = False,
    act_order: bool = False, damping: float = 0.01, dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The paper's Algorithm 1 without blocks: (codes, scales, zero_points, dequantized), each (out, in).

    Three factorizations, one column at a time, every later column updated at once: arXiv 2210.17323.

    >>> weight, x = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 1.0], [1.0, 0.8]])
    >>> gptq(weight, 2 / 2 * x.T @ x, bits=1, damping=0.0)[0].tolist()
    [[0.0, 0.0]]
    """
    W, H = weight.to(dtype).clone(), H.to(dtype).clone()
    dead, mean = H.diagonal() == 0, H.diagonal().mean().item()
    H[dead, dead] = 1
    order = torch.arange(W.shape[1])
    if act_order:
        order = torch.argsort(torch.where(dead, 0.0, H.diagonal()), descending=True, stable=True)
    W, H = W[:, order], H[order][:, order]
    H += damping * mean * torch.eye(len(H), dtype=dtype)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)  # UᵀU = H⁻¹
    codes, scales, zeros = (torch.empty_like(W) for _ in range(3))
    for i in range(W.shape[1]):
        if i % (group_size or W.shape[1]) == 0:
            scale, zero, qmin, qmax = _grid(W[:, i : i + (group_size or W.shape[1])], bits, symmetric)
        code = torch.clamp(torch.round(W[:, i] * (1 / scale).to(dtype)) + zero, qmin, qmax)
        error = (W[:, i] - scale.to(dtype) * (code - zero)) / U[i, i]
        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
        codes[:, i], scales[:, i], zeros[:, i] = code, scale.to(dtype), zero
    back = torch.argsort(order)
    codes, scales, zeros = codes[:, back], scales[:, back], zeros[:, back]
    return codes, scales, zeros, scales * (codes - zeros)


def _grid(group: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, int, int]:
    """Scale (float32), zero point and code range from the minimum and maximum of each row, 0 included."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = group.float().amin(1).clamp(max=0), group.float().amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high / 2 - low / 2) / (qmax - qmin) * 2).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale) if symmetric else torch.clamp(qmin - torch.round(low / scale), qmin, qmax)
    return scale, zero.to(group.dtype), qmin, qmax
