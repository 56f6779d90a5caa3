"""What several engines ask of a layer's parts, and of a file before it takes its place: each rule and check once."""

import torch
from torch import Tensor

from quantlab.arguments import check_real
from quantlab.lm.walk import with_codes
from quantlab.modules import device_of, evaluating


def int32_bias(bias: Tensor, step: Tensor) -> Tensor:
    """A bias (rows,) counted in the accumulators' steps, one a row: round(bias / step), int32.

    Raises: ValueError that names the first row whose bias an int32 does not hold.

    >>> int32_bias(torch.tensor([0.5, -1.0]), torch.tensor([0.25, 0.3])).tolist()
    [2, -3]
    """
    codes = (bias.double() / step.double()).round()
    fits = (codes >= -(2**31)) & (codes <= 2**31 - 1)
    if not fits.all():
        row = int((~fits).nonzero()[0])
        value, steps = f"{bias[row].item():.6g}", f"{codes[row].item():.6g} steps of {step[row].item():.3g}"
        raise ValueError(f"the bias of row {row} is {value}, {steps}; an int32 holds -2^31..2^31 - 1 of them")
    return codes.to(torch.int32)


def float_bias(bias: Tensor | None, rows: int) -> Tensor:
    """A bias (rows,) in float32, of zeros if there is none. Raises: ValueError if it has another shape."""
    bias = torch.zeros(rows, dtype=torch.float32) if bias is None else check_real(bias, "bias").detach().float()
    if bias.shape != (rows,):
        raise ValueError(f"bias must be ({rows},), got {tuple(bias.shape)}")
    return bias


def half_scales(scale: Tensor) -> Tensor:
    """Scales in float16. Raises: ValueError if one becomes 0 or infinite there."""
    half = scale.half()
    if not half.isfinite().all() or (half == 0).any():
        raise ValueError(f"scales are stored in float16, 6e-8 to 65504; got {scale.min():.3g}..{scale.max():.3g}")
    return half


def check_same_codes(found: Tensor, meant: Tensor, of: str = "the layer") -> None:
    """ValueError unless the codes that were read back from a file are those that were meant."""
    if not torch.equal(found.int(), meant.int()):
        raise ValueError(f"the file holds other codes of {of} than were written; nothing was saved")


def check_close(got: Tensor, meant: Tensor, allowed: float, engine: str) -> None:
    """ValueError if an engine's answer lies further than allowed from the one that was meant, or is no number."""
    apart = (got - meant).abs().max().item()
    if not apart <= allowed:
        raise ValueError(f"{engine}'s answer is {apart:.2e} off, {allowed:.2e} was allowed; nothing was saved")


def some_inputs(tokens: int, columns: int, spread: float) -> Tensor:
    """Normal values (tokens, columns) of this standard deviation, the same each time."""
    return spread * torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))


def some_ids(model) -> Tensor:
    """Twelve tokens (1, 12) that the model knows, the same each time."""
    return torch.arange(12)[None] % model.config.vocab_size


def meant_logits(model, qtensors: dict, ids: Tensor) -> Tensor:
    """The logits of a copy of the model with the weights that the codes stand for, float32, on the CPU."""
    meant, _ = with_codes(model, qtensors)
    with torch.no_grad(), evaluating(meant):
        return meant(ids.to(device_of(meant)), use_cache=False).logits.float().cpu()
