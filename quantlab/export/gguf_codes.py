"""quantlab's own codes, those of GPTQ for example, in llama.cpp's blocks."""

import torch
from torch import Tensor

from quantlab.export.gguf_simple import halves, nibbles
from quantlab.granularity import PerGroup, QTensor


def codes_to_gguf(q: QTensor) -> tuple[str, Tensor]:
    """(type, bytes) of a quantized weight in groups of 32: quantlab's own codes, from GPTQ say, in llama.cpp's blocks.

    8 bits symmetric become Q8_0, 4 bits symmetric Q4_0, 4 bits with a zero point Q4_1. Codes stay as they are; scales
    become float16, so values move by up to 2⁻¹¹ of themselves.

    Raises: ValueError for other bits, other groups, or an order of columns (act-order).
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
    parts = [halves(scale)]
    if kind == "Q8_0":
        parts += [(codes - zero).to(torch.int8).view(torch.uint8)]
    else:
        parts += [halves(-scale * zero)] if kind == "Q4_1" else []
        parts += [nibbles(codes)]
    return kind, torch.cat(parts, -1).view(*q.shape[:-1], -1)
