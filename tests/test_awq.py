"""AWQ: the search against a plain loop over alphas with X itself, and what scaling must not change."""

import pytest
import torch

from quantlab import Hessian, PerAxis, PerGroup, quantize_tensor
from quantlab.awq import awq_search, scale_and_round, scales_of, search_scales


def layer(rows=24, columns=32, tokens=200):
    """Inputs with a few loud channels, as AWQ was made for."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, columns, generator=random)
    x[:, [3, 17]] *= 30
    return torch.randn(rows, columns, generator=random) * 0.05, x


def output_error(weight, weight_hat, x):
    return ((x @ (weight - weight_hat).T).square().sum() / (x @ weight.T).square().sum()).item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8, 20])
def test_the_search_is_a_loop_over_alphas(group_size, symmetric):
    weight, x = layer()
    q, search = awq_search(weight, x, bits=3, group_size=group_size, symmetric=symmetric, steps=10)
    strength, errors = x.double().abs().mean(0), []  # the extremes of a symmetric grid are ties: same digits
    for step in range(11):
        s = strength ** (step / 10)
        s = (s / (s.max() * s.min()).sqrt()).half().float()
        granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
        rounded = quantize_tensor(weight * s, bits=3, granularity=granularity, symmetric=symmetric)
        errors.append(output_error(weight, rounded.dequantize() / s, x))
    assert search.errors == pytest.approx(errors, rel=1e-3)
    assert search.alpha == search.alphas[errors.index(min(errors))]
    assert output_error(weight, q.dequantize(), x) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.8 * errors[0]  # loud channels: scaling helps


def test_scaling_alone_changes_nothing_in_float():
    weight, x = layer()
    s = scales_of(x.abs().mean(0), 0.7)
    torch.testing.assert_close((x / s) @ (weight * s).T, x @ weight.T, rtol=1e-5, atol=1e-5)
    q = scale_and_round(weight, s, bits=8, group_size=8)
    torch.testing.assert_close(q.dequantize(), weight, atol=0.02 * weight.abs().max().item(), rtol=0)


def test_alpha_zero_is_rounding_to_nearest():
    weight, x = layer()
    s = scales_of(x.abs().mean(0), 0.0)
    assert (s == 1).all()
    plain = quantize_tensor(weight, bits=4, granularity=PerGroup(8), symmetric=False)
    assert torch.equal(scale_and_round(weight, s, bits=4, group_size=8).dequantize(), plain.dequantize())


def test_layers_that_share_an_input_share_the_scales():
    weight, x = layer()
    hessian = Hessian(32).add(x[:50]).add(x[50:])
    torch.testing.assert_close(hessian.mean_abs.float(), x.abs().mean(0))
    both = search_scales([weight[:10], weight[10:]], hessian, bits=3, group_size=8)
    whole = search_scales([weight], hessian, bits=3, group_size=8)
    assert both.errors == pytest.approx(whole.errors, rel=1e-9)
    assert torch.equal(both.input_scale, whole.input_scale)


def test_a_salient_channel_is_worth_more_than_a_random_one():
    """The experiment that motivates AWQ, with its control: keep 2 of 32 channels in float."""
    weight, x = layer()
    rounded = quantize_tensor(weight, bits=3, granularity=PerGroup(8), symmetric=False).dequantize()

    def error(kept):
        mixed = rounded.clone()
        mixed[:, kept] = weight[:, kept]
        return output_error(weight, mixed, x)

    assert error([3, 17]) < 0.1 * error([])
    assert error([5, 20]) > 0.9 * error([])


def test_bytes_count_the_scales():
    weight, x = layer()
    q, _ = awq_search(weight, x, bits=4, group_size=8)
    assert q.nbytes == q.q.nbytes + 2 * 32
    assert q.bits_per_element == 8 * q.nbytes / weight.numel()


def test_silent_channels_and_given_tensors_are_left_alone():
    weight, x = layer()
    x[:, 5] = 0
    before = weight.clone(), x.clone()
    q, search = awq_search(weight, x, bits=4, group_size=8)
    assert search.input_scale[5] == 1
    assert torch.isfinite(q.dequantize()).all()
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])
    silent, search = awq_search(weight, torch.zeros(4, 32), bits=4, group_size=8)
    assert (search.input_scale == 1).all()
    assert awq_search(weight.bfloat16(), x, bits=4)[0].dequantize().dtype == torch.bfloat16


def test_a_channel_that_is_nearly_silent():
    weight, x = layer()
    x[:, 3] = 0
    x[0, 3] = 1e-45
    q, search = awq_search(weight, x, bits=4, group_size=8)
    assert torch.isfinite(q.dequantize()).all()
    assert torch.equal(search.input_scale, search.input_scale.half().float())


def test_bad_input_is_refused():
    weight, x = layer()
    for bad, message in (
        ({"x": x[:, :9]}, "32 features"),
        ({"x": x * float("nan")}, "finite"),
        ({"bits": 9}, "bits"),
        ({"group_size": 0}, "group_size"),
        ({"steps": 0}, "steps"),
        ({"weight": weight[0]}, "features"),
        ({"weight": weight * float("inf")}, "finite"),
    ):
        arguments = {"weight": weight, "x": x, "bits": 4, "group_size": 8} | bad
        with pytest.raises(ValueError, match=message):
            awq_search(arguments.pop("weight"), arguments.pop("x"), **arguments)
