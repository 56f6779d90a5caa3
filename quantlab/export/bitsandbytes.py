"""quantlab's NF4 codes in bitsandbytes' 4-bit layer and back: the layer that QLoRA trains beside."""

import torch
from torch import Tensor, nn

from quantlab.arguments import check_kind, kind
from quantlab.codebook import CodebookTensor, DoubleQuantized, nf4_levels
from quantlab.export.engines import engine
from quantlab.export.parts import float_bias
from quantlab.packing import pack, unpack

__all__ = ["from_bitsandbytes", "to_bitsandbytes"]

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # its kernels' block sizes


def to_bitsandbytes(q: CodebookTensor, *, bias: Tensor | None = None) -> nn.Module:
    """bitsandbytes' Linear4bit with q's codes, two a byte, the first in the high half, and q's absmax as they are.

    Nothing is rounded anew: its kernels read our bytes. With double_quant its absmax are the 8-bit codes, their absmax
    and their mean. It computes in the dtype of q. On a CPU with AVX-512, bitsandbytes 0.50 packs the bytes anew in the
    first call, computes in bfloat16, and asserts that the rows are a multiple of 32.

    Raises: ValueError if q is no matrix (out, in) of NF4 codes with blocks of 32, 64 .. 4096 that end where a row ends,
    or the bias does not fit; ModuleNotFoundError if bitsandbytes is not here.
    """
    _check_fits(q)
    bnb = engine("bitsandbytes")
    packed = pack(q.codes.reshape(-1, 2).flip(1), bits=4)[:, None]
    layer = bnb.nn.Linear4bit(
        q.shape[1], q.shape[0], bias=bias is not None, compute_dtype=q.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=_state(q), blocksize=q.block_size, quant_type="nf4",
        compress_statistics=not isinstance(q.absmax, Tensor), module=layer, bnb_quantized=True,
    )  # fmt: skip
    if bias is not None:
        layer.bias = nn.Parameter(float_bias(bias, q.shape[0]).to(q.dtype), requires_grad=False)
    layer.quant_state = layer.weight.quant_state
    return layer.eval()


def from_bitsandbytes(layer: nn.Module) -> CodebookTensor:
    """The codes and absmax of a Linear4bit of NF4, as they are.

    Raises: ValueError if it is no Linear4bit, its weight is of another kind or not rounded yet (bitsandbytes rounds
    when a layer is moved to its device), or it has computed on a CPU with AVX-512, for which bitsandbytes rounds absmax
    to bfloat16; ModuleNotFoundError if bitsandbytes is not here.
    """
    bnb = engine("bitsandbytes")
    if not isinstance(layer, bnb.nn.Linear4bit):
        raise ValueError(f"layer must be a Linear4bit of bitsandbytes, got {kind(layer)}")
    state = layer.weight.quant_state
    if state is None or state.quant_type != "nf4":
        found = "a weight that is not rounded yet" if state is None else state.quant_type
        raise ValueError(f"need a weight of nf4, got {found}")
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError("bitsandbytes has packed this layer anew when it computed, absmax in bfloat16; read it before")
    packed, shape = layer.weight.detach().reshape(-1).view(torch.uint8), torch.Size(state.shape)
    pairs = unpack(packed, bits=4, count=2 * packed.numel()).view(-1, 2).flip(1)
    codes = pairs.flatten()[: shape.numel()].view(shape)
    absmax = state.absmax.clone()
    if state.nested:
        absmax = DoubleQuantized(absmax, state.state2.absmax.clone(), state.offset.clone())
    return CodebookTensor(codes, absmax, state.code.clone(), state.blocksize, state.dtype)


def _state(q: CodebookTensor):
    """What bitsandbytes keeps beside the codes."""
    functional, more, absmax = engine("bitsandbytes").functional, {}, q.absmax
    if isinstance(absmax, DoubleQuantized):
        table = functional.create_dynamic_map()
        inner = functional.QuantState(absmax=absmax.absmax, code=table, blocksize=256, dtype=torch.float32)
        more, absmax = {"offset": absmax.offset, "state2": inner}, absmax.codes
    return functional.QuantState(
        absmax=absmax.clone(),
        shape=q.shape,
        code=q.levels,
        blocksize=q.block_size,
        quant_type="nf4",
        dtype=q.dtype,
        **more,
    )


def _check_fits(q: CodebookTensor) -> None:
    check_kind(q, "q", CodebookTensor, "quantize_codebook gives")
    if len(q.shape) != 2 or not torch.equal(q.levels.cpu(), nf4_levels()):
        raise ValueError(f"need a matrix of NF4 codes (quantize_codebook with nf4_levels()), got {tuple(q.shape)}")
    if q.block_size not in SIZES or q.shape[1] % q.block_size:
        raise ValueError(
            f"bitsandbytes' blocks are {SIZES} and must divide the {q.shape[1]} inputs, got {q.block_size}"
        )
