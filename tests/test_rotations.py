"""Rotations: Hadamard matrices, their fast transform, models that compute the same in another basis, a learned turn."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import FAMILIES, logits, made, text
from test_lm import random_model

from quantlab import Hessian, PerAxis, PerGroup, fake_quantize, gptq_quantize, lm, quantize_tensor
from quantlab.affine import choose_qparams
from quantlab.clipping import quantize_clipped
from quantlab.linear import DynamicInt8Linear
from quantlab.methods import W4A4
from quantlab.outliers import plant_outliers
from quantlab.rotations import (
    OnlineHadamard,
    cayley,
    fold_norms,
    hadamard,
    hadamard_transform,
    learn_rotation,
    random_hadamard,
    random_orthogonal,
    rotate,
    rounding_error,
)

TURNED = ("llama", "qwen2", "qwen3", "mistral", "smollm3", "granite")  # SmolLM2 is a Llama; smollm3's head is tied
REASONS = {
    "gemma2": "adds one to its gain",
    "gemma3": "adds one to its gain",
    "phi3": "Phi3ForCausalLM has a block without self_attn.q_proj",
    "mixtral": "without mlp.gate_proj",
    "qwen3-moe": "without mlp.gate_proj",
    "olmo2": "without input_layernorm",
}
SIZES = (1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 72, 148, 256, 264, 576, 704, 1536)


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spiky(tokens=64, width=32):
    """Rows with one channel 50 times as large as the others."""
    x = rows(tokens, width)
    x[:, 5] *= 50
    return x


def lively(family, **changes):
    """A tiny model of the family whose gains and biases are random: a norm that is not folded is seen."""
    model, random = made(family), torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            gain = 1.0 if "norm" in name else 0.0
            parameter.data.copy_(gain + 0.5 * torch.randn(parameter.shape, generator=random))
    return model


def off(new, model):
    wanted = logits(model)
    return ((logits(new) - wanted).abs().max() / wanted.abs().max()).item()


def read(model, name):
    """What a layer of the first block reads."""
    return lm.capture_inputs(model, text(), [f"model.layers.0.{name}"], window=32)[f"model.layers.0.{name}"]


# Hadamard matrices


@pytest.mark.parametrize("n", SIZES)
def test_hadamard_is_orthogonal_and_of_one_size(n):
    H = hadamard(n).double()
    torch.testing.assert_close(H @ H.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(H.abs(), torch.full_like(H, n**-0.5), rtol=1e-6, atol=0)
    assert hadamard(n).dtype == torch.float32


@pytest.mark.parametrize("k", range(9))
def test_powers_of_two_are_sylvesters(k):
    """His definition, entry by entry: the sign is the parity of the bits that i and j share."""
    H = hadamard(2**k)
    signs = [[(-1) ** (i & j).bit_count() for j in range(2**k)] for i in range(2**k)]
    assert torch.equal(torch.sign(H), torch.tensor(signs, dtype=torch.float32))


def test_the_factors_are_those_that_are_promised():
    """576 = 36 · 16 and 1536 = 12 · 128: the large matrix is Kronecker's product of the small ones."""
    torch.testing.assert_close(hadamard(576), torch.kron(hadamard(36), hadamard(16)))
    torch.testing.assert_close(hadamard(1536), torch.kron(hadamard(12), hadamard(128)))


@pytest.mark.parametrize("n", SIZES)
def test_the_transform_is_the_product_with_the_matrix(n):
    x = rows(3, 5, n)
    torch.testing.assert_close(hadamard_transform(x), x @ hadamard(n), rtol=0, atol=1e-5)


def test_the_transform_of_more_rows_than_are_done_at_once():
    x = rows(300, 24)
    torch.testing.assert_close(hadamard_transform(x), x @ hadamard(24), rtol=0, atol=1e-5)


