"""How far apart: errors of tensors, and distances between the predictions of two models."""

import math
from typing import NamedTuple

import torch  # noqa: F401  for the examples
import torch.nn.functional as F
from torch import Tensor

from quantlab.affine import QParams, fake_quantize, unclamped_codes
from quantlab.arguments import check_real


class SplitError(NamedTuple):
    """The mean squared error in two parts; each is a mean over all elements, so they add up to mse."""

    rounding: float  # of the elements whose code was not clamped
    clipping: float  # of the elements whose code was clamped to qmin or qmax


def mse(x: Tensor, x_hat: Tensor) -> float:
    """Mean squared error, in squared units of x. Raises ValueError if the shapes differ.

    >>> mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    2.0
    """
    _check_pair(x, x_hat)
    return (x_hat.double() - x.double()).square().mean().item()


def sqnr_db(x: Tensor, x_hat: Tensor) -> float:
    """Signal-to-quantization-noise ratio, 10 log10(mean x² / mean squared error), in decibels.

    Infinite when x_hat equals x. Raises ValueError if the shapes differ or x is all zero.

    >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 2)
    20.0
    """
    noise, signal = mse(x, x_hat), x.double().square().mean().item()
    if signal == 0:
        raise ValueError("x is all zero: a ratio to its power has no meaning")
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def split_error(x: Tensor, qp: QParams) -> SplitError:
    """Where the error of fake_quantize(x, qp) comes from: rounding inside the grid, or clipping outside.

    An element counts as clipped when it lies more than half a step beyond the first or last grid point.

    >>> qp = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), 0, 3)
    >>> split_error(torch.tensor([0.5, 5.0]), qp)
    SplitError(rounding=0.125, clipping=2.0)
    """
    x = check_real(x)
    error = (fake_quantize(x.detach(), qp).double() - x.detach().double()).square()
    steps = unclamped_codes(x.detach(), qp)
    clipped = (steps < qp.qmin) | (steps > qp.qmax)
    rounding, clipping = (error.masked_fill(mask, 0.0).mean().item() for mask in (clipped, ~clipped))
    return SplitError(rounding, clipping)


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> float:
    """Mean over positions of KL(p || q), in nats; p is the reference (float) model.

    Shapes: logits (..., vocabulary), alike. 0 when the predictions agree, otherwise positive.

    >>> p = torch.tensor([[0.0, 0.0]])
    >>> round(kl_divergence(p, torch.tensor([[0.0, math.log(3)]])), 4)   # log 2 - (log 3) / 2 + ... by hand 0.1438
    0.1438
    """
    return kl_per_position(p_logits, q_logits).mean().item()


def kl_per_position(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each position, in nats, shape (...); what kl_divergence averages."""
    _check_pair(p_logits, q_logits)
    log_p, log_q = F.log_softmax(p_logits.float(), dim=-1), F.log_softmax(q_logits.float(), dim=-1)
    p = log_p.exp()  # what p never says costs nothing, also where log p is -inf: 0 log 0 = 0
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(dim=-1).clamp(min=0.0)


def top1_agreement(p_logits: Tensor, q_logits: Tensor) -> float:
    """The fraction of positions at which both models would say the same token.

    >>> top1_agreement(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[3.0, 1.0], [1.0, 0.0]]))
    0.5
    """
    p, q = _check_pair(p_logits, q_logits)
    return (p.argmax(dim=-1) == q.argmax(dim=-1)).double().mean().item()


def _check_pair(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    x, x_hat = check_real(x, "the first tensor"), check_real(x_hat, "the second tensor")
    if x.shape != x_hat.shape:
        raise ValueError(f"need two tensors of one shape, got {tuple(x.shape)} and {tuple(x_hat.shape)}")
    return x, x_hat
