"""AWQ: multiply the input channels that matter before rounding, divide them afterwards.

Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023 (arXiv 2306.00978). A weight column that is s times as
large keeps the step of its group (unless it becomes the largest), so its rounding error shrinks s times as it is
divided back. The columns worth it are those whose inputs are large. No weight is kept in float.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_int, check_list, check_number, check_real
from quantlab.granularity import QTensor, quantize_tensor, rows_or_groups
from quantlab.hessian import Hessian, check_weight
from quantlab.quantized import Quantized, smallest_exact


@dataclass(frozen=True, eq=False)
class _Around(Quantized):
    """A QTensor, and something beside it; codes, bits and dtype are those of the QTensor."""

    q: QTensor

    codes = property(lambda self: self.q.codes)
    bits = property(lambda self: self.q.bits)
    dtype = property(lambda self: self.q.dtype)
    first_code = property(lambda self: self.q.first_code)

    def settings(self) -> dict:
        return self.q.settings()


@dataclass(frozen=True, eq=False)
class ScaledQTensor(_Around):
    """A quantized W · diag(s), and s: the layer computes (x / s) (W s)ᵀ. Deployed, 1 / s goes into the layer before.

    s is stored in 16 bits (nothing, where it is folded into the layer before).
    """

    input_scale: Tensor  # s, (in,), float32, of numbers that float16 holds

    def dequantize(self) -> Tensor:
        """The weight that the layer acts with, Q(W s) / s, in the dtype of the original."""
        return (self.q.dequantize().float() / self.input_scale).to(self.q.dtype)

    def side_parts(self) -> dict[str, Tensor]:
        return self.q.side_parts() | {"input_scale": self.input_scale.half()}

    @classmethod
    def from_codes(cls, codes: Tensor, parts: dict[str, Tensor], settings: dict) -> "ScaledQTensor":
        return cls(QTensor.from_codes(codes, parts, settings), parts["input_scale"].float())


@dataclass(frozen=True, eq=False)
class MixedQTensor(_Around):
    """A quantized weight and, beside it, some of its columns in float: the experiment that AWQ started from.

    Kept weights are stored in 16 bits where that loses nothing, the number of each kept column in 32.
    """

    columns: Tensor  # which are kept, (kept,), int64; their codes go unused
    values: Tensor  # what stands in them, (out, kept)

    def dequantize(self) -> Tensor:
        """The weight that the layer acts with, in the dtype of the original."""
        mixed = self.q.dequantize()
        mixed[:, self.columns] = self.values
        return mixed

    def side_parts(self) -> dict[str, Tensor]:
        return self.q.side_parts() | {"columns": self.columns.int(), "values": smallest_exact(self.values)}

    @classmethod
    def from_codes(cls, codes: Tensor, parts: dict[str, Tensor], settings: dict) -> "MixedQTensor":
        q = QTensor.from_codes(codes, parts, settings)
        return cls(q, parts["columns"].long(), parts["values"].to(q.dtype))


def keep_columns(
    weight: Tensor, columns, *, bits: int, group_size: int | None = 128, symmetric: bool = False
) -> MixedQTensor:
    """The weight rounded to nearest, but with these input channels left in float.

    Lin et al. 2023, table 1: of 1 % of the channels those with the largest mean |x| help, random ones do not.

    weight (out, in); columns: indices in 0..in - 1, none twice. Raises: ValueError if a column does not exist or comes
    twice, or weight, bits or group_size are refused by quantize_tensor.

    >>> weight = torch.tensor([[1.0, 0.3, -1.0, 0.2]])
    >>> keep_columns(weight, [1], bits=2, group_size=4).dequantize()
    tensor([[ 1.3333,  0.3000, -0.6667,  0.0000]])
    """
    if check_real(weight, "weight").ndim != 2:
        raise ValueError(f"need a weight (out, in), got shape {tuple(weight.shape)}")
    columns = [check_int(c, "a column", 0, weight.shape[1] - 1) for c in check_list(columns, "columns")]
    if len(set(columns)) < len(columns):
        raise ValueError("a column to keep comes twice")
    granularity = rows_or_groups(group_size)
    q = quantize_tensor(weight, bits=bits, granularity=granularity, symmetric=symmetric)
    kept = torch.tensor(columns, dtype=torch.int64, device=weight.device)
    return MixedQTensor(q, kept, weight.detach()[:, kept])


@dataclass(frozen=True, eq=False)
class Search:
    """What the search tried and found: the output error of each alpha, the best one, and its scales."""

    alphas: list[float]
    errors: list[float]  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² of all layers together, for each alpha
    alpha: float
    input_scale: Tensor  # (in,), float32


def awq_search(
    weight: Tensor, x: Tensor, *, bits: int, group_size: int | None = 128, symmetric: bool = False, steps: int = 20
) -> tuple[ScaledQTensor, Search]:
    """The weight rounded after the scaling that gives the least output error on x, and what the search saw.

        s_j = (mean |x_j|)^alpha, divided by √(max s · min s);  alpha from 0, 1/steps, ... to 1    sec. 3.2, eq. 5

    alpha = 0 is plain rounding to nearest, so on x the result is never worse than that.

    Shapes: weight (out, in), x (..., in). Raises: ValueError if the shapes do not fit, values are not finite, or bits
    or group_size are refused by quantize_tensor.
    """
    if check_real(weight, "weight").ndim != 2:
        raise ValueError(f"need a weight (out, features), got shape {tuple(weight.shape)}")
    if check_real(x).ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"need inputs of {weight.shape[1]} features, got shape {tuple(x.shape)}")
    hessian = Hessian(x.shape[-1]).add(x)
    search = search_scales([weight], hessian, bits=bits, group_size=group_size, symmetric=symmetric, steps=steps)
    return scale_and_round(weight, search.input_scale, bits=bits, group_size=group_size, symmetric=symmetric), search


def search_scales(
    weights: list[Tensor], hessian: Hessian, *, bits: int, group_size: int | None,
    symmetric: bool = False, steps: int = 20,
) -> Search:  # fmt: skip
    """The scales that layers which read one input share (q, k, v; gate, up): least output error of all together.

    The Hessian gives both mean|x| and the output errors, so that X itself is not needed.
    """
    steps, weights = check_int(steps, "steps", 1, 1000), check_list(weights, "weights")
    if not weights:
        raise ValueError("there is no weight to search scales for")
    for weight in weights:
        check_weight(weight, hessian)
    strength = hessian.mean_abs
    alphas = [i / steps for i in range(steps + 1)]
    energy = sum(hessian.energy(w) for w in weights)
    errors = []
    for alpha in alphas:
        s = scales_of(strength, alpha)
        rounded = [scale_and_round(w, s, bits=bits, group_size=group_size, symmetric=symmetric) for w in weights]
        lost = sum(hessian.energy(w.float() - q.dequantize().float()) for w, q in zip(weights, rounded, strict=True))
        errors.append((lost / energy.clamp(min=torch.finfo(torch.float64).tiny)).item())
    best = min(range(len(alphas)), key=errors.__getitem__)
    return Search(alphas, errors, alphas[best], scales_of(strength, alphas[best]))


def scales_of(strength: Tensor, alpha: float) -> Tensor:
    """s = strength^alpha, centred so that the largest and the smallest multiply to 1; silent channels get 1, (in,).

    Cut to 1e-4..1e4 and rounded to float16, as it is stored.

    >>> scales_of(torch.tensor([1.0, 4.0, 16.0]), 0.5).tolist()
    [0.5, 1.0, 2.0]
    """
    strength, alpha = check_real(strength, "strength").double(), check_number(alpha, "alpha", low=0, high=1)
    active = strength > 0
    if not active.any():
        return torch.ones_like(strength, dtype=torch.float32)
    s = torch.where(active, strength, 1.0) ** alpha
    centre = (s[active].max() * s[active].min()).sqrt()
    return torch.where(active, s / centre, 1.0).clamp(1e-4, 1e4).half().float()


def scale_and_round(
    weight: Tensor, input_scale: Tensor, *, bits: int, group_size: int | None, symmetric: bool = False
) -> ScaledQTensor:
    """Q(W · diag(s)) with s: rounding to nearest, after each input channel j was multiplied by s_j."""
    granularity = rows_or_groups(group_size)
    input_scale = check_real(input_scale, "input_scale")
    if check_real(weight, "weight").ndim != 2 or input_scale.shape != weight.shape[1:]:
        raise ValueError(f"input_scale {tuple(input_scale.shape)} does not fit a weight {tuple(weight.shape)}")
    if not (input_scale > 0).all():
        raise ValueError(f"input_scale must be above 0, got {input_scale.min():.3g}")
    scaled = (weight.detach().float() * input_scale).to(weight.dtype)
    return ScaledQTensor(quantize_tensor(scaled, bits=bits, granularity=granularity, symmetric=symmetric), input_scale)
