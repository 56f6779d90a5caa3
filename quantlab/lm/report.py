"""What quantizing a model did: a row for each layer, and the bytes of the whole."""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class LayerReport(NamedTuple):
    """What quantizing did to one layer."""

    name: str
    output_error: float  # ‖X(W - Ŵ)ᵀ‖² / ‖XWᵀ‖² on the calibration tokens
    weight_error: float  # ‖W - Ŵ‖² / ‖W‖²
    bits_per_weight: float
    seconds: float


@dataclass
class QuantizeReport:
    """What quantize_lm did: the settings, a row for each layer, the codes, and the bytes of the whole model."""

    method: str
    settings: dict
    calibration_tokens: int
    layers: list[LayerReport] = field(default_factory=list)
    qtensors: Mapping = field(default_factory=dict, repr=False)  # by layer: QTensors or integer layers
    seconds: float = 0.0
    nbytes: int = 0  # of the whole model: packed layers, everything else in 16 bits
    bits_per_parameter: float = 0.0  # 8 * nbytes / parameters

    def __str__(self) -> str:
        lines = [f"{'layer':44}{'output error':>13}{'weight error':>13}{'bits':>7}{'ms':>7}"]
        lines += [
            f"{r.name:44}{r.output_error:13.2e}{r.weight_error:13.2e}{r.bits_per_weight:7.2f}{r.seconds * 1e3:7.0f}"
            for r in self.layers
        ]
        lines.append(
            f"{self.method}: {self.nbytes:,} bytes, {self.bits_per_parameter:.2f} bits per parameter, "
            f"{self.seconds:.1f} s"
        )
        return "\n".join(lines)

    def save(self, path) -> Path:
        """Write the report to a .json file (everything but the codes) or a .csv file (a row for each layer).

        Written whole or not at all. Raises: ValueError for another ending, FileNotFoundError if there is no folder.
        """
        path = Path(path)
        if path.suffix not in (".json", ".csv"):
            raise ValueError(f"a report is saved as .json or .csv, got {path.name!r}")
        text = self._json() if path.suffix == ".json" else self._csv()
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8", newline="")
        os.replace(part, path)
        return path

    def _json(self) -> str:
        whole = {name: value for name, value in vars(self).items() if name != "qtensors"}
        whole["layers"] = [row._asdict() for row in self.layers]
        return json.dumps(whole, indent=1, default=lambda x: getattr(x, "__name__", repr(x)))  # an observer

    def _csv(self) -> str:
        file = io.StringIO()
        csv.writer(file).writerows([LayerReport._fields, *self.layers])
        return file.getvalue()


def model_bytes(model, qtensors: Mapping | None = None) -> int:
    """Bytes to store a model: its quantized layers as they say (nbytes), every other parameter in 16 bits."""
    packed = qtensors or {}
    others = (p for name, p in model.named_parameters() if name.removesuffix(".weight") not in packed)
    return sum(2 * p.numel() for p in others) + sum(q.nbytes for q in packed.values())
