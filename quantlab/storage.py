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
from quantlab.awq import ScaledQTensor
from quantlab.codebook import CodebookTensor, DoubleQuantized, fp4_levels, nf4_levels
from quantlab.floats import BlockFloatTensor, FloatFormat
from quantlab.granularity import PerAxis, PerGroup, PerTensor, QTensor
from quantlab.packing import pack, unpack

FORMAT = {"format": "quantlab", "version": "1"}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
CODES = {"int8": torch.int8, "uint8": torch.uint8}


Storable = Tensor | QTensor | ScaledQTensor | CodebookTensor | BlockFloatTensor


def save_tensors(path, tensors: dict[str, Storable]) -> int:
    """Write named tensors to one safetensors file, quantized ones packed; returns its size in bytes.

    The data of a quantized tensor takes exactly its nbytes: packed codes, scales, packed zero points unless symmetric,
    levels unless a name says them. A header of names, shapes and settings comes on top. The file is written beside and
    renamed: it is whole, or not there.

    Raises: ValueError if a tensor is of no kind or dtype known here, or two names collide; FileNotFoundError if there
    is no such folder.
    """
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"no folder {Path(path).parent}")
    parts, settings = {}, {}
    for name, tensor in tensors.items():
        kind, own, settings[name] = _take_apart(name, tensor)
        settings[name] |= {"kind": kind, "parts": list(own)}
        for part, value in own.items():
            if f"{name}{part}" in parts:
                raise ValueError(f"two tensors would be stored as {name + part!r}; rename {name!r}")
            parts[f"{name}{part}"] = value.detach().cpu().contiguous().clone()  # a file shares no memory
    return _write_whole(Path(path), parts, FORMAT | {"tensors": json.dumps(settings)})


def load_tensors(path) -> dict[str, Storable]:
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
        return {name: _put_together(name, parts, one) for name, one in json.loads(metadata["tensors"]).items()}
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError, ArithmeticError) as error:
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


def _name_of(dtype: torch.dtype, known: dict = DTYPES) -> str:
    for name, one in known.items():
        if one == dtype:
            return name
    raise ValueError(f"{dtype} is not stored here; known are {', '.join(known)}")


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
        "codes": _name_of(q.codes.dtype, CODES),
        "dtype": _name_of(q.dtype),
    }
    return parts, settings


def _affine_together(parts: dict, settings: dict) -> QTensor:
    bits, qmin, qmax, shape = (settings[key] for key in ("bits", "qmin", "qmax", "shape"))
    dtype = CODES[settings["codes"]]
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


# --- CodebookTensor ---------------------------------------------------------------------------------------------

# Levels that need not be stored, because a name says them.
PUBLISHED = {"nf4": nf4_levels, "fp4": fp4_levels, "fp4 (bitsandbytes)": lambda: fp4_levels(smallest=1 / 192)}


def _codebook_apart(q: CodebookTensor) -> tuple[dict, dict]:
    table = next((name for name, levels in PUBLISHED.items() if torch.equal(levels(), q.levels.cpu())), None)
    parts = {".codes": q.packed()} | ({".levels": q.levels} if table is None else {})
    if isinstance(q.absmax, Tensor):
        parts[".absmax"] = q.absmax
    else:
        parts |= {f".absmax.{name}": value for name, value in vars(q.absmax).items()}
    shape, dtype = list(q.codes.shape), _name_of(q.dtype)
    return parts, {"table": table, "bits": q.bits, "block_size": q.block_size, "shape": shape, "dtype": dtype}


def _codebook_together(parts: dict, settings: dict) -> CodebookTensor:
    shape = torch.Size(settings["shape"])
    codes = unpack(parts[".codes"], bits=settings["bits"], count=shape.numel()).reshape(shape)
    if ".absmax" in parts:
        absmax = parts[".absmax"]
    else:
        absmax = DoubleQuantized(*(parts[f".absmax.{name}"] for name in ("codes", "absmax", "offset")))
    levels = parts[".levels"] if settings["table"] is None else PUBLISHED[settings["table"]]()
    q = CodebookTensor(codes, absmax, levels, settings["block_size"], DTYPES[settings["dtype"]])
    blocks = -(-shape.numel() // q.block_size)
    if int(codes.max()) >= len(levels) or q.block_absmax().shape != (blocks,):
        raise ValueError(f"{len(levels)} levels and {len(q.block_absmax())} absmax do not fit {blocks} blocks of codes")
    return q


# --- BlockFloatTensor -------------------------------------------------------------------------------------------


def _floats_apart(q: BlockFloatTensor) -> tuple[dict, dict]:
    parts = {".codes": q.packed(), ".scales": q.scales}
    if q.tensor_scale is not None:
        parts[".tensor_scale"] = q.tensor_scale
    shape, dtype = list(q.codes.shape), _name_of(q.dtype)
    return parts, {"fmt": vars(q.fmt), "block_size": q.block_size, "shape": shape, "dtype": dtype}


def _floats_together(parts: dict, settings: dict) -> BlockFloatTensor:
    shape, fmt = torch.Size(settings["shape"]), FloatFormat(**settings["fmt"])
    codes = unpack(parts[".codes"], bits=fmt.bits, count=shape.numel()).reshape(shape)
    size, dtype = settings["block_size"], DTYPES[settings["dtype"]]
    if parts[".scales"].shape != (*shape[:-1], -(-shape[-1] // size)):
        raise ValueError(f"scales {tuple(parts['.scales'].shape)} do not fit codes {tuple(shape)} in blocks of {size}")
    return BlockFloatTensor(codes, parts[".scales"], fmt, size, parts.get(".tensor_scale"), dtype)


# --- ScaledQTensor (AWQ) ----------------------------------------------------------------------------------------


def _scaled_apart(scaled: ScaledQTensor) -> tuple[dict, dict]:
    parts, settings = _affine_apart(scaled.q)
    return parts | {".input_scale": scaled.input_scale.half()}, settings  # AWQ's scales are float16 numbers


def _scaled_together(parts: dict, settings: dict) -> ScaledQTensor:
    return ScaledQTensor(_affine_together(parts, settings), parts[".input_scale"].float())


KINDS = {
    "plain": Kind(Tensor, _plain_apart, _plain_together),
    "affine": Kind(QTensor, _affine_apart, _affine_together),
    "scaled": Kind(ScaledQTensor, _scaled_apart, _scaled_together),
    "codebook": Kind(CodebookTensor, _codebook_apart, _codebook_together),
    "block floats": Kind(BlockFloatTensor, _floats_apart, _floats_together),
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
