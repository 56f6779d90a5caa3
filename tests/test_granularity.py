"""granularity and metrics: against loops, edges, bad input."""

import dataclasses
import math

import pytest
import torch

from quantlab import (
    PerAxis,
    PerGroup,
    PerTensor,
    choose_qparams,
    fake_quantize,
    kl_divergence,
    mse,
    pack,
    quantize_tensor,
    split_error,
    sqnr_db,
    top1_agreement,
    unpack,
)
from quantlab.blocks import from_blocks, to_blocks


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_block(x, bits, symmetric, signed):
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return fake_quantize(x, choose_qparams(x.min(), x.max(), qmin=qmin, qmax=qmax, symmetric=symmetric))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_granularity_equals_its_loop(bits, symmetric, signed):
    x = tensor(6, 10)
    how = {"bits": bits, "symmetric": symmetric, "signed": signed}
    whole = quantize_tensor(x, granularity=PerTensor(), **how).dequantize()
    rows = quantize_tensor(x, granularity=PerAxis(0), **how).dequantize()
    columns = quantize_tensor(x, granularity=PerAxis(-1), **how).dequantize()
    groups = quantize_tensor(x, granularity=PerGroup(4), **how).dequantize()  # 4, 4 and a short one of 2
    assert torch.equal(whole, one_block(x, **how))
    for i in range(6):
        assert torch.equal(rows[i], one_block(x[i], **how))
        for a, b in ((0, 4), (4, 8), (8, 10)):
            assert torch.equal(groups[i, a:b], one_block(x[i, a:b], **how))
    for j in range(10):
        assert torch.equal(columns[:, j], one_block(x[:, j], **how))


def test_shapes_of_scales():
    x = tensor(2, 3, 10)
    assert quantize_tensor(x, bits=4, granularity=PerTensor()).qparams.scale.shape == ()
    assert quantize_tensor(x, bits=4, granularity=PerAxis(1)).qparams.scale.shape == (1, 3, 1)
    assert quantize_tensor(x, bits=4, granularity=PerGroup(4)).qparams.scale.shape == (2, 3, 3)
    assert quantize_tensor(x, bits=4, granularity=PerGroup(99)).qparams.scale.shape == (2, 3, 1)


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerAxis(0), PerAxis(1), PerAxis(-1), PerGroup(1), PerGroup(3), PerGroup(64)]
)
@pytest.mark.parametrize("shape", [(5,), (4, 6), (2, 3, 7)])
def test_blocks_go_there_and_back(granularity, shape):
    if isinstance(granularity, PerAxis) and granularity.axis >= len(shape):
        return
    x = tensor(*shape)
    assert torch.equal(from_blocks(to_blocks(x, granularity), granularity, x.shape), x)


@pytest.mark.parametrize(
    ("granularity", "symmetric", "by_hand"),
    [
        (PerTensor(), True, 30 + 4),  # 60 codes of 4 bits, one float32 scale
        (PerTensor(), False, 30 + 4 + 1),  # one zero point of 4 bits fills a byte
        (PerAxis(0), False, 30 + 6 * 4 + 3),
        (PerGroup(4), False, 30 + 18 * 4 + 9),
    ],
)
def test_bytes_by_hand(granularity, symmetric, by_hand):
    q = quantize_tensor(tensor(6, 10), bits=4, granularity=granularity, symmetric=symmetric)
    assert q.nbytes == by_hand
    assert q.bits_per_element == 8 * by_hand / 60
    stored = (
        q.packed().numel()
        + q.qparams.scale.numel() * 4
        + (0 if symmetric else pack(q.qparams.zero_point - q.qparams.qmin, bits=4).numel())
    )
    assert stored == by_hand  # what packing really yields


def test_quantized_codes_unpack_to_themselves():
    q = quantize_tensor(tensor(7, 11), bits=3, granularity=PerGroup(4), symmetric=False)
    assert torch.equal(unpack(q.packed(), bits=3, count=77).int().view(7, 11) + q.qparams.qmin, q.codes.int())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_comes_back_and_input_is_unchanged(dtype):
    x = tensor(4, 8).to(dtype)
    before = x.clone()
    assert quantize_tensor(x, bits=4, granularity=PerGroup(3)).dequantize().dtype == dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.ones(3, 4), torch.full((3, 4), 1e-42), torch.tensor([[2.0]])])
def test_degenerate_blocks(x):
    for granularity in (PerTensor(), PerAxis(0), PerGroup(3)):
        back = quantize_tensor(x, bits=4, granularity=granularity, symmetric=False).dequantize()
        assert (back - x).abs().max() <= 1e-6


