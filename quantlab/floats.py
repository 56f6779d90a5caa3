"""Floating-point formats from their bits, and blocks of small floats that share a scale (MX, NVFP4)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.arguments import check_codes, check_flag, check_int, check_kind, check_real, check_tensor
from quantlab.quantized import DTYPES, Quantized


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: one sign bit, then the exponent field E, then the mantissa field M.

        E > 0, normal      ±(1 + M / 2**mantissa_bits) * 2**(E - bias)
        E = 0, subnormal   ±(0 + M / 2**mantissa_bits) * 2**(1 - bias)          IEEE 754-2019, 3.4

    specials says what the largest E is kept for: "ieee" infinity (M = 0) and NaN; "nan" numbers, only with all
    bits of M set NaN (OCP's E4M3, "FN"); "none" numbers only (the 6- and 4-bit formats of OCP Microscaling).

    Raises: ValueError for fields that make no format, or one whose numbers float32 does not hold.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int  # stored; one more bit is significant, except in subnormals
    bias: int
    specials: str = "ieee"

    def __post_init__(self):
        vars(self).update(
            name=check_kind(self.name, "name", str),
            exponent_bits=check_int(self.exponent_bits, "exponent_bits", 1, 8),
            mantissa_bits=check_int(self.mantissa_bits, "mantissa_bits", 0, 22),
            bias=check_int(self.bias, "bias"),
        )
        enough = {"ieee": self.exponent_bits > 1, "nan": self.mantissa_bits > 0, "none": True}
        if not isinstance(self.specials, str) or self.specials not in enough:
            raise ValueError(f"specials must be one of {', '.join(enough)}, got {self.specials!r}")
        if not enough[self.specials]:
            raise ValueError(f"{self.name}: the codes kept for {self.specials!r} leave no normal number")
        if self.emax > 127 or self.emin - self.mantissa_bits < -149:
            raise ValueError(f"{self.name} reaches beyond float32, from 2**-149 to below 2**128")

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number, and of all subnormals."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """The exponent of the largest number."""
        return 2**self.exponent_bits - 1 - self.bias - (self.specials == "ieee")

    @property
    def largest(self) -> float:
        return (2 - (1 + (self.specials == "nan")) * 2.0**-self.mantissa_bits) * 2.0**self.emax

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """The least positive number (without mantissa bits there are no subnormals: then it is normal)."""
        return 2.0 ** (self.emin - self.mantissa_bits)


FP16 = FloatFormat("FP16", 5, 10, 15)
BF16 = FloatFormat("BF16", 8, 7, 127)
FP8_E4M3 = FloatFormat("FP8 E4M3", 4, 3, 7, "nan")  # these two: OCP 8-bit Floating Point (OFP8) v1.0
FP8_E5M2 = FloatFormat("FP8 E5M2", 5, 2, 15)
FP6_E3M2 = FloatFormat("FP6 E3M2", 3, 2, 3, "none")  # these three: OCP Microscaling Formats (MX) v1.0
FP6_E2M3 = FloatFormat("FP6 E2M3", 2, 3, 1, "none")
FP4_E2M1 = FloatFormat("FP4 E2M1", 2, 1, 1, "none")


def round_to(x: Tensor, fmt: FloatFormat, *, saturate: bool | None = None) -> Tensor:
    """x rounded to the nearest number of the format, ties to the even mantissa; float64 if x is, else float32.

        step = 2**(max(floor(log2|x|), emin) - mantissa_bits),   round_half_even(x / step) * step

    x is rounded once: a float64 does not pass through float32 (torch's own casts do, and then round twice).
    Above the largest number saturate=True gives the largest, False infinity, or NaN in a format without infinity.
    OCP leaves both open for FP8. None does as torch 2.13 casts: infinity where the format has one, else saturate.
    NaN stays NaN.

    Raises: ValueError if x is not floating point, is NaN in a format without NaN, or saturate=False has no code.

    >>> round_to(torch.tensor([1.1, 17.0, 500.0, 1e-3]), FP8_E4M3).tolist()
    [1.125, 16.0, 448.0, 0.001953125]
    """
    _check_input(x, fmt)
    saturate = saturate if saturate is None else check_flag(saturate, "saturate")
    if saturate is None:
        saturate = fmt.specials != "ieee"
    if not saturate and fmt.specials == "none":
        raise ValueError(f"{fmt.name} has neither infinity nor NaN: it can only saturate")
    exact = x.detach().double()
    step = _power_of_two(_exponent(exact, fmt) - fmt.mantissa_bits)
    rounded = torch.round(exact / step) * step  # exact but for the rounding: step is a power of two
    if saturate:
        rounded = rounded.clamp(-fmt.largest, fmt.largest)
    else:
        overflow = math.inf if fmt.specials == "ieee" else math.nan
        rounded = torch.where(rounded.abs() > fmt.largest, rounded.sign() * overflow, rounded)
    return rounded if x.dtype == torch.float64 else rounded.float()


def encode(x: Tensor, fmt: FloatFormat, *, saturate: bool | None = None) -> Tensor:
    """The bit patterns of round_to(x, fmt), sign first: uint8 for up to 8 bits, else int32. NaN has all bits set.

    >>> [f"{code:08b}" for code in encode(torch.tensor([1.125, -448.0, -0.0]), FP8_E4M3).tolist()]
    ['00111001', '11111110', '10000000']
    """
    value = round_to(x, fmt, saturate=saturate).double()
    exponent, finite = _exponent(value, fmt), torch.isfinite(value)
    mantissa = torch.where(finite, value.abs() / _power_of_two(exponent - fmt.mantissa_bits), 0).long()
    # A normal number's leading 1 stands in the exponent field's lowest bit, and adds the 1 that emin lacks.
    code = ((exponent - fmt.emin) << fmt.mantissa_bits) + mantissa
    code = torch.where(value.isinf(), (2**fmt.exponent_bits - 1) << fmt.mantissa_bits, code)
    code = torch.where(value.isnan(), 2 ** (fmt.bits - 1) - 1, code)
    code += value.signbit().long() << (fmt.bits - 1)
    return code.to(torch.uint8 if fmt.bits <= 8 else torch.int32)


def decode(codes: Tensor, fmt: FloatFormat) -> Tensor:
    """The numbers that bit patterns stand for, float32.

    Raises: ValueError if codes are not integers from 0 to 2**bits - 1.

    >>> decode(torch.tensor([0b0_01_0, 0b0_00_1, 0b1_11_1]), FP4_E2M1).tolist()
    [1.0, 0.5, -6.0]
    """
    check_kind(fmt, "fmt", FloatFormat, "FP8_E4M3")
    if check_codes(codes).numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**fmt.bits):
        raise ValueError(f"codes of {fmt.name} lie in 0..{2**fmt.bits - 1}, got {codes.min()}..{codes.max()}")
    codes, top = codes.long(), 2**fmt.exponent_bits - 1
    field = (codes >> fmt.mantissa_bits) & top
    mantissa = codes & (2**fmt.mantissa_bits - 1)
    significand = mantissa + ((field > 0).long() << fmt.mantissa_bits)
    value = significand * _power_of_two(field.clamp(min=1) - fmt.bias - fmt.mantissa_bits)
    if fmt.specials == "ieee":
        value = torch.where(field == top, torch.where(mantissa == 0, math.inf, math.nan), value)
    elif fmt.specials == "nan":
        value = value.masked_fill((field == top) & (mantissa == 2**fmt.mantissa_bits - 1), math.nan)
    return torch.where(codes >> (fmt.bits - 1) == 1, -value, value).float()


def values(fmt: FloatFormat) -> Tensor:
    """All finite numbers of the format in ascending order, float32; the two zeros are one.

    >>> values(FP4_E2M1).tolist()
    [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    check_kind(fmt, "fmt", FloatFormat, "FP8_E4M3")
    half = decode(torch.arange(2 ** (fmt.bits - 1)), fmt)  # codes of positive numbers grow with them
    half = half[half.isfinite()]
    return torch.cat([-half[1:].flip(0), half])


@dataclass(frozen=True, eq=False)
class BlockFloatTensor(Quantized):
    """Small floats, and a scale of 8 bits for each block of neighbours in the last dimension."""

    codes: Tensor  # uint8, bit patterns of fmt, the shape of the original
    scales: Tensor  # uint8, (..., blocks): bit patterns of E8M0, or of FP8 E4M3 where there is a tensor_scale
    fmt: FloatFormat
    block_size: int
    tensor_scale: Tensor | None = None  # float32, (): a second scale for the whole tensor (NVFP4)
    dtype: torch.dtype = torch.float32  # of the original, and of dequantize()

    def real_scales(self) -> Tensor:
        """What the elements of each block are multiplied by, float64, (..., blocks)."""
        if self.tensor_scale is None:
            return _power_of_two(self.scales.long() - 127)
        return decode(self.scales, FP8_E4M3).double() * self.tensor_scale.double()

    def dequantize(self) -> Tensor:
        """The reals that the codes stand for, in the dtype of the original."""
        index = torch.arange(self.codes.shape[-1], device=self.codes.device) // self.block_size
        reals, limit = decode(self.codes, self.fmt) * self.real_scales()[..., index], torch.finfo(self.dtype)
        return reals.clamp(limit.min, limit.max).to(self.dtype)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.fmt.bits

    def side_parts(self) -> dict[str, Tensor]:
        """One byte a block, and the scale of the tensor if it has one."""
        extra = {} if self.tensor_scale is None else {"tensor_scale": self.tensor_scale}
        return {"scales": self.scales} | extra

    def settings(self) -> dict:
        return super().settings() | {"fmt": vars(self.fmt), "block_size": self.block_size}

    @classmethod
    def from_codes(cls, codes: Tensor, parts: dict[str, Tensor], settings: dict) -> "BlockFloatTensor":
        fmt, size, dtype = FloatFormat(**settings["fmt"]), settings["block_size"], DTYPES[settings["dtype"]]
        if parts["scales"].shape != (*codes.shape[:-1], -(-codes.shape[-1] // size)):
            got = tuple(parts["scales"].shape)
            raise ValueError(f"scales {got} do not fit codes {tuple(codes.shape)} in blocks of {size}")
        return cls(codes, parts["scales"], fmt, size, parts.get("tensor_scale"), dtype)


def mx_quantize(x: Tensor, fmt: FloatFormat, *, block_size: int = 32) -> BlockFloatTensor:
    """x in blocks that share a power of two as their scale (E8M0), elements rounded to fmt.

        scale = 2**(floor(log2(max|x|)) - emax of fmt), exponent clamped to -127..127     OCP MX v1.0, 6.3

    Elements that lie above the largest number of fmt after scaling saturate: up to 1/4 of the largest element of
    a block is lost in FP4. An all-zero block gets the least scale. The last block may be shorter.

    Raises: ValueError if x is not finite and floating point, has no dimension, block_size < 1, or fmt has over 8 bits.

    >>> q = mx_quantize(torch.tensor([0.1, -0.2, 0.3, 0.75]), FP4_E2M1, block_size=4)
    >>> q.real_scales().tolist(), q.dequantize().tolist(), q.bits_per_element
    ([0.125], [0.125, -0.1875, 0.25, 0.75], 6.0)
    """
    _check_input(x, fmt)
    if fmt.bits > 8:
        raise ValueError(f"elements of a block have at most 8 bits, {fmt.name} has {fmt.bits}")
    blocks = _to_blocks(x, block_size)
    largest = blocks.abs().amax(-1)
    exponent = (torch.frexp(largest).exponent.long() - 1 - fmt.emax).clamp(-127, 127)
    exponent = torch.where(largest == 0, -127, exponent)
    codes = encode(blocks / _power_of_two(exponent)[..., None], fmt, saturate=True)
    codes = codes.flatten(-2)[..., : x.shape[-1]].contiguous()
    return BlockFloatTensor(codes, (exponent + 127).to(torch.uint8), fmt, block_size, None, x.dtype)


def nvfp4_quantize(x: Tensor) -> BlockFloatTensor:
    """x in FP4 E2M1: blocks of 16 with a scale in FP8 E4M3, and one float32 scale for the tensor.

        tensor scale = max|x| / (6 * 448),   block scale = E4M3(max|block| / 6 / tensor scale)
                                                     NVIDIA, "Pretraining LLMs with NVFP4", 2025, appendix

    The tensor scale lets the largest block's scale be 448, the largest of E4M3. A block so small that its own
    scale rounds to 0 becomes 0. The last block may be shorter.

    Raises: ValueError if x is not finite and floating point, or has no dimension.

    >>> q = nvfp4_quantize(torch.tensor([0.1, -0.2, 0.3, 0.75] * 8))
    >>> q.scales.tolist(), [round(v, 3) for v in q.dequantize()[:4].tolist()], q.bits_per_element
    ([126, 126], [0.125, -0.188, 0.25, 0.75], 5.5)
    """
    blocks, limit = _to_blocks(x, 16), torch.finfo(torch.float32)
    most = FP4_E2M1.largest * FP8_E4M3.largest
    tensor_scale = (blocks.abs().max() / most).clamp(limit.tiny, limit.max).float()
    scales = encode(blocks.abs().amax(-1) / FP4_E2M1.largest / tensor_scale.double(), FP8_E4M3, saturate=True)
    real = decode(scales, FP8_E4M3).double()[..., None] * tensor_scale.double()
    codes = encode(torch.where(real > 0, blocks / real, 0.0), FP4_E2M1)
    codes = codes.flatten(-2)[..., : x.shape[-1]].contiguous()
    return BlockFloatTensor(codes, scales, FP4_E2M1, 16, tensor_scale, x.dtype)


def _check_input(x: Tensor, fmt: FloatFormat) -> None:
    check_kind(fmt, "fmt", FloatFormat, "FP8_E4M3")
    if not check_tensor(x).is_floating_point():
        raise ValueError(f"x must be floating point, got {x.dtype}")
    has_nan = fmt.specials == "nan" or fmt.specials == "ieee" and fmt.mantissa_bits > 0
    if not has_nan and x.isnan().any():
        raise ValueError(f"x holds {int(x.isnan().sum())} NaN, and {fmt.name} has no code for NaN")


def _exponent(x: Tensor, fmt: FloatFormat) -> Tensor:
    """floor(log2|x|) from the bits of x, no less than emin (subnormals, 0), at most emax + 1 (overflow)."""
    exponent = torch.frexp(x).exponent.long() - 1
    return torch.where(x == 0, fmt.emin, exponent.clamp(fmt.emin, fmt.emax + 1))


def _power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent, float64, from its bits: torch.pow and exp2 need not be exact."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _to_blocks(x: Tensor, block_size: int) -> Tensor:
    """x as float64 (..., blocks, elements); a short last block is filled up with zeros."""
    check_real(x)
    check_int(block_size, "block_size", 1)
    if x.ndim == 0:
        raise ValueError("blocks need at least one dimension, got a scalar")
    size = min(block_size, x.shape[-1])
    return F.pad(x.detach().double(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
