"""Do SmolLM2's weights, which were 4-bit codes before they were floats, flatter any grid of data/ledger-smollm2.csv?

Every weight is shaken evenly within its old cell (Q4_1: groups of 32, 15 steps from the least to the largest), which
gives weights as large that were never quantized. A grid is flattered if the old weights lose less on it than the shaken
ones: the squared error of all layers over that of the shaken ones. The last line is the old grid itself, as a control.

python benchmarks/flattery.py      three minutes; rows that are flattered by more than a tenth are marked
"""

import sys

import torch
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.lm import linear_layers, load_lm, weight_of
from quantlab.methods import NF4, RTN, Method
from quantlab.sweep import REAL_MODEL, label

GROUP, STEPS, FLATTERED = 32, 15, 0.9


def old_steps(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(least value, step) of each group of the old grid, (groups, 1)."""
    groups = weight.reshape(-1, GROUP)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    return low, (high - low) / STEPS


def shaken(weight: Tensor, random: torch.Generator) -> Tensor:
    """The weight, each value moved evenly by at most half a step of its old grid."""
    _, step = old_steps(weight)
    moved = torch.rand(step.numel(), GROUP, generator=random) - 0.5
    return weight + (moved * step).view_as(weight)


def on_old_grid(weight: Tensor) -> Tensor:
    low, step = old_steps(weight)
    codes = torch.round((weight.reshape(-1, GROUP) - low) / step.clamp(min=1e-12))
    return (low + codes * step).view_as(weight)


def rounded(weight: Tensor, grid: Method | None) -> Tensor:
    return on_old_grid(weight) if grid is None else grid.round([weight], None)[0].dequantize()


def flattery(weights: list[Tensor], grids: list[Method | None], progress: bool = False) -> list[float]:
    """For each grid the squared error of these weights over that of the same weights shaken."""
    random, lost = torch.Generator().manual_seed(0), torch.zeros(len(grids), 2, dtype=torch.float64)
    for weight in tqdm(weights, disable=not progress):
        for k, w in enumerate((weight, shaken(weight, random))):
            lost[:, k] += torch.tensor([(rounded(w, grid) - w).double().square().sum() for grid in grids])
    return (lost[:, 0] / lost[:, 1]).tolist()


def main() -> int:
    model, _ = load_lm("smollm2")
    weights = [weight_of(layer).detach().float() for layer in linear_layers(model).values()]
    grids = [method for method in REAL_MODEL if isinstance(method, RTN | NF4)]
    *ratios, control = flattery(weights, [*grids, None], progress=True)
    for grid, ratio in zip(grids, ratios, strict=True):
        name, bits, group = label(grid)
        print(f"{name:16}{bits} bits {group:>5}{ratio:8.3f}" + ("  flattered" if ratio < FLATTERED else ""))
    print(f"the old grid itself, as a control: {control:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
