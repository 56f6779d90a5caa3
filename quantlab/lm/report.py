"""What quantizing a model did: a row for each layer, and the bytes of the whole."""

from dataclasses import dataclass, field
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
    qtensors: dict = field(
        default_factory=dict, repr=False
    )  # by layer: QTensors, or the integer layers; with nbytes
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


def model_bytes(model, qtensors: dict | None = None) -> int:
    """Bytes to store a model: its quantized layers as they say (nbytes), every other parameter in 16 bits."""
    packed = qtensors or {}
    others = (p for name, p in model.named_parameters() if name.removesuffix(".weight") not in packed)
    return sum(2 * p.numel() for p in others) + sum(q.nbytes for q in packed.values())
