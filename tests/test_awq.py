"""AWQ: the search against a plain loop over alphas with X itself, and what scaling must not change."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab import Hessian, PerAxis, PerGroup, quantize_tensor
from quantlab.awq import awq_search, keep_columns, scale_and_round, scales_of, search_scales
from quantlab.lm import (
    DATA,
    capture_inputs,
    divergence,
    linear_layers,
    load_lm,
    load_text,
    quantize_lm,
    quantize_weights,
    token_stream,
    weight_of,
)
from quantlab.outliers import norm_readers, plant_outliers


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


# Keeping columns in float


def test_kept_columns_are_the_weights_and_the_others_are_rounded():
    weight, x = layer()
    plain = quantize_tensor(weight, bits=3, granularity=PerGroup(8), symmetric=False)
    mixed = keep_columns(weight, [17, 3], bits=3, group_size=8)
    wanted = plain.dequantize()
    for column in (3, 17):
        wanted[:, column] = weight[:, column]
    assert torch.equal(mixed.dequantize(), wanted)
    assert torch.equal(keep_columns(weight, torch.tensor([3, 17]), bits=3, group_size=8).dequantize(), wanted)
    assert mixed.nbytes == plain.nbytes + 4 * 2 * 24 + 2 * 4  # these weights do not fit 16 bits
    assert mixed.bits_per_element == 8 * mixed.nbytes / weight.numel()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 20])
def test_keeping_all_columns_or_none(group_size, symmetric):
    weight, _ = layer()
    settings = {"bits": 4, "group_size": group_size, "symmetric": symmetric}
    assert torch.equal(keep_columns(weight, range(32), **settings).dequantize(), weight)
    granularity = PerAxis(0) if group_size is None else PerGroup(group_size)
    plain = quantize_tensor(weight, bits=4, granularity=granularity, symmetric=symmetric)
    for none in ([], torch.tensor([])):
        kept = keep_columns(weight, none, **settings)
        assert torch.equal(kept.dequantize(), plain.dequantize())
        assert kept.nbytes == plain.nbytes


def test_keeping_columns_leaves_the_weight_and_its_dtype():
    weight, _ = layer()
    before = weight.clone()
    kept = keep_columns(weight, [1], bits=4, group_size=8)
    kept.dequantize().zero_()
    assert torch.equal(kept.dequantize()[:, 1], weight[:, 1])
    assert torch.equal(weight, before)
    assert keep_columns(weight.bfloat16(), [1], bits=4).dequantize().dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("columns", "message"), [([32], r"0\.\.31, got 32"), ([-1], "got -1"), ([3, 3], "twice"), ([1.5], "column")]
)
def test_columns_that_cannot_be_kept_are_refused(columns, message):
    with pytest.raises(ValueError, match=message):
        keep_columns(layer()[0], columns, bits=4)
    with pytest.raises(ValueError, match="need a weight"):
        keep_columns(layer()[0][0], [0], bits=4)


# What scaling does to one group


@given(
    others=st.lists(st.floats(-1, 1), min_size=1, max_size=6),
    small=st.floats(-0.9, 0.9),
    s=st.floats(1, 8),
    bits=st.integers(2, 8),
)
def test_the_step_stays_until_the_scaled_weight_leaves_the_range_of_its_group(others, small, s, bits):
    """The bound of notebook 11: half a step over s for the scaled weight, and half a step for the others."""
    group = torch.tensor([[-1.0, 1.0, *others, small]])
    scale = torch.ones(group.shape[1])
    scale[-1] = s
    q = scale_and_round(group, scale, bits=bits, group_size=None)
    grown = max(1.0, s * abs(small))
    step = 2 * grown / (2**bits - 1) if s * abs(small) <= 1 else (1 + grown) / (2**bits - 1)
    assert q.q.qparams.scale.item() == pytest.approx(step, rel=1e-5)
    error = (q.dequantize() - group).abs().flatten()
    assert error[-1] <= 1.001 * step / s  # half a step, and half of one where the zero point was rounded
    assert error[:-1].max() <= 1.001 * step


# The real model: s is folded away


@pytest.fixture(scope="module")
def bundled():
    model, tokenizer = load_lm(str(DATA / "model"))
    return model, token_stream(tokenizer, load_text("calibration"))[:1024]


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens[None, :256], use_cache=False).logits


def folded(model, scale_of):
    """1 / s into each norm, s into the layers that read it; and from the rows of up_proj into down_proj."""
    new = copy.deepcopy(model)
    names = {module: name for name, module in new.named_modules()}
    with torch.no_grad():
        for norm, layers in norm_readers(new):
            s = scale_of(names[layers[0]])
            norm.weight.div_(s)
            for reader in layers:
                reader.weight.mul_(s)
        for block in new.model.layers:
            s = scale_of(names[block.mlp.down_proj])
            block.mlp.up_proj.weight.div_(s[:, None])
            block.mlp.down_proj.weight.mul_(s)
    return new


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_folding_the_scales_into_the_real_model_changes_nothing_in_float(bundled, alpha):
    model, tokens = bundled
    inputs = capture_inputs(model, tokens, list(linear_layers(model)))
    new = folded(model, lambda name: scales_of(inputs[name].abs().mean(0), alpha))
    before, after = logits(model, tokens), logits(new, tokens)
    moved = sum(not torch.equal(weight_of(a), weight_of(b)) for a, b in layers_of(model, new))
    assert moved == 6 * len(model.model.layers)  # all but o_proj
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def layers_of(*models):
    return zip(*(linear_layers(m).values() for m in models), strict=True)


def test_a_folded_quantized_model_needs_no_scales(bundled):
    """The norm carries 1 / s and the codes are those of W · s: no division is left, and the outputs stay."""
    model, tokens = bundled
    new, report = quantize_lm(model, tokens, method="awq", bits=4, progress=False)
    deployed = copy.deepcopy(new)
    names = {module: name for name, module in deployed.named_modules()}
    with torch.no_grad():
        for norm, layers in norm_readers(deployed):
            norm.weight.div_(report.qtensors[names[layers[0]]].input_scale)
            for reader in layers:
                reader.weight.copy_(report.qtensors[names[reader]].q.dequantize())
    wanted, got = logits(new, tokens), logits(deployed, tokens)
    assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert any((q.input_scale != 1).any() for q in report.qtensors.values())


def test_salient_channels_of_the_real_model_beat_random_ones_and_large_weights(bundled):
    """Lin et al. 2023, table 1, on every layer together: keep 1 % of the channels."""
    model, tokens = bundled
    inputs = capture_inputs(model, tokens, list(linear_layers(model)))
    random, lost = torch.Generator().manual_seed(0), {"activation": 0.0, "random": 0.0, "weight": 0.0}
    for name, module in linear_layers(model).items():
        weight, x = weight_of(module), inputs[name]
        orders = {
            "activation": x.abs().mean(0).argsort(descending=True),
            "weight": weight.norm(dim=0).argsort(descending=True),
            "random": torch.randperm(weight.shape[1], generator=random),
        }
        none = output_error(weight, keep_columns(weight, [], bits=3).dequantize(), x)
        for way, order in orders.items():
            kept = keep_columns(weight, order[: round(0.01 * len(order))], bits=3)
            lost[way] += output_error(weight, kept.dequantize(), x) / none / len(inputs)
    assert lost["activation"] < 0.97
    assert lost["activation"] < lost["weight"] < lost["random"]
    assert 0.97 < lost["random"] < 1.0


def test_awq_gives_back_what_planted_outliers_cost(bundled):
    """The project's bar is KL(awq) < KL(rtn); with 16,384 calibration tokens it is 0.113 against 0.246."""
    model, tokens = bundled
    planted = plant_outliers(model, channels=range(0, 240, 40), factor=100)
    rounded, _ = quantize_weights(
        planted, lambda w: quantize_tensor(w, bits=4, granularity=PerGroup(128), symmetric=False)
    )
    scaled, _ = quantize_lm(planted, tokens, method="awq", bits=4, progress=False)
    text = tokens.flip(0)[:512]  # any tokens do
    assert divergence(model, scaled, text).kl < 0.7 * divergence(model, rounded, text).kl
