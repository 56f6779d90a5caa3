"""methods: objects that check themselves, their short names, what they need, and what the ledger calls them."""

import copy

import numpy as np
import pytest
import torch
from test_lm import random_model, random_tokens

from quantlab import PerGroup, lm, quantize_tensor
from quantlab.linear import PackedLinear, packed_layers
from quantlab.methods import AWQ, GPTQ, METHODS, NF4, RTN, W8A8, LLMInt8, SmoothQuant, method_of
from quantlab.observers import MSE


@pytest.mark.parametrize("name", METHODS)
def test_the_short_name_is_the_object(name):
    method = method_of(name)
    assert (method.name, method_of(method)) == (name, method)
    assert method == type(method)(**method.settings)
    assert hash(method) == hash(type(method)(**method.settings))


@pytest.mark.parametrize(
    ("method", "label", "bits", "group"),
    [
        (RTN(), "rtn", 4, "128"),
        (RTN(bits=3, group_size=None, clip_search=True), "rtn clip", 3, "row"),
        (NF4(double_quant=True), "nf4 double", 4, "64"),
        (GPTQ(act_order=True, damping=0.1), "gptq act-order damping=0.1", 4, "128"),
        (AWQ(symmetric=True), "awq symmetric", 4, "128"),
        (W8A8(), "w8a8_dynamic", 8, "tensor"),
        (W8A8(per="static", observer=MSE), "w8a8_static observer=quantlab.observers.MSE", 8, "static"),
        (SmoothQuant(per="static", alpha=0.7), "smoothquant alpha=0.7", 8, "static"),
        (LLMInt8(), "llm_int8", 8, "split"),
    ],
)
def test_what_the_ledger_calls_it(method, label, bits, group):
    assert (method.label, method.ledger_bits, method.ledger_group) == (label, bits, group)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RTN(bits=9), "bits must be 1..8, got 9"),
        (lambda: RTN(bits=1, symmetric=True), "bits must be 2..8, got 1"),
        (lambda: RTN(bits="4"), "bits must be an int, got '4'"),
        (lambda: GPTQ(bits={"a": 4, "b": 4.0}), "bits of b must be an int, got 4.0"),
        (lambda: GPTQ(group_size=0), "group_size must be at least 1, got 0"),
        (lambda: GPTQ(damping=float("nan")), "damping must be a finite number"),
        (lambda: GPTQ(act_order="yes"), "act_order must be True or False, got 'yes'"),
        (lambda: AWQ(steps=10**9), "steps must be 1..1000"),
        (lambda: NF4(group_size=None), "group_size must be an int, got None"),
        (lambda: W8A8(per="row"), "per must be one of tensor, token, static, got 'row'"),
        (lambda: W8A8(activation_bits="4"), "activation_bits must be an int"),
        (lambda: W8A8(observer=3), "pass MinMax, not MinMax"),
        (lambda: SmoothQuant(alpha=2), "alpha must be at least 0 and at most 1, got 2"),
        (lambda: LLMInt8(threshold=0), "threshold must be above 0, got 0"),
        (lambda: method_of("rnt"), "method must be one of rtn, nf4"),
        (lambda: method_of("gptq", clip_search=True), "gptq takes bits, .*; got clip_search"),
        (lambda: method_of(GPTQ(), bits=3), "has its settings already; got bits"),
    ],
)
def test_settings_are_checked_when_it_is_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numpy_and_tensor_integers_become_ints():
    method = GPTQ(bits=np.int64(3), group_size=torch.tensor(16))
    assert repr(method) == repr(GPTQ(bits=3, group_size=16))


@pytest.mark.parametrize("method", [RTN(bits=3, group_size=8), NF4(group_size=16), W8A8(per="token"), LLMInt8()])
def test_a_method_that_needs_no_data_reads_none(method, monkeypatch):
    model, tokens = random_model("llama"), random_tokens()
    wanted, report = lm.quantize_lm(model, tokens, method, window=64, output_errors=True, progress=False)
    assert report.calibration_tokens == 0
    assert all(row.output_error > 0 for row in report.layers)
    monkeypatch.setattr(type(model), "forward", None)  # nothing runs the model
    new, report = lm.quantize_lm(model, method=method, progress=False)
    assert report.calibration_tokens == 0
    assert [row.output_error for row in report.layers] == [None] * len(report.layers)
    assert report.seconds == pytest.approx(sum(row.seconds for row in report.layers))
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), wanted.state_dict().values(), strict=True))
    assert "–" in str(report)


def test_rounding_to_nearest_is_quantize_weights():
    model = random_model("gpt2")
    plain, _ = lm.quantize_weights(
        model, lambda w: quantize_tensor(w, bits=3, granularity=PerGroup(8), symmetric=False)
    )
    new, _ = lm.quantize_lm(model, method=RTN(bits=3, group_size=8), progress=False)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), plain.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", [GPTQ(), AWQ(), W8A8(per="static"), SmoothQuant()])
def test_a_method_that_needs_data_asks_for_it(method):
    with pytest.raises(ValueError, match="need one row of at least 2 tokens"):
        lm.quantize_lm(random_model("llama"), method=method, progress=False)


@pytest.mark.parametrize("bad", ["bundled", None, torch.nn.Linear(2, 2), ("model", "tokenizer")])
def test_a_model_is_wanted_not_its_name(bad):
    with pytest.raises(ValueError, match="model must be a"):
        lm.quantize_lm(bad, random_tokens())


# --- packed models ----------------------------------------------------------------------------------------------


PACKABLE = [RTN(group_size=8), RTN(bits=3, symmetric=True), NF4(double_quant=True), AWQ(group_size=8)]


@pytest.mark.parametrize("method", [*PACKABLE, GPTQ(act_order=True, group_size=8)], ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_model_computes_the_same_from_fewer_bytes_and_is_saved_again(tmp_path, family, method):
    model, tokens = random_model(family), random_tokens()
    new, report = lm.quantize_lm(model, tokens, method, window=64, progress=False)
    lm.save_quantized(tmp_path / "m", new, report.qtensors)
    packed, _ = lm.load_quantized(tmp_path / "m", packed=True)
    with torch.no_grad():
        assert torch.equal(packed(tokens[None, :64]).logits, new(tokens[None, :64]).logits)
    assert packed_layers(packed).keys() == report.qtensors.keys()
    assert all(isinstance(layer, PackedLinear) for layer in packed_layers(packed).values())
    assert lm.model_bytes(packed) == report.nbytes
    held = sum(t.nbytes for t in [*packed.parameters(), *packed.buffers()])
    assert held < 0.75 * sum(t.nbytes for t in [*new.parameters(), *new.buffers()])
    lm.save_quantized(tmp_path / "again", copy.deepcopy(packed))
    again, _ = lm.load_quantized(tmp_path / "again")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), new.state_dict().values(), strict=True))


def test_loading_leaves_the_random_numbers_alone(tmp_path):
    new, report = lm.quantize_lm(random_model("llama"), method="rtn", progress=False)
    lm.save_quantized(tmp_path / "m", new, report.qtensors)
    before = torch.get_rng_state()
    lm.load_quantized(tmp_path / "m")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("bad", [torch.ones(2, 48, dtype=torch.int64), torch.ones(2, 47), [1.0]])
def test_a_packed_layer_refuses_what_is_no_input(bad):
    layer = PackedLinear.from_linear(torch.nn.Linear(48, 3), bits=8)
    with pytest.raises(ValueError, match="x must be"):
        layer(bad)
