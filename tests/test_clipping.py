"""clipping: the search against trying every ratio by hand, and what must hold of any block."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab import PerAxis, PerGroup, PerTensor, quantize_tensor
from quantlab.affine import choose_qparams, dequantize, quantize
from quantlab.clipping import quantize_clipped
from quantlab.granularity import code_range


def by_hand(block, bits, symmetric, steps=20):
    """The dequantized block with the least squared error, one ratio at a time."""
    qmin, qmax = code_range(bits, symmetric=symmetric)
    found = []
    for i in range(steps + 1):
        r = 1 - 0.7 * i / steps
        qp = choose_qparams(r * block.min(), r * block.max(), qmin=qmin, qmax=qmax, symmetric=symmetric)
        value = dequantize(quantize(block, qp), qp)
        found.append(((value.double() - block).square().sum().item(), i, value))
    return min(found, key=lambda f: f[:2])[2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_is_the_best_of_all_ratios(bits, symmetric):
    x = torch.randn(7, 30, generator=torch.Generator().manual_seed(bits))
    q = quantize_clipped(x, bits=bits, granularity=PerAxis(0), symmetric=symmetric)
    expected = torch.stack([by_hand(row, bits, symmetric) for row in x])
    assert torch.equal(q.dequantize(), expected)


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 5), symmetric=st.booleans(), size=st.integers(1, 40))
def test_no_block_gets_worse(seed, bits, symmetric, size):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 40, generator=random) ** 3
    options = {"bits": bits, "granularity": PerGroup(size), "symmetric": symmetric}
    clipped, plain = (f(x, **options).dequantize() for f in (quantize_clipped, quantize_tensor))
    for a, b, w in zip(clipped.split(size, 1), plain.split(size, 1), x.split(size, 1), strict=True):
        lost, before = ((v.double() - w).square().sum(1) for v in (a, b))
        assert (lost <= before * (1 + 1e-6)).all()


def test_bytes_and_kind_are_those_of_quantize_tensor():
    x = torch.randn(5, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    options = {"bits": 3, "granularity": PerGroup(16), "symmetric": False, "signed": False}
    a, b = quantize_clipped(x, **options), quantize_tensor(x, **options)
    assert (a.nbytes, a.codes.dtype, a.dtype, a.qparams.scale.shape) == (
        b.nbytes,
        b.codes.dtype,
        b.dtype,
        b.qparams.scale.shape,
    )


@pytest.mark.parametrize("x", [torch.zeros(4), torch.full((4,), 3.0), torch.tensor([-2.0])])
def test_constants_stay_exact(x):
    q = quantize_clipped(x, bits=4, granularity=PerTensor(), symmetric=False)
    assert torch.allclose(q.dequantize(), x, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "options", "told"),
    [
        (torch.tensor([1.0, torch.nan]), {}, "finite"),
        (torch.ones(3), {"bits": 9}, "bits must be"),
        (torch.ones(3), {"steps": 0}, "steps"),
    ],
)
def test_bad_input(x, options, told):
    with pytest.raises(ValueError, match=told):
        quantize_clipped(x, **{"bits": 4, "granularity": PerTensor()} | options)
