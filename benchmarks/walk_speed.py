"""GPTQ on the whole bundled model: against quantlab/plain.py, and how the time grows. One minute.

CPU seconds, the least of rounds taken in turns. The forward passes are the same in both, and most of the time on layers
256 wide; so the rounding is also timed by itself. Bars: no higher output error, and growth in proportion.
"""

import copy
import sys
import time
from dataclasses import dataclass

import torch

from quantlab import lm, plain
from quantlab.methods import GPTQ

SPENT = [0.0]  # CPU seconds of the rounding so far


@dataclass(frozen=True)
class Reals:
    """What the walk needs of a quantized tensor."""

    values: torch.Tensor
    nbytes = bits_per_element = 0

    def dequantize(self) -> torch.Tensor:
        return self.values


class Timed(GPTQ):
    def round(self, weights, hessian):
        start = time.process_time()
        rounded = self.rounded(weights, hessian)
        SPENT[0] += time.process_time() - start
        return rounded

    def rounded(self, weights, hessian):
        return super().round(weights, hessian)


class Plain(Timed):
    def rounded(self, weights, hessian):
        return [Reals(plain.gptq(w, hessian.matrix, dtype=torch.float32, **self.settings)[3]) for w in weights]


def seconds(model, tokens, method) -> tuple[float, float, float]:
    """CPU seconds of the walk, of its rounding alone, and the summed output error of the layers."""
    SPENT[0], start = 0.0, time.process_time()
    _, report = lm.quantize_lm(model, tokens, method, progress=False)
    return time.process_time() - start, SPENT[0], sum(row.output_error for row in report.layers)


def best_of(model, tokens, methods: dict, rounds: int = 3) -> dict[str, list[float]]:
    best = {name: [float("inf")] * 3 for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            best[name] = [min(a, b) for a, b in zip(best[name], seconds(model, tokens, method), strict=True)]
    return best


def with_blocks(model, times: int):
    """The model with each of its first blocks repeated: as wide, and `times` as deep."""
    new = copy.deepcopy(model)
    new.model.layers = torch.nn.ModuleList(copy.deepcopy(b) for _ in range(times) for b in model.model.layers[:2])
    for i, block in enumerate(new.model.layers):
        block.self_attn.layer_idx = i
    new.config.num_hidden_layers = len(new.model.layers)
    return new


def speed(model, tokens) -> bool:
    found = best_of(model, tokens, {"plain": Plain(), "ours": Timed()})
    print(f"{'':10}{'walk':>9}{'rounding':>10}{'sum of output errors':>22}")
    for name, (whole, rounding, error) in found.items():
        print(f"{name:10}{whole:8.2f}s{rounding:9.2f}s{error:22.5f}")
    (plain, plain_rounding, plain_error), (ours, rounding, error) = found.values()
    good = error <= 1.005 * plain_error
    print(
        f"the walk {plain / ours:.2f} times as fast, its rounding {plain_rounding / rounding:.2f} times, "
        f"at no higher output error: {'met' if good else 'MISSED'}"
    )
    return good


def growth(model, tokens) -> bool:
    """Twice the blocks or tokens cost twice the time: the worst ratio to that, over 1, 2, 4 times of each."""
    print(f"\n{'blocks':>8}{'tokens':>8}{'seconds':>9}{'to the first row':>18}{'in proportion':>15}")
    rows = [(b, t) for b in (1, 2, 4) for t in (1, 2, 4)]
    cost = {}
    for blocks, times in rows:
        deep, some = with_blocks(model, blocks), tokens[: 4096 * times]
        cost[blocks, times] = best_of(deep, some, {"": Timed()}, rounds=2)[""][0]
        ratio = cost[blocks, times] / cost[1, 1]
        share = ratio / (blocks * times)
        print(f"{2 * blocks:8}{4096 * times:8}{cost[blocks, times]:9.2f}{ratio:18.2f}{share:15.2f}")
    worst = max(cost[b, t] / cost[1, 1] / (b * t) for b, t in rows)
    print(f"at most {worst:.2f} of proportion (bar 1.25): {'met' if worst <= 1.25 else 'MISSED'}")
    return worst <= 1.25


def main() -> int:
    torch.set_num_threads(1)
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    tokens = lm.token_stream(tokenizer, lm.load_text("calibration"))[:16384]
    good = [speed(model, tokens), growth(model, tokens)]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
