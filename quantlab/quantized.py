"""What all quantized tensors have in common: codes of a few bits, what makes reals of them, and how they are stored."""

import torch
from torch import Tensor

from quantlab.packing import pack, packed_size, unpack

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


class Quantized:
    """A tensor stored in few bits: codes, and beside them scales and the like, from which dequantize() makes reals.

    A subclass has codes, bits and dtype, and says what is stored beside the codes (side_parts), which settings a file
    needs to know (settings), and how all of it becomes a tensor again (from_codes). The rest follows from these.
    """

    codes: Tensor  # whole numbers, the shape of the original
    bits: int  # of one code
    dtype: torch.dtype  # of the original, and of dequantize()
    first_code = 0  # the smallest; codes are stored counted from it

    def dequantize(self) -> Tensor:
        """The reals that the codes stand for, in the dtype of the original."""
        raise NotImplementedError

    def side_parts(self) -> dict[str, Tensor]:
        """What is stored beside the codes, by name, as it is stored."""
        raise NotImplementedError

    def settings(self) -> dict:
        """What a file must say besides, as JSON can hold it; with bits, shape and dtype."""
        return {"bits": self.bits, "shape": list(self.shape), "dtype": dtype_name(self.dtype)}

    @classmethod
    def from_codes(cls, codes: Tensor, parts: dict[str, Tensor], settings: dict) -> "Quantized":
        """The tensor of codes counted from 0 (uint8), side parts and settings."""
        raise NotImplementedError

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor], settings: dict) -> "Quantized":
        """The tensor whose parts() and settings() these are."""
        shape = torch.Size(settings["shape"])
        codes = unpack(parts["codes"], bits=settings["bits"], count=shape.numel()).reshape(shape)
        return cls.from_codes(codes, parts, settings)

    def packed(self) -> Tensor:
        """The codes, counted from the smallest one, as a stream of bits (see packing.pack)."""
        return pack(
            self.codes if self.first_code == 0 else self.codes.to(torch.int16) - self.first_code, bits=self.bits
        )

    def parts(self) -> dict[str, Tensor]:
        """All that is stored, by name."""
        return {"codes": self.packed(), **self.side_parts()}

    @property
    def shape(self) -> torch.Size:
        """The shape of the original."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes to store it: packed codes, and all that stands beside them."""
        return packed_size(self.codes.numel(), self.bits) + sum(t.nbytes for t in self.side_parts().values())

    @property
    def bits_per_element(self) -> float:
        """True bits for each element, scales and the like included."""
        return 8 * self.nbytes / self.codes.numel()


def dtype_name(dtype: torch.dtype) -> str:
    """The word for a dtype in a file. Raises ValueError for one that is not stored."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"{dtype} is not stored here; known are {', '.join(DTYPES)}")
    return name


def smallest_exact(x: Tensor) -> Tensor:
    """x in 16 bits, bfloat16 or float16, where that loses nothing."""
    if not x.is_floating_point():
        return x
    fits = (d for d in (torch.bfloat16, torch.float16) if torch.equal(x.to(d).to(x.dtype), x))
    return x.to(next(fits, x.dtype))
