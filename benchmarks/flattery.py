"""Do SmolLM2's weights, which were 4-bit codes before they were floats, flatter any grid of data/ledger-smollm2.csv?

Every weight is shaken evenly within its old cell (Q4_1: groups of 32, 15 steps from the least to the largest), which
gives weights as large that were never quantized. A grid is flattered if the old weights lose less on it than the shaken
ones: the squared error of all layers over that of the shaken ones. The last line is the old grid itself, as a control.
Bar: no row is flattered by more than a tenth, as data/README.md says.

python benchmarks/flattery.py      two minutes
"""

import sys

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.export.gguf import dequantize_gguf, quantize_gguf
from quantlab.lm import linear_layers, load_lm, weight_of
from quantlab.methods import NF4, RTN, Method
from quantlab.sweep import REAL_MODEL, label

GROUP, STEPS, FLATTERED = 32, 15, 0.9


def shaken(weight: Tensor, random: torch.Generator) -> Tensor:
    """The weight, each value moved evenly by at most half a step of its old grid."""
    groups = weight.reshape(-1, GROUP)
    step = (groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)) / STEPS
    return weight + ((torch.rand(groups.shape, generator=random) - 0.5) * step).view_as(weight)


def rounded(weight: Tensor, grid: Method | None) -> Tensor:
    if grid is None:
        return dequantize_gguf(quantize_gguf(weight, "Q4_1"), "Q4_1")
    return grid.round([weight], None)[0].dequantize()


def flattery(weights: list[Tensor], grids: list[Method | None], progress: bool = False) -> list[float]:
    """For each grid the squared error of these weights over that of the same weights shaken; None is the old grid."""
    random, lost = torch.Generator().manual_seed(0), torch.zeros(len(grids), 2, dtype=torch.float64)
    for weight in tqdm(weights, disable=not progress):
        for k, w in enumerate((weight, shaken(weight, random))):
            lost[:, k] += torch.tensor([(rounded(w, grid) - w).double().square().sum() for grid in grids])
    return (lost[:, 0] / lost[:, 1]).tolist()


def main() -> int:
    try:
        model, _ = load_lm("smollm2")
    except FileNotFoundError as error:
        print(f"not measured: {error}")
        return 0
    weights = [weight_of(layer).detach().float() for layer in linear_layers(model).values()]
    grids = [method for method in REAL_MODEL if isinstance(method, RTN | NF4)]
    *ratios, control = flattery(weights, [*grids, None], progress=True)
    for grid, ratio in zip(grids, ratios, strict=True):
        name, bits, group = label(grid)
        print(f"{name:16}{bits} bits {group:>5}{ratio:8.3f}" + ("  flattered" if ratio < FLATTERED else ""))
    missed = min(ratios) < FLATTERED
    print(f"the old grid itself, as a control: {control:.1e}\nbar, no row flattered: {'MISSED' if missed else 'kept'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
