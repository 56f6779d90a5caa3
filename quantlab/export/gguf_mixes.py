"""Which tensor gets which blocks: what the S, M and the numbers in a file's name mean.

Written from llama-quant.cpp. A mix is a type for most tensors, and better ones for those that matter more.
"""

from collections.abc import Mapping

from quantlab.arguments import check_choice, check_int, check_kind
from quantlab.export.gguf_blocks import TYPES

# The mix, the type of most of its matrices, and the number by which a file names it (llama_ftype).
MIXES = {
    "F32": ("F32", 0), "F16": ("F16", 1), "BF16": ("BF16", 32), "Q8_0": ("Q8_0", 7), "Q4_0": ("Q4_0", 2),
    "Q4_1": ("Q4_1", 3), "Q5_0": ("Q5_0", 8), "Q5_1": ("Q5_1", 9), "Q4_K_S": ("Q4_K", 14), "Q4_K_M": ("Q4_K", 15),
    "Q5_K_S": ("Q5_K", 16), "Q5_K_M": ("Q5_K", 17), "Q6_K": ("Q6_K", 18),
}  # fmt: skip
# For rows that 256 does not divide: blocks of 32 in place of super-blocks.
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}


def tensor_types(shapes: dict[str, tuple[int, ...]], mix: str, blocks: int) -> dict[str, str]:
    """The type of each tensor of a Llama, by llama.cpp's names and its shape, in a mix; the model has so many blocks.

    Vectors stay float32. The head, or the embedding that is the head too, gets Q6_K. In a mix _M the values' and the
    down projections of the first and last eighth of the blocks, and of every third between, get Q6_K; in _S (of Q4_K)
    the first four values' and the first eighth of the down projections get Q5_K.

    >>> tensor_types({"blk.1.attn_v.weight": (64, 256), "blk.1.ffn_down.weight": (64, 96)}, "Q4_K_M", 8)
    {'blk.1.attn_v.weight': 'Q4_K', 'blk.1.ffn_down.weight': 'Q5_0'}
    """
    base, _ = MIXES[check_choice(mix, "mix", MIXES)]
    blocks, tied = check_int(blocks, "blocks", 0), "output.weight" not in check_kind(shapes, "shapes", Mapping)
    return {name: _type(name, shape, mix, base, blocks, tied) for name, shape in shapes.items()}


def _type(name: str, shape: tuple[int, ...], mix: str, base: str, blocks: int, tied: bool) -> str:
    if len(shape) == 1:
        return "F32"
    kind = base
    if TYPES[base].size > 1:
        kind = _better(name, mix, base, blocks, tied)
    if shape[-1] % TYPES[kind].size:
        kind = FALLBACK.get(kind, "F16")
    return "F16" if shape[-1] % TYPES[kind].size else kind


def _better(name: str, mix: str, base: str, blocks: int, tied: bool) -> str:
    if name == ("token_embd.weight" if tied else "output.weight"):
        return base if base == "Q8_0" else "Q6_K"
    if not name.endswith(("attn_v.weight", "ffn_down.weight")):
        return base
    block = int(name.split(".")[1])
    if mix.endswith("_M") and more_bits(block, blocks):
        return "Q6_K"
    early = block < 4 if "attn_v" in name else block < blocks // 8
    return "Q5_K" if mix == "Q4_K_S" and early else base


def more_bits(block: int, blocks: int) -> bool:
    """Whether a mix _M gives this block's values and down projection more bits.

    >>> [i for i in range(30) if more_bits(i, 30)]
    [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    """
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2
