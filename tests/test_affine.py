"""affine: against loops, against torch, properties, edges, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import QParams, choose_qparams, dequantize, fake_quantize, quantize
from quantlab.plain import quantize_by_hand

GRIDS = {"int8": (-128, 127), "uint8": (0, 255), "int4": (-8, 7), "uint2": (0, 3), "narrow": (-127, 127)}


def fit(x, bits, symmetric):
    half = 2 ** (bits - 1)
    return choose_qparams(x.amin(), x.amax(), qmin=-half, qmax=half - 1, symmetric=symmetric)


def qparams(scale, zero_point=0, qmin=-8, qmax=7):
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), qmin, qmax)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_error_reaches_half_a_step_and_no_more(bits, symmetric):
    x = torch.linspace(-1, 3, 10001)
    step = (6 if symmetric else 4) / (2**bits - 1)  # width of the range / number of steps, by hand
    error = (fake_quantize(x, fit(x, bits, symmetric)) - x).abs().max().item()
    assert 0.9 * step / 2 <= error <= step / 2 * (1 + 1e-5)


@pytest.mark.parametrize("name", GRIDS)
def test_codes_equal_the_loop(name):
    qmin, qmax = GRIDS[name]
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 3
    zero_point = (qmin + qmax) // 2
    assert quantize(x, qparams(0.07, zero_point, qmin, qmax)).tolist() == quantize_by_hand(
        x.tolist(), 0.07, zero_point, qmin, qmax
    )


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("scale", [0.1, 0.5, 1 / 3, 1e-3])
def test_codes_and_values_equal_torch_on_two_million_values_and_all_ties(name, scale):
    qmin, qmax = GRIDS[name]
    zero_point = (qmin + qmax + 1) // 2 + 1
    ties = (torch.arange(qmin - 2, qmax + 3) - zero_point + 0.5) * scale
    near = torch.cat([ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)])
    normal = torch.randn(2_000_000, generator=torch.Generator().manual_seed(1)) * scale * (qmax - qmin) / 4
    x = torch.cat([near, normal])
    ours = fake_quantize(x, qparams(scale, zero_point, qmin, qmax))
    theirs = torch.fake_quantize_per_channel_affine(
        x[None], torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int32), 0, qmin, qmax
    )[0]
    codes = quantize(x, qparams(scale, zero_point, qmin, qmax))
    assert torch.equal(ours, theirs)
    assert torch.equal(codes, torch.round(theirs / scale).int() + zero_point)


def test_codes_equal_quantized_decomposed():
    import torch.ao.quantization.fx._decomposed  # noqa: F401  registers the operators

    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2)) * 5
    theirs = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.037, 11, -128, 127, torch.int8)
    assert torch.equal(quantize(x, qparams(0.037, 11, -128, 127)), theirs.int())


def test_round_then_add_zero_point():
    # 0.5 is a tie: round(0.5) + 1 = 1, round(0.5 + 1) = 2
    assert quantize(torch.tensor([0.5]), qparams(1.0, 1)).item() == 1


@pytest.mark.parametrize("zero_point", [-8, 0, 3, 7])
def test_gradient_equals_torch(zero_point):
    x = torch.linspace(-3, 3, 4001)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    fake_quantize(mine, qparams(0.2, zero_point)).pow(2).sum().backward()
    torch.fake_quantize_per_tensor_affine(theirs, 0.2, zero_point, -8, 7).pow(2).sum().backward()
    assert torch.equal(mine.grad, theirs.grad)
    assert (mine.grad == 0).sum() > 100  # some were clamped


def test_zero_is_exact_even_for_a_range_without_zero():
    qp = choose_qparams(torch.tensor(10.0), torch.tensor(11.0), qmin=0, qmax=255)
    assert fake_quantize(torch.tensor([0.0, 10.5]), qp).tolist() == pytest.approx([0.0, 10.5], abs=11 / 255 / 2)
    assert fake_quantize(torch.zeros(1), qp).item() == 0.0
    qp = choose_qparams(torch.tensor(-11.0), torch.tensor(-10.0), qmin=0, qmax=255)
    assert qp.zero_point.item() == 255
    assert fake_quantize(torch.tensor([-10.5]), qp).item() == pytest.approx(-10.5, abs=11 / 255 / 2)


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 0), (5, 5), (-5, -5), (0, 1e-40), (-1e-45, 0), (-3e38, 3e38), (0, 3.4e38), (-3.4e38, 3.4e38), (1e-38, 1e-38)],
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("codes", [(0, 1), (-8, 7), (0, 255)])
def test_scale_is_never_zero_infinite_or_nan(low, high, symmetric, codes):
    qp = choose_qparams(
        torch.tensor(float(low)), torch.tensor(float(high)), qmin=codes[0], qmax=codes[1], symmetric=symmetric
    )
    assert torch.isfinite(qp.scale)
    assert qp.scale > 0
    assert codes[0] <= qp.zero_point <= codes[1]
    assert qp.zero_point.dtype == torch.int32
    x = torch.tensor([float(low), 0.0, float(high)])
    back = fake_quantize(x, qp)
    assert back[1] == 0
    # Beyond that the exact scale, or the grid point half a step past the range, is no float32.
    if high <= 3e38 and codes != (0, 1):
        assert (back - x).abs().max() <= qp.scale * (0.5 + 1e-4)


def test_one_map_per_row():
    x = torch.tensor([[-1.0, 3.0], [0.0, 30.0]])
    qp = choose_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), qmin=0, qmax=3)
    assert quantize(x, qp).tolist() == [[0, 3], [0, 3]]
    assert qp.scale.shape == (2, 1)


finite = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(finite, min_size=1, max_size=20), st.integers(1, 8), st.booleans())
def test_properties(values, bits, symmetric):
    x = torch.tensor(values)
    qp = choose_qparams(x.amin(), x.amax(), qmin=0, qmax=2**bits - 1, symmetric=symmetric)
    codes, back = quantize(x, qp), fake_quantize(x, qp)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1
    assert torch.equal(back, dequantize(codes, qp))
    assert torch.equal(fake_quantize(back, qp), back)  # quantizing twice changes nothing more
    assert (back - x).abs().max() <= qp.scale * 0.5 * (1 + 1e-4) or (symmetric and bits == 1)
    assert torch.equal(codes[x.argsort()], codes.sort().values)  # order is kept


@settings(max_examples=50, deadline=None)
@given(st.lists(finite, min_size=2, max_size=20), st.sampled_from([0.25, 2.0, 1024.0]))
def test_scaling_the_data_scales_the_grid(values, factor):
    x = torch.tensor(values)
    if x.abs().max() < 1e-30:
        return
    one, two = fit(x, 4, False), fit(x * factor, 4, False)
    assert two.scale == one.scale * factor
    assert torch.equal(quantize(x, one), quantize(x * factor, two))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept_and_input_unchanged(dtype):
    x = torch.tensor([0.3, -1.0, 7.0], dtype=dtype)
    before = x.clone()
    y = fake_quantize(x, fit(x, 4, True))
    assert y.dtype == dtype
    assert torch.equal(x, before)
    assert quantize(x, fit(x, 4, True)).dtype == torch.int32


def test_bad_bounds_name_the_rule():
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="qmin < qmax, got qmin=3, qmax=3"):
        choose_qparams(-one, one, qmin=3, qmax=3)
    with pytest.raises(ValueError, match="must be finite"):
        choose_qparams(-one, one * float("inf"), qmin=0, qmax=3)
    with pytest.raises(ValueError, match="swapped"):
        choose_qparams(one, -one, qmin=0, qmax=3)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([1, 2]), "must be floating point, got torch.int64"),
        (torch.tensor([]), "empty"),
        (torch.tensor([1.0, float("nan")]), "1 NaN or infinite"),
        (torch.tensor([float("inf")]), "finite"),
    ],
)
def test_bad_input_names_the_rule(function, x, message):
    with pytest.raises(ValueError, match=message):
        function(x, qparams(1.0))


def test_dequantize_wants_codes():
    with pytest.raises(ValueError, match="did you pass x"):
        dequantize(torch.tensor([1.0]), qparams(1.0))


def test_whole_numbers_are_asked_for():
    one = torch.tensor(1.0)
    for bad in (0.5, True, float("nan"), "3"):
        with pytest.raises(ValueError, match="qmax must be an int"):
            choose_qparams(-one, one, qmin=0, qmax=bad)
    with pytest.raises(ValueError, match="bounds of one shape"):
        choose_qparams(torch.zeros(2), torch.zeros(3), qmin=0, qmax=3)


def test_float64_is_rounded_in_float64():
    x = torch.tensor([0.5 + 1e-9, 2.5 + 1e-9], dtype=torch.float64)  # in float32 both would be ties
    assert quantize(x, qparams(1.0)).tolist() == [1, 3]
    random = torch.randn(50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = torch.fake_quantize_per_tensor_affine(random, 0.1, 1, -8, 7)
    torch.testing.assert_close(fake_quantize(random, qparams(0.1, 1)), theirs, rtol=1e-6, atol=1e-8)