def butterflies(x):
    """The slow definition for powers of two: sums and differences of pairs, 1, 2, 4 ... apart."""
    x, step = list(x), 1
    while step < len(x):
        for i in range(len(x)):
            if not i & step:
                x[i], x[i + step] = x[i] + x[i + step], x[i] - x[i + step]
        step *= 2
    return [value / math.sqrt(len(x)) for value in x]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 6).flatmap(lambda k: st.lists(st.floats(-100, 100, width=32), min_size=2**k, max_size=2**k)))
def test_the_transform_against_a_loop(values):
    x = torch.tensor(values)
    wanted = torch.tensor(butterflies(x.double().tolist()), dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x).double(), wanted, rtol=1e-5, atol=1e-4)


def test_the_transform_keeps_dtype_and_passes_gradients():
    x = rows(4, 12, seed=1)
    assert hadamard_transform(x.bfloat16()).dtype == torch.bfloat16
    wanted = x.double() @ hadamard(12).double()
    torch.testing.assert_close(hadamard_transform(x.double()), wanted, rtol=0, atol=1e-6)
    x.requires_grad_()
    (hadamard_transform(x) * rows(4, 12, seed=2)).sum().backward()
    torch.testing.assert_close(x.grad, rows(4, 12, seed=2) @ hadamard(12).T)


@pytest.mark.parametrize(
    ("n", "reason"),
    [(3, "multiple of 4"), (6, "multiple of 4"), (18, "multiple of 4"), (92, "Sylvester's and Paley's"),
     (0, "n must be 1..65536"), (2.0, "n must be an int")],
)  # fmt: skip
def test_where_there_is_no_hadamard_matrix(n, reason):
    with pytest.raises(ValueError, match=reason):
        hadamard(n)


def test_a_single_number_cannot_be_turned():
    with pytest.raises(ValueError, match="x must have a dimension to turn"):
        hadamard_transform(torch.tensor(1.0))


def test_random_rotations():
    for make in (random_hadamard, random_orthogonal):
        one, again, other = make(36, seed=1), make(36, seed=1), make(36, seed=2)
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        torch.testing.assert_close(one @ one.T, torch.eye(36), rtol=0, atol=1e-5)
    signs = random_hadamard(36, seed=1) / hadamard(36)
    assert torch.equal(signs.round(), signs[:, :1].round().expand(36, 36))  # a sign a row
    assert {-1, 1} == set(signs[:, 0].round().tolist())


def test_random_orthogonal_matrices_are_equally_likely():
    """QR alone would give a diagonal of one sign; turned by a fixed matrix, the mean must stay 0."""
    many = torch.stack([random_orthogonal(4, seed=seed) for seed in range(400)])
    assert many.mean(0).abs().max() < 5 * 0.5 / 400**0.5  # an entry has the spread 1/√4


def test_a_spike_is_spread_over_all_channels():
    x = torch.zeros(64)
    x[17] = 8.0
    assert torch.equal(hadamard_transform(x).abs(), torch.ones(64))


# Models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", TURNED)
def test_the_same_function_in_other_bases(family, tied):
    model = lively(family)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    before = copy.deepcopy(model.state_dict())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == (tied or family == "smollm3")
    for new in (fold_norms(model), rotate(model), rotate(model, random_orthogonal(32), heads=False, online=False)):
        assert off(new, model) < 1e-4
        assert off(new, model) > 0, "nothing was done"
        assert new.get_input_embeddings().weight is not new.get_output_embeddings().weight
        assert not new.config.tie_word_embeddings
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in TURNED])
def test_a_model_that_cannot_be_turned_is_refused_and_told_why(family):
    why = REASONS.get(family, "subtracts the mean or adds a bias, as LayerNorm")
    for change in (fold_norms, rotate):
        with pytest.raises(ValueError, match=why):
            change(made(family))


