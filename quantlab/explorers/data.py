"""What several explorers do with the tensors they are given, and with the grids they try."""

import itertools

import torch
from torch import Tensor, nn

from quantlab.affine import QParams, dequantize
from quantlab.arguments import check_real
from quantlab.metrics import mse

_SAMPLE = 20_000  # values shown while dragging; more would not change the picture
_TINY = 1e-38  # in place of a power of 0


def sample(x: Tensor) -> Tensor:
    """At most 20,000 values, evenly picked, and the smallest and largest, which set the range."""
    flat = check_real(x).detach().float().flatten()
    if len(flat) <= _SAMPLE:
        return flat
    some = torch.linspace(0, len(flat) - 1, _SAMPLE - 2, dtype=torch.float64).long()
    return torch.cat([flat[some], flat.amin()[None], flat.amax()[None]])


def evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly picked, the first and the last among them."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), count), dtype=torch.float64).round().long()]


def nearest(choices, value: float):
    """The choice of a slider that is nearest to a value."""
    return min(choices, key=lambda choice: abs(choice - value))


def thinned(stops: list, count: int, kept) -> list:
    """About so many of a slider's stops, evenly picked, both ends and the stop `kept` among them.

    >>> thinned(list(range(11)), 3, 4)
    [0, 4, 10]
    """
    if count >= len(stops):
        return stops
    places = torch.linspace(0, len(stops) - 1, max(count, 2)).round().int().tolist()
    here = stops.index(kept)
    if here not in places and len(places) > 2:
        places.remove(min(places[1:-1], key=lambda place: abs(place - here)))
    return [stops[place] for place in sorted({*places, here})]


def states(**stops) -> list[dict]:
    """Every combination of these stops of an explorer's controls, as film() wants them.

    >>> states(bits=[2, 4], symmetric=[False])
    [{'bits': 2, 'symmetric': False}, {'bits': 4, 'symmetric': False}]
    """
    return [dict(zip(stops, values, strict=True)) for values in itertools.product(*stops.values())]


def check_layer(weight, x=None) -> tuple[Tensor, Tensor | None]:
    """weight (out, in) and the layer's input x as (tokens, in): float32, on the CPU, without gradient.

    Raises: ValueError if one is not finite, or they do not belong together.
    """
    weight, x = check_real(weight, "weight"), None if x is None else check_real(x)
    if weight.ndim != 2 or (x is not None and (x.ndim < 2 or x.shape[-1] != weight.shape[1])):
        shapes = tuple(weight.shape), None if x is None else tuple(x.shape)
        raise ValueError(f"need weight (out, in) and x (tokens, in), got {shapes[0]} and {shapes[1]}")
    return weight.detach().float().cpu(), None if x is None else x.detach().float().cpu().flatten(0, -2)


def linear_of(weight: Tensor) -> nn.Linear:
    """The linear layer of a weight (out, in), which it shares; no bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def grid_points(qp: QParams) -> list[float]:
    """The reals that the codes qmin..qmax of one map stand for."""
    return dequantize(torch.arange(qp.qmin, qp.qmax + 1), qp).tolist()


def times(now: float, before: float, digits: int = 2) -> str:
    """How many times `before` it is, for people to read.

    >>> times(1.0, 4.0), times(0.0, 0.0)
    ('0.25 ×', '– ×')
    """
    return f"{now / before:.{digits}f} ×" if before else "– ×"


def relative_error(y: Tensor, y_hat: Tensor) -> float:
    """‖ŷ - y‖² / ‖y‖²; 0 where both are."""
    return mse(y, y_hat) / max(y.double().square().mean().item(), _TINY)
