"""Definitions, written as loops: slow, obvious, and what the library is tested against."""

import numpy as np
import torch


def quantize_by_hand(x, scale, zero_point, qmin, qmax):
    """Codes of a flat list of floats, one at a time, in float32 (np.rint rounds half to even)."""
    inverse, codes = np.float32(1) / np.float32(scale), []
    for value in x:
        code = int(np.rint(np.float32(value) * inverse)) + zero_point
        codes.append(max(qmin, min(qmax, code)))
    return codes


def plain_gptq(
    weight, H, *, bits, group_size=None, symmetric=False, act_order=False, damping=0.01, dtype=torch.float64
):
    """The paper's algorithm without blocks: (codes, scale, zero_point, dequantized), each (out, in).

    Three factorizations, one column at a time, every later column updated at once.
    """
    W, H = weight.to(dtype).clone(), H.to(dtype).clone()
    columns = W.shape[1]
    dead = H.diagonal() == 0
    mean = H.diagonal().mean().item()
    H[dead, dead] = 1
    order = (
        torch.argsort(torch.where(dead, 0.0, H.diagonal()), descending=True, stable=True)
        if act_order
        else torch.arange(columns)
    )
    W, H = W[:, order], H[order][:, order]
    H += damping * mean * torch.eye(columns, dtype=dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    U = torch.linalg.cholesky(inverse, upper=True)
    codes, scales, zeros = (torch.empty_like(W) for _ in range(3))
    size = group_size or columns
    for i in range(columns):
        if i % size == 0:
            scale, zero, qmin, qmax = _grid_of(W[:, i : i + size], bits, symmetric)
        code = torch.clamp(torch.round(W[:, i] * (1 / scale).to(dtype)) + zero, qmin, qmax)
        q = scale.to(dtype) * (code - zero)
        error = (W[:, i] - q) / U[i, i]
        W[:, i + 1 :] -= error[:, None] * U[i, i + 1 :]
        codes[:, i], scales[:, i], zeros[:, i] = code, scale.to(dtype), zero
    back = torch.argsort(order)
    codes, scales, zeros = codes[:, back], scales[:, back], zeros[:, back]
    return codes, scales, zeros, scales * (codes - zeros)


def _grid_of(group, bits, symmetric):
    """Scale (float32), zero point and code range from the minimum and maximum of each row, 0 included."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = group.float().amin(1).clamp(max=0), group.float().amax(1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high / 2 - low / 2) / (qmax - qmin) * 2).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale) if symmetric else torch.clamp(qmin - torch.round(low / scale), qmin, qmax)
    return scale, zero.to(group.dtype), qmin, qmax
