"""The GGUF file: a magic word, what is known of the model, a table of tensors, and their bytes.

"GGUF", version 3, number of tensors, number of keys            4 + 4 + 8 + 8 bytes, little-endian throughout
for each key:     its name, the type of its value, the value    a text is its length (8 bytes) and its bytes
for each tensor:  its name, dimensions, type, offset            the dimension that lies side by side comes first
padding to 32 bytes, and the tensors, each padded to 32         offsets count from here
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.arguments import check_file
from quantlab.export.gguf_blocks import TYPES, dequantize_gguf

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
KINDS = {of.number: kind for kind, of in TYPES.items()}
NUMBERS = dict(zip(range(8), "BbHhIif?", strict=True)) | {10: "Q", 11: "q", 12: "d"}  # as struct names them
STRING, ARRAY = 8, 9


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor of a file: its type, its bytes as (rows, bytes a row), and where they begin."""

    kind: str
    shape: tuple[int, ...]  # as torch has it: the dimension that lies side by side is last
    packed: Tensor
    offset: int = 0  # in the file

    def dequantize(self) -> Tensor:
        """Its values, float32."""
        return dequantize_gguf(self.packed, self.kind).reshape(self.shape)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """What a file says of the model, by key, and its tensors, by name; bytes are read from disk when they are used."""

    metadata: dict
    tensors: dict[str, GGUFTensor]


def read_gguf(path) -> GGUFFile:
    """A GGUF file, of version 2 or 3.

    Raises: FileNotFoundError if there is none, ValueError if it is none, is damaged, or holds a type of tensor that is
    not known here.
    """
    path = check_file(path)
    size = path.stat().st_size
    raw = torch.from_file(str(path), size=size, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
    try:
        return _read(raw)
    except (struct.error, UnicodeDecodeError, RuntimeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: it ends early, or has a type of value that GGUF has not") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(raw: Tensor) -> GGUFFile:
    if bytes(raw[:4].tolist()) != MAGIC:
        raise ValueError("not a GGUF file, which begins with the letters GGUF")
    cursor = _Cursor(raw, 4)
    if (version := cursor.number("I")) not in (2, 3):
        raise ValueError(f"GGUF version {version}; versions 2 and 3 are known")
    count, keys = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(keys):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    table = [cursor.entry() for _ in range(count)]
    align = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"damaged: tensors are aligned to {align!r} bytes, which must be 1 or more")
    start = -(-cursor.at // align) * align
    return GGUFFile(metadata, {name: _tensor(raw, start, name, *entry) for name, *entry in table})


def _tensor(raw: Tensor, start: int, name: str, dimensions: list[int], number: int, offset: int) -> GGUFTensor:
    if number not in KINDS:
        raise ValueError(f"{name} has blocks of type {number}; known here are {', '.join(TYPES)}")
    kind, shape, of = KINDS[number], tuple(reversed(dimensions)), TYPES[KINDS[number]]
    if not shape or shape[-1] % of.size:
        raise ValueError(f"{name} of shape {shape} is no whole number of blocks of {of.size} ({kind})")
    begin, row = start + offset, shape[-1] // of.size * of.nbytes
    nbytes = row * torch.Size(shape[:-1]).numel()
    if begin + nbytes > len(raw):
        raise ValueError(f"damaged: {name} would end at byte {begin + nbytes} of {len(raw)}")
    return GGUFTensor(kind, shape, raw[begin : begin + nbytes].view(-1, row), begin)


class _Cursor:
    """Reads one value after the other from the head of a file."""

    def __init__(self, raw: Tensor, at: int):
        self.raw, self.at = memoryview(raw.numpy()), at

    def number(self, code: str):
        (value,) = struct.unpack_from("<" + code, self.raw, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        length = self.number("Q")
        self.at += length
        if self.at > len(self.raw):
            raise ValueError("damaged: a text is longer than the file")
        return str(self.raw[self.at - length : self.at], "utf-8")

    def value(self, number: int):
        if number == STRING:
            return self.text()
        if number != ARRAY:
            return self.number(NUMBERS[number])
        inside, count = self.number("I"), self.number("Q")
        return [self.value(inside) for _ in range(count)]

    def entry(self) -> tuple:
        name, dimensions = self.text(), self.number("I")
        return name, [self.number("Q") for _ in range(dimensions)], self.number("I"), self.number("Q")