@pytest.mark.parametrize("family", TURNED)
def test_every_input_is_the_old_one_turned(family):
    """R1: the norm's, without its gain. R2: head by head. R4: what down_proj reads."""
    model, R = lively(family), random_orthogonal(32, seed=4)
    new = rotate(model, R)
    gain = model.model.layers[0].input_layernorm.weight.detach()
    torch.testing.assert_close(read(new, "self_attn.q_proj"), read(model, "self_attn.q_proj") / gain @ R,
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    old = read(model, "self_attn.o_proj")
    turned = (old.unflatten(-1, (4, 8)) @ hadamard(8)).flatten(-2)
    torch.testing.assert_close(read(new, "self_attn.o_proj"), turned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(read(new, "mlp.down_proj.linear"), read(model, "mlp.down_proj") @ hadamard(72),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    assert all(torch.equal(b.input_layernorm.weight, torch.ones(32)) for b in new.model.layers)


def test_a_turn_without_folded_gains_changes_the_function():
    """The control: rotate by hand, leave a gain where it is."""
    model, R = lively("llama"), random_orthogonal(32)
    new = rotate(model, R, heads=False, online=False)
    with torch.no_grad():
        new.model.norm.weight.copy_(model.model.norm.weight)
        new.lm_head.weight.copy_(model.lm_head.weight @ R)
    assert off(new, model) > 0.01


def test_a_turned_model_without_an_online_part_is_saved_as_any_other(tmp_path):
    model = lively("smollm3")
    new, report = lm.quantize_lm(rotate(model, online=False), method="rtn", group_size=16, progress=False)
    lm.save_quantized(tmp_path / "m", new, report.qtensors)
    loaded, _ = lm.load_quantized(tmp_path / "m")
    assert torch.equal(logits(loaded), logits(new))
    online, report = lm.quantize_lm(rotate(model), method="rtn", group_size=16, progress=False)
    with pytest.raises(ValueError, match="layers.0.mlp.down_proj.rotation turns activations"):
        lm.save_quantized(tmp_path / "n", online, report.qtensors)


def test_a_turned_model_is_a_model_for_everything_else():
    model = lively("llama")
    new = rotate(model)
    names = set(lm.linear_layers(new))
    assert "model.layers.1.mlp.down_proj.linear" in names
    assert len(names) == len(lm.linear_layers(model))
    assert list(lm.layers_of_role(new, "down")) == [f"model.layers.{i}.mlp.down_proj.linear" for i in (0, 1)]
    for method in ("gptq", "awq", "w8a8_static", "smoothquant", "llm_int8", "w4a4"):
        bits = {"group_size": 16} if method in ("gptq", "awq") else {}
        quantized, report = lm.quantize_lm(new, text(), method=method, window=32, progress=False, **bits)
        assert {row.name for row in report.layers} == names
        assert sum(isinstance(m, OnlineHadamard) for m in quantized.modules()) == 2
        assert 0 < lm.divergence(model, quantized, text(), window=32).kl < 3


def test_turning_saves_a_model_with_outliers():
    model = lively("llama")
    planted = plant_outliers(model, channels=[3], factor=300)
    kl = [
        lm.divergence(model, lm.quantize_lm(m, method="w8a8_dynamic", progress=False)[0], text(), window=32).kl
        for m in (planted, rotate(planted))
    ]
    assert kl[1] < 0.1 * kl[0]


@pytest.mark.parametrize(
    ("residual", "message"),
    [(torch.eye(16), r"residual must be a matrix \(32, 32\)"), (2 * torch.eye(32), "residual must be orthogonal"),
     (torch.eye(32) * math.nan, "residual must be finite"), ("hadamard", "residual must be a tensor")],
)  # fmt: skip
def test_what_is_no_rotation_is_refused(residual, message):
    with pytest.raises(ValueError, match=message):
        rotate(lively("llama"), residual)


def test_a_width_without_a_hadamard_matrix_is_named():
    model = random_model("llama")  # heads of 6
    with pytest.raises(ValueError, match="no Hadamard matrix of 6 rows: .*; pass heads=False"):
        rotate(model)
    assert len(lm.linear_layers(rotate(model, heads=False))) == len(lm.linear_layers(model))


def test_what_is_turned_online_is_not_turned_again():
    with pytest.raises(ValueError, match="rotated online already"):
        rotate(rotate(lively("llama")))
    twice = rotate(rotate(lively("llama"), online=False), seed=1)
    assert off(twice, lively("llama")) < 1e-4


# Learned


def test_cayley_gives_rotations():
    R = cayley(rows(12, 12).double())
    torch.testing.assert_close(R @ R.T, torch.eye(12, dtype=torch.float64))
    assert torch.linalg.det(R) == pytest.approx(1)
    assert torch.equal(cayley(torch.zeros(3, 3)), torch.eye(3))
    with pytest.raises(ValueError, match="square"):
        cayley(rows(2, 3))


def test_rounding_error_is_that_of_the_library_and_of_w4a4():
    x = spiky()
    largest = x.abs().amax(1, keepdim=True)
    qp = choose_qparams(-largest, largest, qmin=0, qmax=15, symmetric=True)
    wanted = (fake_quantize(x, qp) - x).square().sum() / x.square().sum()
    assert rounding_error(x, bits=4).item() == pytest.approx(wanted.item(), rel=1e-5)
    weight = quantize_tensor(x, bits=4, granularity=PerAxis(0)).dequantize()
    assert rounding_error(x, bits=4).item() == pytest.approx(
        ((weight - x).square().sum() / x.square().sum()).item(), rel=1e-5
    )


def test_its_gradient_is_that_of_the_step():
    """Rounding passes gradients through: what is left is that of the largest value, by which the grid grows."""
    x = spiky(3, 8).double().requires_grad_()
    lost = rounding_error(x, bits=4) * x.detach().square().sum()
    lost.backward()
    others = torch.ones_like(x).scatter(1, x.detach().abs().argmax(1, keepdim=True), 0).bool()
    whole = (rounding_error(x, bits=4) / x.square().sum()).item() * x.detach().square().sum().item()
    torch.testing.assert_close(x.grad[others], (-2 * whole * x.detach())[others], rtol=1e-6, atol=1e-12)


def test_a_learned_rotation_lowers_the_error_that_it_is_trained_on():
    x, weight = spiky(), rows(24, 32, seed=1)
    weight[:, 9] *= 20

    def error(R):
        return sum(rounding_error(m @ R, bits=4).item() for m in (x, weight)) / 2

    for start in (None, torch.eye(32), random_orthogonal(32, seed=2)):
        learned = learn_rotation([x, weight], start=start, steps=120, learning_rate=0.02)
        torch.testing.assert_close(learned @ learned.T, torch.eye(32), rtol=0, atol=1e-4)
        assert error(learned) < 0.9 * error(random_hadamard(32) if start is None else start)


def test_without_a_step_the_start_comes_back():
    start = random_orthogonal(32, seed=2)
    torch.testing.assert_close(learn_rotation([spiky()], start=start, steps=0), start)


def test_learning_is_the_same_in_every_call_and_touches_nothing():
    x = spiky()
    before, state = x.clone(), torch.get_rng_state()
    with torch.no_grad():  # a notebook may have switched gradients off
        one, again = (learn_rotation([x], steps=3) for _ in range(2))
    assert torch.equal(one, again)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.requires_grad


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"rows": []}, "rows must be matrices of one width"), ({"rows": [rows(3, 4), rows(3, 5)]}, "of one width"),
     ({"rows": [rows(4)]}, "of one width"), ({"start": 2 * torch.eye(32)}, "start must be orthogonal"),
     ({"bits": 9}, "bits must be 2..8"), ({"learning_rate": 0}, "learning_rate must be above 0")],
)  # fmt: skip
def test_bad_input_to_learning(wrong, message):
    with pytest.raises(ValueError, match=message):
        learn_rotation(**{"rows": [spiky()], "steps": 1} | wrong)


