"""GGUF files written: the head, and the tensors' bytes, as gguf_file describes them."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from quantlab.export.gguf_blocks import TYPES
from quantlab.export.gguf_file import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING, VERSION, GGUFTensor
from quantlab.files import write_whole


def write_gguf(path, metadata: Mapping, tensors: Mapping[str, GGUFTensor], check: Callable | None = None) -> int:
    """Write a file, whole or not at all; returns its size. check(path) may raise before it takes its place.

    A text is stored as one, True as a bool, an int as 4 bytes without sign, a float as float32. A list is of one kind;
    its ints have a sign.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:
            file.write(_padded(_head(metadata, tensors)))
            for t in tensors.values():
                file.write(_padded(t.packed.contiguous().numpy().tobytes()))

    return write_whole(path, write, check)


def _head(metadata: Mapping, tensors: Mapping[str, GGUFTensor]) -> bytes:
    parts, offset = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))], 0
    for key, value in metadata.items():
        parts += [_text(key), _value(value)]
    for name, t in tensors.items():
        sizes = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *reversed(t.shape))
        parts += [_text(name), sizes, struct.pack("<IQ", TYPES[t.kind].number, offset)]
        offset += -(-t.packed.numel() // ALIGNMENT) * ALIGNMENT
    return b"".join(parts)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % ALIGNMENT)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value) -> bytes:
    """A value with its type before it."""
    if isinstance(value, list):
        inside = 5 if all(isinstance(v, int) for v in value) else _number(value[0])  # 5: with a sign, as llama.cpp asks
        return struct.pack("<IIQ", ARRAY, inside, len(value)) + b"".join(_bare(inside, v) for v in value)
    return struct.pack("<I", _number(value)) + _bare(_number(value), value)


def _number(value) -> int:
    """The number of a value's type: text, bool, int of 4 bytes without sign, float32."""
    return STRING if isinstance(value, str) else 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6


def _bare(number: int, value) -> bytes:
    return _text(value) if number == STRING else struct.pack("<" + NUMBERS[number], value)
