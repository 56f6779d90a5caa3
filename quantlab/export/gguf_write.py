"""GGUF files written: the head, and the tensors' bytes, as gguf_file describes them."""

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

from quantlab.export.gguf_blocks import TYPES
from quantlab.export.gguf_file import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING, VERSION, GGUFTensor
from quantlab.files import write_whole


def write_gguf(path, metadata: Mapping, tensors: Mapping[str, GGUFTensor], check: Callable | None = None) -> int:
    """Write a file, whole or not at all; returns its size. check(path) may raise before it takes its place.

    A text is stored as one, True as a bool, an int as 4 bytes without sign, a float as float32; a list is of one kind.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:
            file.write(_padded(_head(metadata, tensors)))
            for t in tensors.values():
                file.write(_padded(t.packed.contiguous().numpy().tobytes()))
        if check is not None:
            check(part)

    return write_whole(path, write)


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
    """A value with its type before it; of a list, that of its first."""
    if isinstance(value, list):
        inside = [_value(v) for v in value]
        return (
            struct.pack("<I", ARRAY)
            + (inside[0][:4] if inside else struct.pack("<I", STRING))
            + struct.pack("<Q", len(value))
            + b"".join(v[4:] for v in inside)
        )
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    number = 7 if isinstance(value, bool) else 4 if isinstance(value, int) else 6
    return struct.pack("<I" + NUMBERS[number], number, value)
