"""ExecuTorch files (.pte) run, the codes in them looked for, and what XNNPACK shall answer."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.arguments import check_file, check_kind, check_real, check_tensor
from quantlab.blocks import PerAxis, PerGroup
from quantlab.export.engines import engine
from quantlab.export.parts import float_bias
from quantlab.granularity import QTensor, quantize_tensor
from quantlab.packing import pack


def executorch_session(path) -> Callable[[Tensor], Tensor]:
    """A .pte file as a function of its one input, run by ExecuTorch on one thread.

    The pool of threads is the process's: what was opened before runs on one thread from then on, too.
    Raises: FileNotFoundError if there is no file, ValueError if it is none of ExecuTorch's, ModuleNotFoundError if
    ExecuTorch is not here; the function RuntimeError, of ExecuTorch's, if x has another shape or dtype.
    """
    data = check_file(path).read_bytes()
    if data[4:6] != b"ET":
        raise ValueError(f"{path} is no ExecuTorch file: bytes 4 and 5 of one are ET")
    engine("executorch")
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(1)
    program = Runtime.get().load_program(data)  # it holds the bytes, so it stays with the function
    return lambda x: program.load_method("forward").execute([check_tensor(x).detach().contiguous()])[0]


def holds_codes(path, q: QTensor) -> bool:
    """Whether a .pte file holds the codes of q, all in one piece, as XNNPACK keeps them: int8, or code + 8 in 4 bits.

    Raises: FileNotFoundError if there is no file, ValueError if q has no codes that XNNPACK could keep.
    """
    check_weight(q)
    kept = pack(q.codes + 8, bits=4) if q.bits == 4 else q.codes
    return kept.contiguous().numpy().tobytes() in check_file(path).read_bytes()


def expected_executorch(q: QTensor, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """What a file of save_executorch shall give for x (tokens, in): x in int8, asymmetric, one scale a token.

    The scales of 4 bits are rounded to bfloat16, as they are in the file. float32, (tokens, out).
    Raises: ValueError as save_executorch does, or if x does not fit.

    >>> q = quantize_tensor(torch.eye(2), bits=8, granularity=PerAxis(0))
    >>> expected_executorch(q, torch.tensor([[0.0, 255.0]])).round().tolist()
    [[0.0, 254.0]]
    """
    short = check_weight(q)
    if check_real(x).ndim != 2 or x.shape[1] != q.shape[1]:
        raise ValueError(f"x must be (tokens, {q.shape[1]}), got {tuple(x.shape)}")
    scale = q.qparams.scale.bfloat16().float() if short else q.qparams.scale
    weight = replace(q, qparams=replace(q.qparams, scale=scale), dtype=torch.float32).dequantize()
    rounded = quantize_tensor(x.float(), bits=8, granularity=PerAxis(0), symmetric=False)
    return F.linear(rounded.dequantize(), weight, float_bias(bias, q.shape[0]))


def check_weight(q: QTensor) -> bool:
    """Whether XNNPACK keeps the scales of q in bfloat16; ValueError that names the rule if it has no such layer."""
    how = check_kind(q, "q", QTensor, "quantize_tensor gives").granularity
    signed = q.symmetric and q.codes.dtype == torch.int8 and not q.qparams.zero_point.any()
    if len(q.shape) != 2 or q.bits not in (4, 8) or not signed:
        raise ValueError(f"XNNPACK takes matrices of symmetric signed codes of 4 or 8 bits, got {q.bits} bits, {how}")
    if q.group_index is not None or not (isinstance(how, PerGroup) or how == PerAxis(0)):
        raise ValueError(f"XNNPACK takes one scale a row, or groups in the order of the columns, got {how}")
    if q.bits == 8 and how != PerAxis(0):
        raise ValueError(f"XNNPACK's codes of 8 bits have one scale a row, got {how}")
    size = q.shape[1] if how == PerAxis(0) else how.group_size  # a row of 4 bits is one group to it
    if q.bits == 4 and (size % 32 or q.shape[1] % size):
        raise ValueError(
            f"XNNPACK's groups of 4 bits are of a multiple of 32 that divides the inputs, got {size} of {q.shape[1]}"
        )
    return q.bits == 4