def test_bad_input_names_the_rule():
    x = tensor(4, 4)
    with pytest.raises(ValueError, match=r"bits must be 2..8 for a symmetric grid, got 1"):
        quantize_tensor(x, bits=1, granularity=PerTensor())
    with pytest.raises(ValueError, match=r"bits must be 1..8 for a asymmetric grid, got 9|got 9"):
        quantize_tensor(x, bits=9, granularity=PerTensor(), symmetric=False)
    with pytest.raises(ValueError, match=r"PerAxis\(2\) names no dimension"):
        quantize_tensor(x, bits=4, granularity=PerAxis(2))
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        PerGroup(0)
    with pytest.raises(ValueError, match="empty"):
        quantize_tensor(torch.empty(0, 3), bits=4, granularity=PerTensor())
    with pytest.raises(ValueError, match="finite"):
        quantize_tensor(x * float("nan"), bits=4, granularity=PerTensor())


def test_split_error_adds_up_and_names_the_right_part():
    x = tensor(1000)
    qp = choose_qparams(torch.tensor(-1.0), torch.tensor(1.0), qmin=-8, qmax=7, symmetric=True)
    rounding = clipping = 0.0
    for value, back in zip(x.tolist(), fake_quantize(x, qp).tolist(), strict=True):
        code = round(value / qp.scale.item())
        rounding += (back - value) ** 2 / 1000 if -8 <= code <= 7 else 0
        clipping += (back - value) ** 2 / 1000 if not -8 <= code <= 7 else 0
    split = split_error(x, qp)
    assert split == pytest.approx((rounding, clipping), rel=1e-4)
    assert sum(split) == pytest.approx(mse(x, fake_quantize(x, qp)), rel=1e-9)
    wide = choose_qparams(x.min(), x.max(), qmin=-8, qmax=7)
    assert split_error(x, wide).clipping == 0


def test_sqnr_of_a_bit():
    x = tensor(1_000_000)

    def db(bits):
        return sqnr_db(x, quantize_tensor(x.clamp(-3, 3), bits=bits, granularity=PerTensor()).dequantize().clamp(-9, 9))

    assert db(3) - db(2) > 4
    uniform = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    gain = [sqnr_db(uniform, quantize_tensor(uniform, bits=b, granularity=PerTensor()).dequantize()) for b in (7, 8)]
    assert gain[1] - gain[0] == pytest.approx(6.02, abs=0.1)


def test_divergence_by_hand():
    p, q = tensor(5, 7), tensor(5, 7, seed=1)
    by_hand = 0.0
    for i in range(5):
        pi, qi = torch.softmax(p[i].double(), 0), torch.softmax(q[i].double(), 0)
        by_hand += sum(float(a * math.log(a / b)) for a, b in zip(pi, qi, strict=True)) / 5
    assert kl_divergence(p, q) == pytest.approx(by_hand, rel=1e-5)
    assert kl_divergence(p, p) == 0
    assert kl_divergence(p, q) != pytest.approx(kl_divergence(q, p), rel=1e-3)  # it is not symmetric
    assert top1_agreement(p, q) == sum(int(a.argmax() == b.argmax()) for a, b in zip(p, q, strict=True)) / 5


@pytest.mark.parametrize("function", [mse, sqnr_db, kl_divergence, top1_agreement])
def test_metrics_bad_input(function):
    with pytest.raises(ValueError, match="one shape"):
        function(tensor(2, 3), tensor(3, 2))
    with pytest.raises(ValueError, match="finite"):
        function(tensor(2, 3), tensor(2, 3) * float("inf"))
    with pytest.raises(ValueError, match="empty"):
        function(torch.empty(0, 3), torch.empty(0, 3))
    with pytest.raises(ValueError, match="all zero"):
        sqnr_db(torch.zeros(3), tensor(3))


def test_half_precision_stays_finite():
    x = torch.tensor([65504.0, -65504.0]).half()
    assert torch.isfinite(quantize_tensor(x, bits=4, granularity=PerTensor()).dequantize()).all()


@pytest.mark.parametrize("bits", [2.5, True, "4", None])
def test_bits_are_a_whole_number(bits):
    with pytest.raises(ValueError, match="bits must be"):
        quantize_tensor(tensor(4), bits=bits, granularity=PerTensor())


def test_a_class_or_a_scalar_is_told_apart():
    with pytest.raises(ValueError, match=r"granularity must be PerTensor\(\)"):
        quantize_tensor(tensor(4), bits=4, granularity=PerTensor)
    with pytest.raises(ValueError, match="names no dimension"):
        quantize_tensor(torch.tensor(1.5), bits=4, granularity=PerAxis(0))
    with pytest.raises(ValueError, match=r"must be a tensor, got \[1.0\]"):
        mse([1.0], [1.0])


def test_scales_in_16_bits_dequantize_to_the_dtype_of_the_original():
    """A learner may store scales in half precision: dataclasses.replace, then dequantize as before."""
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    q = quantize_tensor(x, bits=4, granularity=PerGroup(8))
    for dtype in (torch.float16, torch.bfloat16):
        small = dataclasses.replace(q, qparams=dataclasses.replace(q.qparams, scale=q.qparams.scale.to(dtype)))
        assert small.dequantize().dtype == torch.float32
        torch.testing.assert_close(small.dequantize(), q.dequantize(), rtol=0.01, atol=0)