# W4A4


def test_w4a4_is_what_its_definition_says():
    layer, x = torch.nn.Linear(32, 12).requires_grad_(False), spiky(10)
    new = DynamicInt8Linear.from_linear(layer, per="token", activation_bits=4, weight_bits=4)
    weight = quantize_tensor(layer.weight, bits=4, granularity=PerAxis(0)).dequantize()
    largest = x.abs().amax(1, keepdim=True)
    qp = choose_qparams(-largest, largest, qmin=0, qmax=15, symmetric=True)
    torch.testing.assert_close(new(x), F.linear(fake_quantize(x, qp), weight, layer.bias), rtol=1e-5, atol=1e-5)
    assert new.nbytes == 32 * 12 // 2 + 12 * 4
    assert set(new.codes.unique().tolist()) <= set(range(-8, 8))


def test_w4a4_of_a_model():
    model = lively("llama")
    new, report = lm.quantize_lm(model, method="w4a4", progress=False)
    layer = new.model.layers[0].mlp.up_proj
    assert (layer.per, layer.activation_bits, layer.weight_bits) == ("token", 4, 4)
    assert report.layers[0].bits_per_weight == pytest.approx(4 + 32 / 32)  # a float32 scale for 32 weights
    eight = lm.quantize_lm(model, method="w8a8_dynamic", per="token", progress=False)[0]
    assert lm.divergence(model, eight, text(), window=32).kl < lm.divergence(model, new, text(), window=32).kl


