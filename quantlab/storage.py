"""Quantized tensors in a safetensors file, codes packed: what they weigh on disk, and back equal bit by bit."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.arguments import check_file, check_kind, check_path
from quantlab.awq import MixedQTensor, ScaledQTensor
from quantlab.codebook import CodebookTensor
from quantlab.files import write_whole
from quantlab.floats import BlockFloatTensor
from quantlab.granularity import QTensor
from quantlab.quantized import Quantized

FORMAT = {"format": "quantlab", "version": "1"}
KINDS = {
    "affine": QTensor,
    "scaled": ScaledQTensor,
    "mixed": MixedQTensor,
    "codebook": CodebookTensor,
    "block floats": BlockFloatTensor,
}
Storable = Tensor | Quantized


def save_tensors(path, tensors: dict[str, Storable]) -> int:
    """Write named tensors to one safetensors file, quantized ones packed; returns its size in bytes.

    The data of a quantized tensor takes exactly its nbytes: packed codes, scales, packed zero points unless symmetric,
    levels unless a name says them. A header of names, shapes and settings comes on top. The file is written beside and
    renamed: it is whole, or not there.

    Raises: ValueError if a tensor is of no kind or dtype known here, or two names collide; FileNotFoundError if there
    is no such folder.
    """
    path, parts, settings = check_path(path), {}, {}
    for name, tensor in check_kind(tensors, "tensors", Mapping, '{"name": tensor}').items():
        kind, own, settings[name] = _take_apart(name, tensor)
        settings[name] |= {"kind": kind, "parts": list(own)}
        for part, value in own.items():
            if f"{name}{part}" in parts:
                raise ValueError(f"two tensors would be stored as {name + part!r}; rename {name!r}")
            parts[f"{name}{part}"] = value.detach().cpu().contiguous().clone()  # a file shares no memory
    metadata = FORMAT | {"tensors": json.dumps(settings)}
    return write_whole(path, lambda part: save_file(parts, part, metadata))


def load_tensors(path) -> dict[str, Storable]:
    """What save_tensors wrote, equal bit by bit, in the order in which it was given.

    Raises: FileNotFoundError if there is no file; ValueError if it is truncated, is no safetensors file, was not
    written by save_tensors, or its parts do not fit together.
    """
    metadata, parts = read_parts(path)
    if {key: metadata.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that save_tensors wrote")
    try:
        return {name: _put_together(name, parts, one) for name, one in json.loads(metadata["tensors"]).items()}
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{path} does not fit together: {type(error).__name__}: {error}") from error


def read_parts(path) -> tuple[dict, dict[str, Tensor]]:
    """(metadata, tensors by name) of any safetensors file.

    Raises: FileNotFoundError if there is no file, ValueError with its name if it is truncated or no safetensors file.
    """
    with _opened(path) as file:
        return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}


def read_names(path) -> list[str]:
    """The names of the tensors in any safetensors file; errors as read_parts."""
    with _opened(path) as file:
        return list(file.keys())


def read_metadata(path) -> dict[str, str]:
    """What any safetensors file says of itself, its tensors left unread; errors as read_parts."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path) -> Iterator:
    path = check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error


def _take_apart(name: str, tensor) -> tuple[str, dict[str, Tensor], dict]:
    """(kind, what is stored by the ending of its name, settings)."""
    if isinstance(tensor, Tensor):
        return "plain", {"": tensor}, {}
    for kind, of in KINDS.items():
        if isinstance(tensor, of):
            return kind, {f".{part}": value for part, value in tensor.parts().items()}, tensor.settings()
    raise ValueError(f"{name!r} is a {type(tensor).__name__}; known are plain, {', '.join(KINDS)}")


def _put_together(name: str, parts: dict[str, Tensor], settings: dict) -> Storable:
    own = {part.removeprefix("."): parts[f"{name}{part}"] for part in settings["parts"]}
    return own[""] if settings["kind"] == "plain" else KINDS[settings["kind"]].from_parts(own, settings)
