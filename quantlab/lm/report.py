"""What quantizing a model did: a row for each layer, and the bytes of the whole."""

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from quantlab.arguments import check_kind, check_model, check_path, kind
from quantlab.files import write_whole
from quantlab.lm.layers import blocks_of
from quantlab.methods import Method, plain


class LayerReport(NamedTuple):
    """What quantizing did to one layer."""

    name: str
    output_error: float | None  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the tokens; None: not measured
    weight_error: float  # ‖W - Ŵ‖² / ‖W‖²
    bits_per_weight: float
    seconds: float  # to round it
    held_out_error: float | None = None  # the output error on the held-out tokens; None: not asked for


@dataclass
class QuantizeReport:
    """What quantize_lm did: the method, a row for each layer, the codes, and the bytes of the whole model."""

    method: Method
    calibration_tokens: int  # that the method looked at; 0 for one that needs no data
    layers: list[LayerReport] = field(default_factory=list)
    qtensors: Mapping = field(default_factory=dict, repr=False)  # by layer: QTensors or integer layers
    seconds: float = 0.0  # of the whole walk; of the rounding alone where no data are needed
    nbytes: int = 0  # of the whole model: packed layers, everything else in 16 bits
    bits_per_parameter: float = 0.0  # 8 * nbytes / parameters
    note: str = ""  # what to mind about these numbers
    left_in_float: float = 0.0  # fraction of the blocks' weights that are in no layer above: a mixture's experts, say

    def __str__(self) -> str:
        apart = any(row.held_out_error is not None for row in self.layers)
        lines = [
            f"{'layer':44}{'output error':>13}{'weight error':>13}{'bits':>7}{'ms':>7}{'held-out error' * apart:>16}"
        ]
        lines += [
            f"{r.name:44}{_number(r.output_error):>13}{r.weight_error:13.2e}{r.bits_per_weight:7.2f}"
            f"{r.seconds * 1e3:7.0f}{_number(r.held_out_error) * apart:>16}"
            for r in self.layers
        ]
        lines = [line.rstrip() for line in lines]
        lines.append(
            f"{self.method.name}: {self.nbytes:,} bytes, {self.bits_per_parameter:.2f} bits per parameter, "
            f"{self.seconds:.1f} s"
        )
        lines += [self.note] if self.note else []
        if self.left_in_float >= 0.005:
            lines.append(left_in_float_note(self.left_in_float))
        return "\n".join(lines)

    def save(self, path) -> Path:
        """Write the report to a .json file (everything but the codes) or a .csv file (a row for each layer).

        Written whole or not at all. Raises: ValueError for another ending, FileNotFoundError if there is no folder.
        """
        path = check_path(path)
        if path.suffix not in (".json", ".csv"):
            raise ValueError(f"a report is saved as .json or .csv, got {path.name!r}")
        write_whole(path, self._json() if path.suffix == ".json" else self._csv())
        return path

    def _json(self) -> str:
        whole = {name: value for name, value in vars(self).items() if name not in ("qtensors", "method", "layers")}
        settings = {name: plain(value) for name, value in self.method.settings.items()}
        layers = [row._asdict() for row in self.layers]
        return json.dumps({"method": self.method.name, "settings": settings, **whole, "layers": layers}, indent=1)

    def _csv(self) -> str:
        file = io.StringIO()
        csv.writer(file).writerows([LayerReport._fields, *self.layers])
        return file.getvalue()


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"


def left_in_float_note(fraction: float) -> str:
    """The sentence that report and ledger show."""
    return f"left in float: {fraction:.0%} of the blocks' weights (a mixture's experts or routers, no linear layer)"


def left_in_float(model, layers) -> float:
    """The fraction of the weights in the blocks (matrices and beyond) that belong to none of these layers, by name."""
    prefix, blocks = blocks_of(model)
    whole, left = 0, 0
    for name, module in blocks.named_modules():
        if ".lora_" in name:  # adapters stand beside the weights
            continue
        full, own = f"{prefix}.{name}", [p.numel() for p in module.parameters(recurse=False) if p.ndim > 1]
        packed = module.in_features * module.out_features if hasattr(module, "nbytes") else 0
        whole += sum(own) + packed
        left += 0 if full in layers or packed else sum(own)
    return left / whole if whole else 0.0


def model_bytes(model, qtensors: Mapping | None = None) -> int:
    """Bytes to store a model: its quantized layers as they say (nbytes), every other parameter in 16 bits.

    qtensors are quantized weights by layer name; layers that hold packed or int8 weights count by themselves.
    """
    given = {} if qtensors is None else check_kind(qtensors, "qtensors", Mapping, "the report of quantize_lm has")
    for name, q in given.items():
        if not hasattr(q, "nbytes"):
            raise ValueError(f"qtensors[{name!r}] must be a quantized tensor or layer, got {kind(q)}")
    packed = {n: m for n, m in check_model(model).named_modules() if hasattr(m, "nbytes")} | dict(given)
    others = (p for name, p in model.named_parameters() if name.removesuffix(".weight") not in packed)
    return sum(2 * p.numel() for p in others) + sum(q.nbytes for q in packed.values())
