"""Quantized tensors in a safetensors file, codes packed: what they weigh on disk, and back equal bit by bit."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quantlab.affine import QParams
from quantlab.granularity import PerAxis, PerGroup, PerTensor, QTensor
from quantlab.packing import pack, unpack

FORMAT = {"format": "quantlab", "version": "1"}
DTYPES = {
    str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


def save_tensors(path, tensors: dict[str, Tensor | QTensor]) -> int:
    """Write named tensors to one safetensors file, quantized ones packed; returns its size in bytes.

    The data of a QTensor takes exactly its nbytes: packed codes, scales, packed zero points unless symmetric. A header
    of names, shapes and settings comes on top. The file is written beside and renamed: it is whole, or not there.

    Raises: ValueError if a tensor is of no kind known here, or two names collide.
    """
    parts, settings = {}, {}
    for name, tensor in tensors.items():
        kind, own, settings[name] = _take_apart(name, tensor)
        settings[name] |= {"kind": kind, "parts": list(own)}
        for part, value in own.items():
            if f"{name}{part}" in parts:
                raise ValueError(f"two tensors would be stored as {name + part!r}; rename {name!r}")
            parts[f"{name}{part}"] = (
                value.detach().cpu().contiguous().clone()
            )  # the file holds no shared memory
    return _write_whole(Path(path), parts, FORMAT | {"tensors": json.dumps(settings)})


def load_tensors(path) -> dict[str, Tensor | QTensor]:
    """What save_tensors wrote, equal bit by bit, in the order in which it was given.

    Raises: FileNotFoundError if there is no file; ValueError if it is truncated, is no safetensors file, was not
    written by save_tensors, or its parts do not fit together.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, parts = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error})") from error
    if {key: metadata.get(key) for key in FORMAT} != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that save_tensors wrote")
    try:
        return {
            name: _put_together(name, parts, one) for name, one in json.loads(metadata["tensors"]).items()
        }
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} does not fit together: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class Kind:
    """How one class of tensor is stored: to parts (by suffix) and settings, and back."""

    of: type
    take_apart: Callable[[object], tuple[dict, dict]]
    put_together: Callable[[dict, dict], object]


def _take_apart(name: str, tensor) -> tuple[str, dict[str, Tensor], dict]:
    for kind, rule in KINDS.items():
        if isinstance(tensor, rule.of):
            return kind, *rule.take_apart(tensor)
    raise ValueError(f"{name!r} is a {type(tensor).__name__}; known are {', '.join(KINDS)}")


def _put_together(name: str, parts: dict[str, Tensor], settings: dict):
    own = {part: parts[f"{name}{part}"] for part in settings["parts"]}
    return KINDS[settings["kind"]].put_together(own, settings)


# --- plain tensors ----------------------------------------------------------------------------------------------


def _plain_apart(x: Tensor) -> tuple[dict, dict]:
    return {"": x}, {}


def _plain_together(parts: dict, settings: dict) -> Tensor:
    return parts[""]


# --- QTensor ----------------------------------------------------------------------------------------------------

GRANULARITIES = {"tensor": PerTensor, "axis": PerAxis, "group": PerGroup}


def _affine_apart(q: QTensor) -> tuple[dict, dict]:
    qp, middle = q.qparams, (q.qparams.qmin + q.qparams.qmax + 1) // 2
    parts = {".codes": q.packed(), ".scale": qp.scale}
    if not q.symmetric:
        parts[".zero_point"] = pack(qp.zero_point - qp.qmin, bits=q.bits)
    elif (qp.zero_point != middle).any():
        raise ValueError(f"a symmetric tensor has the middle code {middle} as zero_point everywhere")
    if q.group_index is not None:
        parts[".group_index"] = q.group_index
    word = next(w for w, of in GRANULARITIES.items() if isinstance(q.granularity, of))
    settings = {
        "bits": q.bits,
        "qmin": qp.qmin,
        "qmax": qp.qmax,
        "symmetric": q.symmetric,
        "granularity": [word, *vars(q.granularity).values()],
        "shape": list(q.codes.shape),
        "codes": str(q.codes.dtype).removeprefix("torch."),
        "dtype": str(q.dtype).removeprefix("torch."),
    }
    return parts, settings


def _affine_together(parts: dict, settings: dict) -> QTensor:
    bits, qmin, qmax, shape = (settings[key] for key in ("bits", "qmin", "qmax", "shape"))
    dtype = {"int8": torch.int8, "uint8": torch.uint8}[settings["codes"]]
    codes = unpack(parts[".codes"], bits=bits, count=torch.Size(shape).numel())
    codes = (codes.to(torch.int32) + qmin).to(dtype).reshape(shape)
    scale = parts[".scale"]
    if settings["symmetric"]:
        zero_point = torch.full(scale.shape, (qmin + qmax + 1) // 2, dtype=torch.int32)
    else:
        zero_point = unpack(parts[".zero_point"], bits=bits, count=scale.numel()).to(torch.int32) + qmin
    word, *values = settings["granularity"]
    q = QTensor(
        codes,
        QParams(scale, zero_point.reshape(scale.shape), qmin, qmax),
        bits,
        GRANULARITIES[word](*values),
        settings["symmetric"],
        DTYPES[settings["dtype"]],
        parts.get(".group_index"),
    )
    if q.dequantize().shape != codes.shape:  # scales of another shape would broadcast, or fail here
        raise ValueError(f"scales {tuple(scale.shape)} do not fit codes {tuple(codes.shape)}")
    return q


KINDS = {
    "plain": Kind(Tensor, _plain_apart, _plain_together),
    "affine": Kind(QTensor, _affine_apart, _affine_together),
}


def _write_whole(path: Path, parts: dict[str, Tensor], metadata: dict[str, str]) -> int:
    """Write to a file beside, reach the disk, then rename: nobody ever sees half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file(parts, part, metadata)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path.stat().st_size
