"""GPTQ: the library against the reference implementation's algorithm (IST-DASLab/gptq), in one run, on one thread.

The reference's algorithm is written out below in its own order of operations: float32, three factorizations, blocks
of 128 columns, each column updating the rest of its block at once. Ratios of CPU seconds, the least of several rounds
in turns. Bars: rounding at least 3 times as fast, the Hessian included 2 times, at an equal layer error.
"""

import sys
import time

import torch

from quantlab import Hessian, gptq_quantize

LAYERS = ((1024, 1024), (576, 1536), (2048, 5632))
GROUP, TOKENS, BATCH = 128, 4096, 512
ROUNDING, WHOLE = 3.0, 2.0


class Reference:
    """IST-DASLab/gptq, gptq.py and quant.py, with per-row asymmetric grids: what its scripts run."""

    def __init__(self, columns: int):
        self.H, self.samples = torch.zeros(columns, columns), 0

    def add_batch(self, x: torch.Tensor) -> None:
        self.H *= self.samples / (self.samples + 1)
        self.samples += 1
        x = (2 / self.samples) ** 0.5 * x.T.float()
        self.H += x.matmul(x.T)

    def fasterquant(self, weight: torch.Tensor, *, blocksize: int = 128, percdamp: float = 0.01) -> torch.Tensor:
        W, H, columns = weight.clone().float(), self.H.clone(), weight.shape[1]
        dead = torch.diag(H) == 0
        H[dead, dead], W[:, dead] = 1, 0
        diagonal = torch.arange(columns)
        H[diagonal, diagonal] += percdamp * torch.mean(torch.diag(H))
        Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        Q, losses = torch.zeros_like(W), torch.zeros_like(W)
        for i1 in range(0, columns, blocksize):
            i2 = min(i1 + blocksize, columns)
            W1, Hinv1 = W[:, i1:i2].clone(), Hinv[i1:i2, i1:i2]
            Q1, Err1, Losses1 = torch.zeros_like(W1), torch.zeros_like(W1), torch.zeros_like(W1)
            for i in range(i2 - i1):
                w, d = W1[:, i], Hinv1[i, i]
                if (i1 + i) % GROUP == 0:
                    scale, zero = self.find_params(W[:, i1 + i : i1 + i + GROUP])
                q = self.quantize(w.unsqueeze(1), scale, zero).flatten()
                Q1[:, i] = q
                Losses1[:, i] = (w - q) ** 2 / d**2
                err1 = (w - q) / d
                W1[:, i:] -= err1.unsqueeze(1).matmul(Hinv1[i, i:].unsqueeze(0))
                Err1[:, i] = err1
            Q[:, i1:i2], losses[:, i1:i2] = Q1, Losses1 / 2
            W[:, i2:] -= Err1.matmul(Hinv[i1:i2, i2:])
        return Q

    @staticmethod
    def find_params(x: torch.Tensor, maxq: int = 15) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = torch.clamp(x.min(1)[0], max=0), torch.clamp(x.max(1)[0], min=0)
        scale = (high - low) / maxq
        return scale.unsqueeze(1), torch.round(-low / scale).unsqueeze(1)

    @staticmethod
    def quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, maxq: int = 15) -> torch.Tensor:
        return scale * (torch.clamp(torch.round(x / scale) + zero, 0, maxq) - zero)


def layer(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=random) / columns**0.5 * torch.arange(1, columns + 1) ** -0.5
    x = torch.randn(TOKENS, columns, generator=random) @ mix + 0.05 * torch.randn(TOKENS, columns, generator=random)
    return torch.randn(rows, columns, generator=random) * 0.05, x


def seconds(action) -> tuple[float, object]:
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def gathered(kind, x: torch.Tensor):
    """A Hessian of x, batch by batch, as ours or as the reference's."""
    found = kind(x.shape[1])
    for batch in x.split(BATCH):
        found.add(batch) if kind is Hessian else found.add_batch(batch)
    return found


def rounded(hessian: Hessian, weight: torch.Tensor):
    hessian._factors.clear()
    return gptq_quantize(weight, hessian, bits=4, group_size=GROUP)


def compare(rows: int, columns: int, rounds: int) -> tuple[dict, list[float]]:
    """{what: least CPU seconds}, and the layer error of both."""
    (weight, x), least = layer(rows, columns), {}
    for _ in range(rounds):
        times = {}
        times["reference H"], reference = seconds(lambda: gathered(Reference, x))
        times["our H"], ours = seconds(lambda: gathered(Hessian, x))
        times["reference"], Q = seconds(lambda: reference.fasterquant(weight))  # noqa: B023  used at once
        times["ours"], q = seconds(lambda: rounded(ours, weight))  # noqa: B023
        least = {what: min(least.get(what, 1e9), t) for what, t in times.items()}
    return least, [ours.output_error(weight, Q), ours.output_error(weight, q.dequantize())]


def main() -> int:
    torch.set_num_threads(1)
    print(f"{'layer':>12}{'reference':>11}{'ours':>8}{'times as fast':>15}{'with H':>8}   layer error of both")
    missed = False
    for rows, columns in LAYERS:
        t, (theirs, own) = compare(rows, columns, 5 if columns < 4000 else 2)
        alone = t["reference"] / t["ours"]
        whole = (t["reference"] + t["reference H"]) / (t["ours"] + t["our H"])
        missed |= alone < ROUNDING or whole < WHOLE or not abs(own / theirs - 1) < 0.01
        name = f"{rows}x{columns}"
        print(f"{name:>12}{t['reference']:10.2f}s{t['ours']:7.2f}s{alone:15.2f}{whole:8.2f}   {theirs:.4e} {own:.4e}")
    print(f"bars: {ROUNDING:g} times as fast, {WHOLE:g} with the Hessian: {'MISSED' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
