"""How fast an int8 linear layer is against float32, one core, in the same run: by tokens M and size K = N.

Dynamic int8 quantizes its input anew in every call, and that time is counted. Bars at M = 1, K = N = 2048: at least
twice as fast as F.linear in float32, and weights of at most 0.26 of the bytes.
"""

import sys
import time

import torch
from torch import nn

from quantlab.granularity import PerAxis
from quantlab.linear import DynamicInt8Linear, StaticInt8Linear, WeightOnlyLinear, kernel_status
from quantlab.observers import MinMax

ROUNDS = 15


def best(calls: dict) -> dict:
    """Seconds of one call of each, the least of ROUNDS taken in turns, so that a noisy neighbour meets all."""
    found, repeats = dict.fromkeys(calls, float("inf")), {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, int(2e-3 / (time.perf_counter() - start)))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            found[name] = min(found[name], (time.perf_counter() - start) / repeats[name])
    return found


def layers(size: int, x: torch.Tensor, bits: int) -> dict:
    linear = nn.Linear(size, size, bias=False).requires_grad_(False)
    dynamic = {
        f"dynamic, per {per}": DynamicInt8Linear.from_linear(linear, per=per, activation_bits=bits)
        for per in ("tensor", "token")
    }
    static = StaticInt8Linear.from_linear(linear, MinMax().update(x), activation_bits=bits)
    small = WeightOnlyLinear.from_linear(linear, bits=8, granularity=PerAxis(0), symmetric=True)
    return {"float32": linear, **dynamic, "static": static, "weight-only (dequantize first)": small}


def main() -> int:
    torch.set_num_threads(1)
    status = kernel_status()
    bits = 8 if status == "exact" else 7
    print(f"oneDNN's integer kernel on this CPU: {status}; activations of {bits} bits. Times over float32's:")
    kept = True
    for size in (512, 1024, 2048):
        for tokens in (1, 16, 256):
            x = torch.randn(tokens, size, generator=torch.Generator().manual_seed(0))
            made = layers(size, x, bits)
            seconds = best({name: (lambda layer=layer, x=x: layer(x)) for name, layer in made.items()})
            speeds = {name: seconds["float32"] / s for name, s in seconds.items() if name != "float32"}
            print(f"K = N = {size:4}, M = {tokens:3}: " + ", ".join(f"{n} {s:.2f}x" for n, s in speeds.items()))
            if (size, tokens) == (2048, 1):
                fast, bytes_ = speeds["dynamic, per tensor"], made["dynamic, per tensor"].nbytes
    share = bytes_ / (2048 * 2048 * 4)
    for what, value, bar, ok in (
        ("speed at M = 1, K = N = 2048", fast, ">= 2", fast >= 2),
        ("bytes of the weights", share, "<= 0.26", share <= 0.26),
    ):
        print(f"dynamic int8, per tensor, {what}: {value:.2f} of float32's (bar {bar}){'' if ok else '  MISSED'}")
        kept &= ok
    return int(not kept)


if __name__ == "__main__":
    sys.exit(main())