def test_weights_of_w4a4_rounded_by_others():
    """Rows that GPTQ or the clip search has rounded are what the layer computes with, code by code."""
    model, tokens, name = lively("llama"), text(), "model.layers.0.mlp.down_proj"
    before = lm.weight_of(lm.linear_layers(model)[name])
    hessian = Hessian(72).add(lm.capture_inputs(model, tokens, [name], window=32)[name])
    wanted = {
        "clip": quantize_clipped(before, bits=4, granularity=PerAxis(0), steps=7),
        "gptq": gptq_quantize(before, hessian, bits=4, symmetric=True),
        "nearest": quantize_tensor(before, bits=4, granularity=PerAxis(0)),
    }
    layers = {}
    for rounding, q in wanted.items():
        new, report = lm.quantize_lm(model, tokens, W4A4(rounding=rounding), window=32, progress=False)
        layers[rounding] = new.get_submodule(name)
        assert (layers[rounding].codes == q.codes).double().mean() > 0.99  # float32's last digits may decide a tie
        torch.testing.assert_close(layers[rounding].weight_scale, q.qparams.scale.flatten(), rtol=1e-4, atol=0)
        assert report.calibration_tokens == (len(tokens) if rounding == "gptq" else 0)
    error = {way: hessian.output_error(before, layer.dequantized_weight()) for way, layer in layers.items()}
    assert error["gptq"] < error["clip"] < error["nearest"]


@pytest.mark.parametrize(
    "rows_of",
    [lambda w: quantize_tensor(w, bits=4, granularity=PerGroup(8)),
     lambda w: quantize_tensor(w[:5], bits=4, granularity=PerAxis(0)),
     lambda w: quantize_tensor(w, bits=4, granularity=PerAxis(0), symmetric=False),
     lambda w: quantize_tensor(w, bits=4, granularity=PerAxis(0), signed=False)],
)  # fmt: skip
def test_rows_that_do_not_fit_are_refused(rows_of):
    layer = torch.nn.Linear(32, 12).requires_grad_(False)
    with pytest.raises(ValueError, match="rows must hold signed codes"):
        DynamicInt8Linear.from_linear(layer, rows=rows_of(layer.weight))


def test_rows_of_other_bits_than_asked_for_are_refused():
    layer = torch.nn.Linear(32, 12).requires_grad_(False)
    rows = quantize_tensor(layer.weight, bits=4, granularity=PerAxis(0))
    with pytest.raises(ValueError, match="weight_bits must be the 4 bits of rows, got 8"):
        DynamicInt8Linear.from_linear(layer, rows=rows)
    assert DynamicInt8Linear.from_linear(layer, rows=rows, weight_bits=4).weight_bits == 4
