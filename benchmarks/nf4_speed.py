"""NF4: quantize and dequantize 16 million float32 values in blocks of 64, one thread, beside bitsandbytes and a copy.

Ratios of CPU seconds, the least of several rounds taken in turns. The bars: quantize, packing included, at least 5
times as fast as bitsandbytes' CPU path; dequantize into an existing tensor at least 0.6 of the speed of a plain copy.
"""

import sys
import time
import warnings

import torch

from quantlab.codebook import nearest_level, nf4_levels, normalize_blocks, quantize_codebook

QUANTIZE_BAR, DEQUANTIZE_BAR = 5.0, 0.6
SHAPE = (4096, 4096)


def peer():
    """bitsandbytes' functions, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import bitsandbytes.functional
        except ImportError:
            return None
    return bitsandbytes.functional


def least_seconds(actions: dict, rounds: int) -> dict:
    """The least CPU seconds of each action over rounds in which they take turns; the first round is not counted."""
    least = dict.fromkeys(actions, 1e9)
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.process_time()
            action()
            seconds = time.process_time() - start
            least[name] = min(least[name], seconds) if turn else 1e9
    return least


def plain(x, levels):
    """What a reader would write first."""
    values, absmax = normalize_blocks(x, block_size=64)
    return nearest_level(values, levels), absmax


def quantizing(x, bnb) -> dict:
    actions = {
        "quantize, ours": lambda: quantize_codebook(x, nf4_levels()).packed(),
        "quantize, plain nearest_level": lambda: plain(x, nf4_levels()),
    }
    if bnb:
        actions["quantize, bitsandbytes"] = lambda: bnb.quantize_4bit(x, quant_type="nf4")
    return least_seconds(actions, rounds=4)


def dequantizing(x, bnb) -> dict:
    q, out = quantize_codebook(x, nf4_levels()), torch.empty_like(x)
    existing = {
        "copy into an existing tensor": lambda: out.copy_(x),
        "dequantize into it, ours": lambda: q.dequantize(out),
    }
    fresh = {"dequantize into a new one, ours": lambda: q.dequantize()}
    if bnb:
        theirs = bnb.quantize_4bit(x, quant_type="nf4")
        fresh["dequantize into a new one, bitsandbytes"] = lambda: bnb.dequantize_4bit(*theirs)
        assert torch.equal(q.dequantize(), bnb.dequantize_4bit(*theirs)), "values are not bitsandbytes'"
    return least_seconds(existing, rounds=20) | least_seconds(fresh, rounds=5)


def main() -> int:
    torch.set_num_threads(1)
    x, bnb = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * 0.02, peer()
    times = quantizing(x, bnb) | dequantizing(x, bnb)
    for name, seconds in times.items():
        print(f"{name:>42}{seconds * 1e3:9.1f} ms{x.nbytes / seconds / 1e9:8.2f} GB/s of float32")
    ratio = times["copy into an existing tensor"] / times["dequantize into it, ours"]
    missed = ratio < DEQUANTIZE_BAR
    print(f"dequantize: {ratio:.2f} of a copy's speed; bar {DEQUANTIZE_BAR}: {'MISSED' if missed else 'met'}")
    if not bnb:
        print("quantize: bitsandbytes is not installed (the extra `peers` has it), so there is no bar to measure")
        return int(missed)
    ratio = times["quantize, bitsandbytes"] / times["quantize, ours"]
    print(f"quantize: {ratio:.1f} x bitsandbytes; bar {QUANTIZE_BAR}: {'met' if ratio >= QUANTIZE_BAR else 'MISSED'}")
    return int(missed or ratio < QUANTIZE_BAR)


if __name__ == "__main__":
    sys.exit(main())
