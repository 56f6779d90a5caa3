"""Where the bytes go, and what each part costs: the embedding, the attention layers and the MLPs, at each setting."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm

from quantlab.arguments import check_choice, check_flag, check_int, check_list
from quantlab.capstone.recipes import ATTENTION, in_groups
from quantlab.granularity import QTensor
from quantlab.hessian import Hessian
from quantlab.lm import (
    capture_inputs,
    divergence,
    embedding_layers,
    layers_of_role,
    linear_layers,
    model_bytes,
    save_quantized,
    weight_of,
)
from quantlab.lm.walk import with_codes
from quantlab.methods import GPTQ, RTN

PARTS = ("embedding", "attention", "MLP")
METHODS = {"nearest": RTN, "GPTQ": GPTQ}


@dataclass(frozen=True)
class Plans:
    """What each part of a model costs alone at each setting, and the bytes of everything in its file."""

    costs: dict[tuple, float]  # (method, group size, part, bits): KL with this part alone quantized, nats a token
    codes: dict[tuple, int]  # (part, bits): bytes of the packed codes
    sides: dict[tuple, int]  # (group size, part, bits): bytes of scales and zero points
    others: int  # bytes of what stays in 16 bits
    header: int  # bytes of the file's table of contents
    parameters: int
    methods: tuple[str, ...]
    groups: tuple[int, ...]
    bits: tuple[int, ...]

    def nbytes(self, group: int, bits: dict[str, int]) -> int:
        """Bytes of the whole file with these bits for each part."""
        own = sum(self.codes[part, b] + self.sides[group, part, b] for part, b in bits.items())
        return own + self.others + self.header

    def kl(self, method: str, group: int, bits: dict[str, int]) -> float:
        """The sum of what the parts cost alone; at 2 bits, where parts disturb each other, it can be off."""
        return sum(self.costs[method, group, part, b] for part, b in bits.items())


def part_layers(model) -> dict[str, list[str]]:
    """The names of the layers of each part: PARTS."""
    attention = [name for role in ATTENTION for name in layers_of_role(model, role)]
    attention = list(dict.fromkeys(attention))
    return {
        "embedding": list(embedding_layers(model)),
        "attention": attention,
        "MLP": [name for name in linear_layers(model) if name not in attention],
    }


def plans(
    model, tokens: Tensor, calibration: Tensor, *, bits: Sequence[int] = (2, 3, 4, 5, 6),
    groups: Sequence[int] = (128, 256), methods: Sequence[str] = tuple(METHODS), progress: bool = True,
) -> Plans:  # fmt: skip
    """The KL on tokens with one part quantized, to nearest and by GPTQ (which looks at calibration), and all bytes.

    The embedding is rounded to nearest in both. Each setting is one reading of the tokens by the whole model.
    Raises: ValueError for bits or groups that a grid cannot have, or tokens that the model cannot read.
    """
    bits = tuple(check_int(b, "bits", 2, 8) for b in _some(bits, "bits"))
    groups = tuple(check_int(g, "groups", 1) for g in _some(groups, "groups"))
    methods = tuple(check_choice(method, "methods", METHODS) for method in _some(methods, "methods"))
    hessians = _hessians(model, calibration) if "GPTQ" in methods else {}
    settings = [(group, b) for group in groups for b in bits]
    costs, codes, sides = {}, {}, {}
    for group, b in tqdm(settings, desc="trying", leave=False, disable=not check_flag(progress, "progress")):
        embedding = _embedding(model, b, group)  # the same for all methods
        alone = _kl_with(model, embedding, tokens)
        for word in methods:
            rounded = _rounded(model, METHODS[word](bits=b, group_size=group), hessians)
            costs |= {(word, group, part, b): _kl_with(model, q, tokens) for part, q in rounded.items()}
            costs[word, group, "embedding", b] = alone
        for part, q in (rounded | {"embedding": embedding}).items():
            codes[part, b] = sum(one.packed().nbytes for one in q.values())
            sides[group, part, b] = sum(one.nbytes for one in q.values()) - codes[part, b]
    everything = _embedding(model, bits[0], groups[0])
    for some in _rounded(model, RTN(bits=bits[0], group_size=groups[0]), {}).values():
        everything |= some
    others = model_bytes(model, everything) - sum(q.nbytes for q in everything.values())
    header = _file_bytes(model, everything) - model_bytes(model, everything)
    count = sum(p.numel() for p in model.parameters())
    return Plans(costs, codes, sides, others, header, count, methods, groups, bits)


def _some(values, name: str) -> list:
    values = check_list(values, name)
    if not values:
        raise ValueError(f"{name} must have at least one value, got none")
    return values


def _hessians(model, tokens: Tensor) -> dict[str, Hessian]:
    """Of what each linear layer reads in the float model."""
    inputs = capture_inputs(model, tokens, list(linear_layers(model)))
    return {name: Hessian(x.shape[1]).add(x) for name, x in inputs.items()}


def _embedding(model, bits: int, group: int) -> dict[str, QTensor]:
    """The embedding (and head) to nearest."""
    layers = embedding_layers(model).items()
    return {name: in_groups(layer.weight.detach(), bits=bits, group_size=group) for name, layer in layers}


def _rounded(model, method: RTN | GPTQ, hessians: dict) -> dict[str, dict]:
    """{part: {layer: quantized weight}} by one method, for the parts that are linear layers."""
    layers, found = linear_layers(model), part_layers(model)
    del found["embedding"]
    return {
        part: {name: method.round([weight_of(layers[name])], hessians.get(name))[0] for name in names}
        for part, names in found.items()
    }


def _kl_with(model, qtensors: dict, tokens: Tensor) -> float:
    """KL(float || float with these layers quantized)."""
    return divergence(model, with_codes(model, qtensors)[0], tokens).kl


def _file_bytes(model, qtensors: dict) -> int:
    with tempfile.TemporaryDirectory() as work:
        return save_quantized(Path(work) / "m", *with_codes(model, qtensors))
