"""What a method of quantization is: an object with settings, which says what it needs and rounds what it is given."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor, nn

from quantlab.arguments import check_flag, check_int
from quantlab.hessian import Hessian
from quantlab.linear import Int8Linear
from quantlab.quantized import Quantized


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to quantize a model, with its settings. Settings are checked when it is made; repr shows them all."""

    name: ClassVar[str]  # as quantize_lm(method=...) and the ledger call it
    needs_data: ClassVar[bool]  # whether it looks at what layers read: calibration tokens
    words: ClassVar[dict[str, str]] = {}  # what the ledger calls a setting that is not its default

    @property
    def settings(self) -> dict:
        """All settings by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def label(self) -> str:
        """What the ledger calls it: the name, and a word for each setting beside bits and groups that is no default."""
        words = [self.name]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("bits", "group_size", "per") and value != field.default:
                words.append(self.words[field.name] if value is True else f"{field.name}={plain(value)}")
        return " ".join(words)

    @property
    def ledger_bits(self) -> int | Mapping[str, int]:
        """Bits of a code, as the ledger's column has it; by layer where they differ."""
        raise NotImplementedError

    @property
    def ledger_group(self) -> str:
        """What shares a scale, as the ledger's column has it."""
        raise NotImplementedError


class WeightMethod(Method):
    """Rounds weights alone; the layers stay float layers, whose weights lie on a grid."""

    def round(self, weights: list[Tensor], hessian: Hessian | None) -> list[Quantized]:
        """The weights, (out, in) each, of layers that read one input, rounded. A Hessian of it where needs_data."""
        raise NotImplementedError

    def for_layer(self, layer: str) -> "WeightMethod":
        """This method with the bits of one layer, where bits differ by layer."""
        bits = getattr(self, "bits", None)
        return replace(self, bits=bits[layer]) if isinstance(bits, Mapping) else self

    @property
    def ledger_bits(self) -> int | Mapping[str, int]:
        return self.bits

    @property
    def ledger_group(self) -> str:
        return "row" if self.group_size is None else str(self.group_size)


@dataclass(frozen=True, kw_only=True)
class GridMethod(WeightMethod):
    """A WeightMethod whose codes are those of an affine grid."""

    bits: int | Mapping[str, int] = 4  # of a code; or {layer: bits} for mixed precision
    group_size: int | None = 128  # weights in a row that share a scale; None: one a row
    symmetric: bool = False  # no zero points: the grid reaches equally far on both sides of 0

    words: ClassVar[dict[str, str]] = {"symmetric": "symmetric"}

    def __post_init__(self):
        vars(self).update(
            symmetric=check_flag(self.symmetric, "symmetric"),
            group_size=None if self.group_size is None else check_int(self.group_size, "group_size", 1),
        )
        low = 2 if self.symmetric else 1
        of = self.bits if isinstance(self.bits, Mapping) else {"": self.bits}
        bits = {name: check_int(b, f"bits of {name}" if name else "bits", low, 8) for name, b in of.items()}
        vars(self).update(bits=bits if isinstance(self.bits, Mapping) else bits[""])

    @property
    def grid(self) -> dict:
        """bits, group_size and symmetric."""
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}


class IntegerMethod(Method):
    """Rounds weights and activations: puts a layer that computes in integers in the place of each linear layer."""

    needs_data: ClassVar[bool] = True
    rounding: ClassVar[str] = "nearest"  # of the weights, by the layer itself; else round() does it

    @property
    def observes(self) -> bool:
        """Whether the range of each layer's input is fixed beforehand by an observer."""
        return False

    def round(self, weights: list[Tensor], hessian: Hessian | None) -> list[Quantized]:
        """The weights of layers that read one input, a scale a row; a Hessian of it for GPTQ."""
        raise NotImplementedError

    def layer(self, linear: nn.Linear, observer=None, rows: Quantized | None = None) -> Int8Linear:
        """The integer layer in the place of a linear one; observer has seen what it reads, where observes.

        rows: its weight, rounded already.
        """
        raise NotImplementedError

    @property
    def ledger_bits(self) -> int:
        return 8


def plain(value):
    """A setting as JSON can hold it. Raises ValueError for a function without a name to find it by."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if not callable(value):
        return value
    name = getattr(value, "__qualname__", "<")
    if "<" in name:
        raise ValueError(f"a cached result must know its settings by name; {value!r} has none")
    return f"{value.__module__}.{name}"
