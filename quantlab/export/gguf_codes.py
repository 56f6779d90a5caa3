"""quantlab's own codes, those of GPTQ for example, in llama.cpp's blocks."""

import torch
from torch import Tensor

from quantlab.export.gguf_simple import halves, nibbles
from quantlab.granularity import PerGroup, QTensor


def codes_to_gguf(q: QTensor) -> tuple[str, Tensor]:
    """(type, bytes) of a quantized weight in groups of 32: quantlab's own codes, from GPTQ say, in llama.cpp's blocks.

    8 bits symmetric become Q8_0, 4 bits symmetric Q4_0, 4 bits with a zero point Q4_1. Codes stay as they are; scales
    become float16, so values move by up to 2⁻¹¹ of themselves.

    Raises: ValueError for other bits, other groups, or an order of columns (act-order); or if a scale or an offset is
    too large for float16, or so small that all of a block would become 0.

    >>> from quantlab import quantize_tensor
    >>> codes_to_gguf(quantize_tensor(torch.ones(2, 64), bits=4, granularity=PerGroup(32)))[0]
    'Q4_0'
    """
    known = {(8, True): "Q8_0", (4, True): "Q4_0", (4, False): "Q4_1"}
    kind = known.get((q.bits, q.symmetric)) if isinstance(q, QTensor) else None
    if kind is None or q.granularity != PerGroup(32) or q.group_index is not None or q.shape[-1] % 32:
        raise ValueError(
            "llama.cpp has blocks of 32 in the order of the columns: 8 bits symmetric, or 4 bits; got "
            + (f"{q.bits} bits, {q.granularity}" if isinstance(q, QTensor) else type(q).__name__)
        )
    codes = q.codes.to(torch.int16).reshape(-1, 32) - q.qparams.qmin
    scale, zero = q.qparams.scale.reshape(-1, 1), q.qparams.zero_point.reshape(-1, 1) - q.qparams.qmin
    offset = -scale * zero if kind == "Q4_1" else torch.zeros_like(scale)
    _check_halves(scale, offset, codes - zero)
    parts = [halves(scale)]
    if kind == "Q8_0":
        parts += [(codes - zero).to(torch.int8).view(torch.uint8)]
    else:
        parts += [halves(offset)] if kind == "Q4_1" else []
        parts += [nibbles(codes)]
    return kind, torch.cat(parts, -1).view(*q.shape[:-1], -1)


def _check_halves(scale: Tensor, offset: Tensor, steps: Tensor) -> None:
    """Float16 must hold each scale and offset, and no scale become 0 where steps, codes minus zero, are not."""
    largest = max(scale.max(), offset.abs().max())
    if not largest.half().isfinite():
        raise ValueError(f"llama.cpp keeps scales and offsets in float16, up to 65504: {largest:.3g} is too large")
    lost = (scale.half() == 0) & (steps != 0).any(-1, keepdim=True)
    if lost.any():
        raise ValueError(
            f"llama.cpp keeps scales in float16: {scale[lost].min():.3g} would become 0, and with it all of its block"
        )
