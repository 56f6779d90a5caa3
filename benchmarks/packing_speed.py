"""Packing and unpacking codes of 1 to 8 bits: GB of unpacked uint8 codes per second, one thread.

Each time is the least CPU time of several rounds, taken in turns; "of a copy" is the speed of cloning the same codes,
in the same run, over that. The bar: at least 0.5 GB/s for 4 bits, both ways.
"""

import sys
import time

import torch

from quantlab import pack, unpack

BAR = 0.5  # GB/s
COUNT = 2**24  # codes; their copies are far larger than any cache


def seconds(action, least: dict, name) -> None:
    start = time.process_time()
    action()
    least[name] = min(least.get(name, 1e9), time.process_time() - start)


def measure(rounds: int = 5) -> dict:
    """Least CPU seconds of {"copy", ("pack", bits), ("unpack", bits)} for COUNT codes."""
    random, least = torch.Generator().manual_seed(0), {}
    codes = {bits: torch.randint(2**bits, (COUNT,), dtype=torch.uint8, generator=random) for bits in range(1, 9)}
    packed = {bits: pack(codes[bits], bits=bits) for bits in codes}
    assert all(torch.equal(unpack(packed[bits], bits=bits, count=COUNT), codes[bits]) for bits in codes)
    for _ in range(rounds):
        seconds(codes[4].clone, least, "copy")
        for bits in codes:
            seconds(lambda bits=bits: pack(codes[bits], bits=bits), least, ("pack", bits))
            seconds(lambda bits=bits: unpack(packed[bits], bits=bits, count=COUNT), least, ("unpack", bits))
    return least


def main() -> int:
    torch.set_num_threads(1)
    least = measure()
    speed = {name: COUNT / 1e9 / least[name] for name in least}
    print(f"copy {speed['copy']:.1f} GB/s of codes\n")
    print(f"{'bits':>4}{'pack':>12}{'of a copy':>11}{'unpack':>15}{'of a copy':>11}")
    for bits in range(1, 9):
        there, back = speed["pack", bits], speed["unpack", bits]
        print(f"{bits:4}{there:7.2f} GB/s{there / speed['copy']:11.3f}{back:10.2f} GB/s{back / speed['copy']:11.3f}")
    missed = min(speed["pack", 4], speed["unpack", 4]) < BAR
    print(f"bar: at least {BAR} GB/s for 4 bits, both ways: {'MISSED' if missed else 'met'}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
