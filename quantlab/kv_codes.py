"""Keys and values of attention in a few bits: whole chunks of tokens, each group on a grid from minimum to maximum."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantlab.arguments import check_choice, check_int, check_real
from quantlab.packing import pack, unpack

DIM = {"channel": 3, "token": 4}  # of (batch, heads, chunks, tokens, channels): along which a group shares its range


@dataclass(frozen=True, eq=False)
class Chunks:
    """Keys or values of whole chunks of tokens, in a few bits: real ≈ minimum + scale * code, KIVI's convention.

    Unlike QParams' map this one need not hold 0: a channel of keys may lie far from it. (Liu et al. 2024, sec. 3.1)
    """

    codes: Tensor  # packed, uint8, (batch, heads, chunks, bytes)
    scale: Tensor  # float16; per channel (batch, heads, chunks, 1, channels), per token (.., tokens, groups)
    minimum: Tensor  # float16, likewise
    bits: int
    per: str
    group_size: int  # tokens in a chunk, and how many neighbours share a range
    channels: int

    def dequantize(self) -> Tensor:
        """The reals that the codes stand for, float32, (batch, heads, tokens, channels)."""
        shape = (*self.codes.shape[:3], self.group_size, self.channels)
        codes = unpack(self.codes, bits=self.bits, count=torch.Size(shape).numel()).view(shape)
        scale, minimum = (self._spread(part.float()) for part in (self.scale, self.minimum))
        return torch.addcmul(minimum, scale, codes.float()).flatten(2, 3)

    def _spread(self, part: Tensor) -> Tensor:
        """A number for each channel from one for each group of channels; one for all tokens stays as it is."""
        return part if self.per == "channel" else _repeat(part, self.group_size, self.channels)

    def change(self, how: Callable) -> "Chunks":
        """The same change made to all that is stored, such as a choice of rows."""
        return replace(self, codes=how(self.codes), scale=how(self.scale), minimum=how(self.minimum))

    def followed_by(self, more: "Chunks") -> "Chunks":
        codes, scale, minimum = (
            torch.cat([getattr(self, name), getattr(more, name)], 2) for name in ("codes", "scale", "minimum")
        )
        return replace(self, codes=codes, scale=scale, minimum=minimum)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes


def quantize_kv(x: Tensor, *, bits: int, per: str, group_size: int = 32) -> Chunks:
    """x in codes of `bits` bits, each group on a grid from its own minimum to its own maximum.

    per="channel": group_size tokens that follow each other share a range in each channel, as KIVI has the keys.
    per="token": group_size channels beside each other share a range in each token, as it has the values; the last
    group may be shorter. No element is off by more than half a step.

    Shapes: x (batch, heads, tokens, channels), tokens a multiple of group_size. Raises: ValueError if they are not, if
    bits is not 2..8, group_size no multiple of 8 (a chunk must fill whole bytes), or x beyond float16.

    >>> x = torch.arange(8.0).view(1, 1, 8, 1)
    >>> q = quantize_kv(x, bits=2, per="channel", group_size=8)
    >>> q.dequantize().flatten().tolist(), q.nbytes   # a step of 7/3, rounded to float16 upwards; 8 codes, 2 numbers
    ([0.0, 0.0, 2.333984375, 2.333984375, 4.66796875, 4.66796875, 7.001953125, 7.001953125], 6)
    """
    bits, group_size = check_int(bits, "bits", 2, 8), check_group(group_size)
    dim, x = DIM[check_choice(per, "per", DIM)], check_states(x).detach()
    if x.shape[2] % group_size:
        raise ValueError(f"need a multiple of group_size={group_size} tokens, got {x.shape[2]}")
    chunks = _within_half(to_half(x)).float().unflatten(2, (-1, group_size))
    groups = _in_groups(chunks, dim, group_size)
    minimum = groups.amin(dim + 1).half()
    scale = _half_above((groups.amax(dim + 1) - minimum.float()) / (2**bits - 1))
    empty = chunks.new_empty(0, dtype=torch.uint8)
    q = Chunks(empty, scale, minimum, bits, per, group_size, x.shape[3])
    codes = ((chunks - q._spread(minimum.float())) / q._spread(scale.float())).round_().clamp_(0, 2**bits - 1)
    return replace(q, codes=pack(codes.to(torch.uint8), bits=bits).view(*chunks.shape[:3], -1))


def check_states(x: Tensor, name: str = "x") -> Tensor:
    """x; ValueError unless it has the shape of keys and values."""
    if check_real(x, name).ndim != 4:
        raise ValueError(f"{name} must be (batch, heads, tokens, channels), got {tuple(x.shape)}")
    return x


def to_half(x: Tensor) -> Tensor:
    """x in 16 bits: as it is if it has no more, else in float16; ValueError where that would be infinite."""
    return x if x.element_size() == 2 else _within_half(x).half()


def check_group(group_size) -> int:
    if check_int(group_size, "group_size", 8) % 8:
        raise ValueError(f"group_size must be a multiple of 8, so that a chunk fills whole bytes, got {group_size}")
    return int(group_size)


def _within_half(x: Tensor) -> Tensor:
    most = x.abs().max() if x.numel() else 0
    if most > torch.finfo(torch.float16).max:
        raise ValueError(f"keys and values must fit into float16, below 65504, got {most:.4g}")
    return x


def _in_groups(x: Tensor, dim: int, group_size: int) -> Tensor:
    """dim cut into (groups, group_size); a short last group is filled up with its last element."""
    count = -(-x.shape[dim] // group_size)
    index = torch.arange(count * group_size, device=x.device).clamp_(max=x.shape[dim] - 1)
    return x.index_select(dim, index).unflatten(dim, (count, group_size))


def _repeat(part: Tensor, group_size: int, channels: int) -> Tensor:
    return part.repeat_interleave(group_size, -1)[..., :channels]


def _half_above(x: Tensor) -> Tensor:
    """The next float16 that is not below x, and above 0: with it the codes reach the maximum."""
    half = x.clamp(min=2.0**-24).half()
    return torch.where(half.float() < x, torch.nextafter(half, torch.full_like(half, torch.inf)), half)
