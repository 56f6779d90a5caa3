"""quantlab's own codes, those of GPTQ for example, in llama.cpp's blocks."""

import torch
from torch import Tensor

from quantlab.export.gguf_simple import halves, nibbles
from quantlab.granularity import PerGroup, QTensor


def codes_to_gguf(q: QTensor) -> tuple[str, Tensor]:
    """(type, bytes) of a quantized weight in groups of 32: quantlab's own codes, from GPTQ say, in llama.cpp's blocks.

    8 bits symmetric become Q8_0, 4 bits symmetric Q4_0, 4 bits with a zero point Q4_1. Codes stay as they are; scales
    become float16, so values move by up to 2⁻¹¹ of themselves, or, where a scale is below 2⁻¹⁴, of the largest.

    Raises: ValueError for other bits, other groups, or an order of columns (act-order); or if float16 cannot hold the
    scales: one, or an offset, is too large, or all are so small that they would become 0, or others than they are.

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
    """Float16 must hold scales and offsets, to 2⁻¹⁰ of the largest scale where steps (codes minus zero) are not all 0.

    So a block of next to nothing may become zeros, but not a weight that has such blocks alone.
    """
    largest = max(scale.max(), offset.abs().max())
    if not largest.half().isfinite():
        raise ValueError(f"llama.cpp keeps scales and offsets in float16, up to 65504: {largest:.3g} is too large")
    moved = (scale.half().float() - scale).abs().where((steps != 0).any(-1, keepdim=True), 0.0)
    if moved.max() > 2**-10 * scale.max():
        raise ValueError(
            f"llama.cpp keeps scales in float16, which are too small here: the largest is {scale.max():.3g}"
        )
