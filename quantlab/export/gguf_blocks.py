"""GGUF's types of blocks: a float weight becomes the bytes that llama.cpp computes with, and bytes become floats."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_choice, check_real, check_tensor
from quantlab.export import gguf_simple as simple
from quantlab.export import gguf_supers as supers

ROWS = 2**20  # weights quantized at a time: a search holds a dozen copies of them


@dataclass(frozen=True)
class BlockType:
    """How many weights share a block, its bytes, and the way there and back."""

    number: int  # by which a file names it
    size: int  # weights in a block
    nbytes: int
    encode: Callable[[Tensor, Tensor | None], Tensor]  # blocks (n, size), weights of errors -> (n, nbytes)
    decode: Callable[[Tensor], Tensor]
    spread: str = "none"  # over what llama.cpp takes the mean square that goes into the weights: "row" or "block"

    @property
    def bits(self) -> float:
        """True bits per weight."""
        return 8 * self.nbytes / self.size


def _plain(number: int, dtype: torch.dtype) -> BlockType:
    nbytes = dtype.itemsize
    return BlockType(
        number, 1, nbytes, lambda x, _: x.to(dtype).view(torch.uint8), lambda raw: raw.contiguous().view(dtype).float()
    )


TYPES = {
    "F32": _plain(0, torch.float32),
    "F16": _plain(1, torch.float16),
    "BF16": _plain(30, torch.bfloat16),
    "Q8_0": BlockType(8, 32, 34, simple.encode_q8_0, simple.decode_q8_0),
    "Q4_0": BlockType(2, 32, 18, simple.encode_q4_0, simple.decode_q4_0, "row"),
    "Q4_1": BlockType(3, 32, 20, simple.encode_q4_1, simple.decode_q4_1, "row"),
    "Q5_0": BlockType(6, 32, 22, simple.encode_q5_0, simple.decode_q5_0, "row"),
    "Q5_1": BlockType(7, 32, 24, simple.encode_q5_1, simple.decode_q5_1, "row"),
    "Q4_K": BlockType(12, 256, 144, supers.encode_q4_k, supers.decode_q4_k, "block"),
    "Q5_K": BlockType(13, 256, 176, supers.encode_q5_k, supers.decode_q5_k, "block"),
    "Q6_K": BlockType(14, 256, 210, supers.encode_q6_k, supers.decode_q6_k),
}


def quantize_gguf(weight: Tensor, kind: str, *, importance: Tensor | None = None) -> Tensor:
    """The bytes of a weight in blocks of this type, (rows, bytes a row), uint8; blocks lie along the last dimension.

    importance (columns,), the mean x² of each input feature, weights the squared errors that the search for scales
    makes small. llama.cpp multiplies it by √(σ² + w²), σ² the mean square of the row (of the super-block, twice); in
    Q6_K it does not, and Q8_0 and floats have no search. A 0 counts as a millionth of the mean. Without importance,
    Q4_K, Q5_K and Q6_K search with weights of their own, the others round.

    Raises: ValueError if a row is no whole number of blocks, a scale does not fit into float16, or the importance is
    negative or of another length.

    >>> quantize_gguf(torch.ones(2, 64), "Q4_0").shape  # 18 bytes for 32 weights
    torch.Size([2, 36])
    """
    kind, of = check_choice(kind, "kind", TYPES), TYPES[kind]
    x = check_real(weight, "weight").detach().float()
    if x.ndim == 0 or x.shape[-1] % of.size:
        raise ValueError(f"{kind} has blocks of {of.size}: they do not divide rows of {x.shape[-1] if x.ndim else 0}")
    if of.size > 1 or kind == "F16":
        as_they_are = kind in ("F16", "Q4_1", "Q5_1")  # in these a weight, or a block's least, is a float16 itself
        if x.abs().max() > 65504 * (1 if as_they_are else 7):
            raise ValueError(f"{kind} keeps float16 numbers, up to 65504: a weight of {x.abs().max():.3g} is too large")
    rows = x.reshape(-1, x.shape[-1])
    importance = None if importance is None else _checked_importance(importance, rows.shape[-1])
    some = max(1, ROWS // rows.shape[-1])
    packed = [_quantize_rows(part, of, importance) for part in rows.split(some)]
    return torch.cat(packed).view(*x.shape[:-1], -1)


def dequantize_gguf(packed: Tensor, kind: str) -> Tensor:
    """The reals, float32, that the bytes stand for; the shape but for the last dimension is that of packed.

    Raises: ValueError if packed is not uint8, or its rows are no whole number of blocks.

    >>> dequantize_gguf(quantize_gguf(torch.arange(32.0), "Q8_0"), "Q8_0")[[0, 1, 31]]
    tensor([ 0.0000,  0.9766, 31.0059])
    """
    kind, of = check_choice(kind, "kind", TYPES), TYPES[kind]
    if check_tensor(packed, "packed").dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] % of.nbytes:
        raise ValueError(
            f"{kind} has blocks of {of.nbytes} bytes, uint8; got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    values = of.decode(packed.reshape(-1, of.nbytes))
    return values.reshape(*packed.shape[:-1], packed.shape[-1] // of.nbytes * of.size)


def _checked_importance(importance: Tensor, columns: int) -> Tensor:
    importance = check_real(importance, "importance").detach().float()
    if importance.shape != (columns,) or importance.min() < 0:
        raise ValueError(
            f"importance must be ({columns},) numbers that are not negative, the mean x² of each column's input; got "
            f"shape {tuple(importance.shape)}, least {importance.min():.3g}"
        )
    mean = importance.mean()  # a block whose errors cost nothing would get any scale, also 0
    return torch.where(importance > 0, importance, 1e-6 * mean if mean > 0 else 1.0)


def _quantize_rows(rows: Tensor, of: BlockType, importance: Tensor | None) -> Tensor:
    blocks, weights = rows.reshape(-1, of.size), None
    if importance is not None:
        weights = importance.expand_as(rows).reshape(-1, of.size)
        if of.spread == "row":
            square = rows.square().mean(-1).repeat_interleave(rows.shape[-1] // of.size)[:, None]
            weights = weights * (square + blocks.square()).sqrt()
        elif of.spread == "block":
            weights = weights * (2 * blocks.square().mean(-1, keepdim=True) + blocks.square()).sqrt()
    return of.encode(blocks, weights).view(len(rows), -1)
