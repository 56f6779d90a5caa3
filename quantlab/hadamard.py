"""Hadamard matrices and other rotations: orthogonal matrices in which every channel meets every other.

Row vectors throughout: x, (..., n), becomes x R.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn

from quantlab.arguments import check_int, check_real

_ROWS = 128  # transformed at a time: what they need between two steps stays in a core's cache
_SIDE = 64  # rows of a factor at most: two large factors are faster than three small ones, which read the memory again


def hadamard(n: int) -> Tensor:
    """An orthogonal matrix of ±1/√n, (n, n), float32.

    Sylvester: H₂ₙ = H₂ ⊗ Hₙ. Where n is no power of two, the first factor is Paley's (1933), made of the squares
    modulo a prime: 576 is 36 · 16 and 1536 is 12 · 128.

    Raises: ValueError if n is not 1, 2 or a multiple of 4 (no other n has one), or no such factor is known.

    >>> (2 * hadamard(4)).int().tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    whole = torch.ones(1, 1, dtype=torch.float32)
    for factor in _factors(check_int(n, "n", 1, 2**16)):
        whole = torch.kron(whole, factor)
    return whole / math.sqrt(n)


def hadamard_transform(x: Tensor) -> Tensor:
    """x @ hadamard(n) along the last dimension, in the shape and dtype of x, without the matrix: n log n, not n².

    A Kronecker product is applied factor by factor: each turns one of the dimensions that x, (..., 48, 32), has.
    Raises: ValueError if x is not finite floats, or its last dimension has no Hadamard matrix.
    """
    x = check_real(x)
    if x.ndim == 0:
        raise ValueError("x must have a dimension to turn; got a single number")
    return transform(x)


def random_hadamard(n: int, *, seed: int = 0) -> Tensor:
    """hadamard(n) with its rows' signs drawn at random, (n, n): no channel's sign pattern is met by chance."""
    matrix, random = hadamard(n), torch.Generator().manual_seed(check_int(seed, "seed", 0, 2**63))
    return torch.where(torch.rand(n, 1, generator=random, dtype=torch.float32) < 0.5, -matrix, matrix)


def random_orthogonal(n: int, *, seed: int = 0) -> Tensor:
    """An orthogonal matrix, (n, n), float32, all of them equally likely (Haar measure; Mezzadri 2007)."""
    n, random = check_int(n, "n", 1, 2**16), torch.Generator().manual_seed(check_int(seed, "seed", 0, 2**63))
    q, r = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64))
    return (q * r.diagonal().sign()).float()


def transform(x: Tensor) -> Tensor:
    """hadamard_transform without its checks: of floats (..., n), NaN or none of them too."""
    n, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    factors, parts = [factor.to(x.device, wide) for factor in _factors(n)], []
    factors[-1] = factors[-1] * n**-0.5
    for rows in x.reshape(-1, n).split(_ROWS):
        rows, right = rows.to(wide), n
        for factor in factors:
            right //= len(factor)
            rows = rows.reshape(-1, len(factor), right)
            rows = factor.T @ rows if right > 1 else rows[..., 0] @ factor
        parts.append(rows.reshape(-1, n).to(x.dtype))
    return torch.cat(parts).view(x.shape)


@cache
def _factors(n: int) -> list[Tensor]:
    """Matrices of ±1 whose Kronecker product is Hadamard's of n: Paley's of the odd part first, then Sylvester's."""
    odd = n // (n & -n)
    base = next((m for m in _sizes(odd, n) if _paley(m) is not None), None) if odd > 1 else 1
    if base is None:
        why = "n must be 1, 2 or a multiple of 4" if n % 4 else "Sylvester's and Paley's constructions give none"
        raise ValueError(f"no Hadamard matrix of {n} rows: {why}")
    factors = [torch.ones(1, 1, dtype=torch.float32) if base == 1 else _paley(base)]
    while base < n:
        small = 2 * len(factors[-1]) <= _SIDE
        factors = [*factors[:-1], torch.kron(factors[-1], _two())] if small else [*factors, _two()]
        base *= 2
    return factors


def _sizes(odd: int, n: int) -> list[int]:
    return [odd * 2**k for k in range(2, n.bit_length()) if n % (odd * 2**k) == 0]


def _two() -> Tensor:
    return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float32)


def _paley(m: int) -> Tensor | None:
    """Hadamard's matrix of m rows from the squares modulo the prime q = m - 1 or m/2 - 1; None if neither is one."""
    for q in (m - 1, m // 2 - 1):
        if q < 3 or q % 4 != (3 if q == m - 1 else 1) or any(q % d == 0 for d in range(2, math.isqrt(q) + 1)):
            continue
        squares = torch.zeros(q, dtype=torch.float32).index_fill(0, torch.arange(1, q).square() % q, 2) - 1
        squares[0] = 0  # 1 for a square, -1 for another number, 0 for 0
        core = nn.functional.pad(squares[(torch.arange(q)[:, None] - torch.arange(q)) % q], (1, 0, 1, 0))
        core[0, 1:], core[1:, 0] = 1, 1 if q % 4 == 1 else -1
        if q == m - 1:
            return core + torch.eye(m)
        return torch.kron(core, _two()) + torch.kron(torch.eye(q + 1), torch.tensor([[1.0, -1], [-1, -1]]))
    return None
