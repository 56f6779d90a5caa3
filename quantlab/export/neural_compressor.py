"""What Intel Neural Compressor rounds by itself, as quantlab's tensors, so that its codes can be laid beside ours."""

import contextlib
import copy
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantlab.affine import QParams
from quantlab.arguments import check_flag, check_int, check_kind, kind
from quantlab.blocks import PerAxis, PerGroup
from quantlab.export.engines import engine
from quantlab.granularity import QTensor
from quantlab.lm.blocks import whole_windows
from quantlab.lm.measuring import checked_windows

__all__ = ["codes_of", "from_neural_compressor", "gptq_by_neural_compressor", "rtn_by_neural_compressor"]


def rtn_by_neural_compressor(
    model: nn.Module, *, bits: int = 4, group_size: int | None = 32, symmetric: bool = True
) -> nn.Module:  # fmt: skip
    """A copy of a model as Neural Compressor's round-to-nearest leaves it; a head of that name stays in float.

    Symmetric, its scale is the largest absolute weight over 7 (of 4 bits), where ours is over 7.5.
    Raises: ValueError if bits is not 1..8 (2..8 if symmetric) or group_size below 1; ModuleNotFoundError.
    """
    how = _grid(bits, group_size, symmetric)
    engine("neural_compressor")
    from neural_compressor.torch.quantization import RTNConfig

    return _converted(model, RTNConfig(**how, use_layer_wise=False), lambda new: None)


def gptq_by_neural_compressor(
    model: nn.Module, tokens: Tensor, *, bits: int = 4, group_size: int | None = 32, symmetric: bool = True,
    act_order: bool = False, block_size: int = 2048, window: int = 512,
) -> nn.Module:  # fmt: skip
    """A copy of a language model as Neural Compressor's GPTQ leaves it; its head stays in float. Damping is 0.01.

    tokens (n,) are read in windows. block_size columns are rounded before the others learn of their error, and a
    group's scale is taken from the weights *as the block found them*: of all groups of a block but the first it misses
    what the groups before gave out. With block_size = group_size it misses nothing, as ours does. 2048 is its default.

    Raises: ValueError as rtn_by_neural_compressor does, or if tokens do not fill a window; ModuleNotFoundError.
    """
    how = _grid(bits, group_size, symmetric)
    how |= {"act_order": check_flag(act_order, "act_order"), "block_size": check_int(block_size, "block_size", 1)}
    window, _ = checked_windows(model, tokens, window, None)
    engine("neural_compressor")
    from neural_compressor.torch.quantization import GPTQConfig

    def read(new):
        for ids in whole_windows(tokens, window):
            new(ids)

    return _converted(model, GPTQConfig(**how, percdamp=0.01, model_path="."), read)  # else it asks the hub for one


def from_neural_compressor(layer: nn.Module) -> QTensor:
    """Codes 0 .. 2**bits - 1, zero points and scales (float16, as it keeps them) of one of its weight-only layers.

    Raises: ValueError if it is no INCWeightOnlyLinear of integers; ModuleNotFoundError.
    """
    engine("neural_compressor")
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    if not isinstance(layer, INCWeightOnlyLinear) or "int" not in layer.dtype:
        raise ValueError(f"layer must be an INCWeightOnlyLinear of integers, got {kind(layer)}")
    parts = layer.unpack()
    codes, scale, zero = (parts[name] for name in ("int_weight", "scales", "zp"))
    size, top = layer.group_size, 2**layer.bits - 1
    if zero is None:
        raise ValueError("a layer without zero points is not in the form that GPTQ's files have")
    how = PerAxis(0) if size >= codes.shape[1] else PerGroup(size)
    index = None if layer.g_idx is None else layer.g_idx.to(torch.int32)
    if index is not None and torch.equal(index.long(), torch.arange(len(index)) // size):
        index = None
    qp = QParams(scale.float(), zero.to(torch.int32), 0, top)
    symmetric = bool((zero == (top + 1) // 2).all())
    return QTensor((codes.int() & top).to(torch.uint8), qp, layer.bits, how, symmetric, torch.float32, index)


def codes_of(model: nn.Module) -> dict[str, QTensor]:
    """{name: codes} of all weight-only layers that Neural Compressor put into a model."""
    engine("neural_compressor")
    from neural_compressor.torch.algorithms.weight_only.modules import INCWeightOnlyLinear

    named = check_kind(model, "model", nn.Module).named_modules()
    return {name: from_neural_compressor(layer) for name, layer in named if isinstance(layer, INCWeightOnlyLinear)}


def _grid(bits: int, group_size: int | None, symmetric: bool) -> dict:
    """Our words in its own."""
    symmetric = check_flag(symmetric, "symmetric")
    size = -1 if group_size is None else check_int(group_size, "group_size", 1)
    return {"bits": check_int(bits, "bits", 1 + symmetric, 8), "group_size": size, "use_sym": symmetric}


def _converted(model: nn.Module, config, read: Callable) -> nn.Module:
    """A copy that was prepared, has read, and was converted, in a folder of its own: it may leave files where it is."""
    from neural_compressor.torch.quantization import convert, prepare

    new = copy.deepcopy(check_kind(model, "model", nn.Module)).eval()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), torch.no_grad():
        prepared = prepare(new, config)
        read(prepared)
        return convert(prepared)
