"""A layer's codes as the tensors of a checkpoint of compressed-tensors, GPTQ or AWQ, and back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantlab.affine import QParams
from quantlab.arguments import check_choice, check_kind
from quantlab.blocks import PerAxis, PerGroup
from quantlab.export.checkpoint_words import LAYOUTS
from quantlab.granularity import QTensor, code_range


def layer_parts(q: QTensor, layout: str) -> dict[str, Tensor]:
    """The tensors that stand for a layer's weight (out, in) in a checkpoint, by the end of their names.

    layout: "W4A16", "W8A16", "W8A8" are compressed-tensors'; "GPTQ" is version 1, "GPTQ v2" its successor; "AWQ".
    Scales of the last three are float16, so values move by up to 2⁻¹¹ of themselves; codes stay as they are.

    Raises: ValueError that names the rule if q does not fit: its bits, grid, groups, order of columns, or sizes.

    >>> from quantlab import quantize_tensor
    >>> q = quantize_tensor(torch.ones(8, 32), bits=4, granularity=PerGroup(32))
    >>> {name: tuple(part.shape) for name, part in layer_parts(q, "GPTQ").items()}
    {'qweight': (4, 8), 'scales': (1, 8), 'qzeros': (1, 1), 'g_idx': (32,)}
    """
    of = LAYOUTS[check_choice(layout, "layout", LAYOUTS)]
    how = check_kind(q, "q", QTensor, "quantize_tensor gives").granularity
    if q.bits != of.bits or q.symmetric not in of.grids or len(q.shape) != 2:
        grid = "" if len(of.grids) == 2 else "symmetric " if of.grids[0] else "asymmetric "
        raise ValueError(f"{layout} stores {grid}{of.bits}-bit matrices, got {q.bits} bits, symmetric={q.symmetric}")
    fits = of.rows if how == PerAxis(0) else of.groups and isinstance(how, PerGroup) and not q.shape[1] % how.group_size
    if not fits:
        kinds = ["one scale a row"] * of.rows + ["groups that divide the inputs"] * of.groups
        raise ValueError(f"{layout} stores {' or '.join(kinds)}, got {how} of {tuple(q.shape)}")
    if q.group_index is not None and not layout.startswith("GPTQ"):
        raise ValueError(f"{layout} has no place for the order of columns of act-order; GPTQ has")
    if q.symmetric and (q.qparams.zero_point != q.qparams.qmin + 2 ** (q.bits - 1)).any():
        raise ValueError("a symmetric tensor has the middle code as zero_point everywhere")
    return of.write(q)


def layer_codes(parts: Mapping[str, Tensor], layout: str, *, symmetric: bool, dtype=torch.float32) -> QTensor:
    """The QTensor of layer_parts' tensors: signed codes (out, in), scales float32. dtype: of what it stands for.

    Raises: ValueError for an unknown layout, or parts that are missing or do not fit each other.
    """
    of = LAYOUTS[check_choice(layout, "layout", LAYOUTS)]
    try:
        codes, scale, zero, index = of.read(check_kind(parts, "parts", Mapping))
    except KeyError as error:
        raise ValueError(f"{layout} needs a tensor {error}; there are {', '.join(map(str, parts))}") from error
    qmin, qmax = code_range(of.bits)
    scale, columns = scale.float(), codes.shape[1]
    zero = torch.zeros_like(scale, dtype=torch.int32) if symmetric or zero is None else zero.int() + qmin
    rows = scale.shape[1] == 1 and of.rows
    how = PerAxis(0) if rows else PerGroup(columns // scale.shape[1])
    in_order = index is None or torch.equal(index.long(), torch.arange(columns) // (columns // scale.shape[1]))
    qp = QParams(scale, zero, qmin, qmax)
    signed = (codes.short() + qmin).to(torch.int8)
    return QTensor(signed, qp, of.bits, how, symmetric, dtype, None if in_order or rows else index.int())


def configuration(model, qtensors: dict[str, QTensor], layout: str) -> dict:
    """What a loader needs to know, in the words of its library."""
    q = next(iter(qtensors.values()))
    size = q.granularity.group_size if isinstance(q.granularity, PerGroup) else None
    group, ordered = size or -1, q.group_index is not None
    if layout == "AWQ":
        return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    if layout.startswith("GPTQ"):
        version = "gptq" if layout == "GPTQ" else "gptq_v2"
        about = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": q.symmetric, "desc_act": ordered}
        return about | {"checkpoint_format": version, "lm_head": False}
    weights = {"num_bits": q.bits, "type": "int", "symmetric": q.symmetric, "strategy": "group" if size else "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    kind, inputs = ("int-quantized", inputs) if layout == "W8A8" else ("pack-quantized", None)
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in qtensors]
    one = {"targets": ["Linear"], "weights": weights | {"group_size": size}, "input_activations": inputs}
    about = {"quant_method": "compressed-tensors", "format": kind, "quantization_status": "compressed"}
    return about | {"ignore": others, "config_groups": {"group_0": one | {"output_activations": None}}}
