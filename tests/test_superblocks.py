"""Scales that are codes: against a loop, what the bits are, and edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.superblocks import round_in_superblocks


def draw(rows=3, columns=512, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def half(value: float) -> float:
    return torch.tensor(value).half().item()


def slow(row: list[float], bits: int, block: int, scale_bits: int, offset: bool) -> list[float]:
    """One super-block, weight by weight: ranges, then their codes, then the weights' codes."""
    blocks = [row[i : i + block] for i in range(0, len(row), block)]
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    lows = [min(0.0, *b) for b in blocks] if offset else [0.0] * len(blocks)
    steps = [(max(b) - low) / top for b, low in zip(blocks, lows, strict=True)]
    if not offset:
        steps = [max(abs(v) for v in b) / (middle - 0.5) for b in blocks]

    def stored(values):
        if scale_bits == 16:
            return [half(v) for v in values]
        unit = half(max(values) / (2**scale_bits - 1))
        return [unit * min(round(v / unit), 2**scale_bits - 1) if unit else 0.0 for v in values]

    back = []
    for b, step, low in zip(blocks, stored(steps), stored([-low for low in lows]), strict=True):
        least, most = (0, top) if offset else (-middle, middle - 1)
        back += [step * min(max(round((v + low) / step), least), most) - low if step else -low for v in b]
    return back


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize(("bits", "block", "scale_bits"), [(4, 32, 6), (4, 16, 4), (2, 8, 3), (8, 64, 8), (3, 32, 16)])
def test_it_is_what_a_loop_gives(bits, block, scale_bits, offset):
    x = draw(2, 256)
    values = round_in_superblocks(x, bits=bits, block_size=block, scale_bits=scale_bits, offset=offset).values
    wanted = torch.tensor([slow(row, bits, block, scale_bits, offset) for row in x.tolist()])
    far = (values - wanted).abs() > 1e-6
    assert far.double().mean() < 0.005  # the last digit of float32 may send a tie the other way


@pytest.mark.parametrize(
    ("options", "bits"),
    [
        ({}, 4.5),
        ({"offset": False}, 4.25),
        ({"scale_bits": 16}, 5.0),
        ({"scale_bits": 16, "offset": False}, 4.5),
        ({"bits": 6, "block_size": 16, "scale_bits": 8, "offset": False}, 6.5625),
        ({"bits": 2, "block_size": 16, "scale_bits": 4}, 2.625),
    ],
    ids=["Q4_K", "no offset", "Q4_1", "Q4_0", "Q6_K", "Q2_K"],
)
def test_true_bits_are_those_of_llama_cpps_types(options, bits):
    assert round_in_superblocks(draw(), **options).bits_per_element == bits


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from([8, 32, 128]), st.booleans())
def test_scales_of_more_bits_never_cost_much(seed, size, block, offset):
    x = draw(seed=seed) * size

    def error(scale_bits):
        return (
            (round_in_superblocks(x, block_size=block, scale_bits=scale_bits, offset=offset).values - x).square().sum()
        )

    assert error(8) < 1.05 * error(16)


@pytest.mark.parametrize("offset", [True, False])
def test_two_bits_are_too_few_for_a_scale(offset):
    """Over many blocks; of a few, a scale rounded by chance may suit the values better."""
    x = draw(rows=256)
    few, many = (round_in_superblocks(x, scale_bits=bits, offset=offset).values for bits in (2, 8))
    assert (few - x).square().sum() > 1.1 * (many - x).square().sum()


def test_zeros_stay_zeros_and_nothing_is_changed():
    x = draw()
    x[0, :64] = 0
    before = x.clone()
    values = round_in_superblocks(x).values
    assert values[0, :64].eq(0).all()
    assert torch.equal(x, before)
    assert values.shape == x.shape
    assert round_in_superblocks(torch.zeros(2, 256)).values.eq(0).all()
    assert round_in_superblocks(x, super_size=64, block_size=32).values.shape == x.shape


@pytest.mark.parametrize(
    ("x", "options", "words"),
    [
        (draw(2, 300), {}, "does not go up"),
        (draw(), {"block_size": 48}, "does not go up"),
        (draw(), {"scale_bits": 12}, "scale_bits must be 1..8, or 16"),
        (draw(), {"bits": 9}, "bits must be 1..8"),
        (draw() * torch.nan, {}, "finite"),
        (torch.tensor(1.0), {"block_size": 1, "super_size": 1}, "does not go up"),
    ],
)
def test_what_does_not_fit_is_refused(x, options, words):
    with pytest.raises(ValueError, match=words):
        round_in_superblocks(x, **options)
