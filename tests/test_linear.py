"""Integer layers: exact integers against a loop, the fast kernel and the simulation against the exact integers."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from quantlab import Hessian, PerAxis, PerGroup, PerTensor, choose_qparams, gptq_quantize, quantize, quantize_tensor
from quantlab.linear import DynamicInt8Linear, StaticInt8Linear, WeightOnlyLinear, int_linear, kernel_status
from quantlab.linear.int8 import _choose_numbers


class Range:
    """Stands for an observer: all that a layer asks of it is min_max()."""

    def __init__(self, low, high):
        self.bounds = torch.tensor(float(low)), torch.tensor(float(high))

    def min_max(self):
        return self.bounds


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def linear(inputs=48, outputs=20, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias)
    layer.weight.data = random(outputs, inputs, seed=1, scale=0.1) * torch.linspace(0.1, 3, outputs)[:, None]
    if bias:
        layer.bias.data = random(outputs, seed=2)
    return layer.requires_grad_(False)


LAYERS = {
    "tensor": lambda layer, bits: DynamicInt8Linear.from_linear(layer, activation_bits=bits),
    "token": lambda layer, bits: DynamicInt8Linear.from_linear(layer, per="token", activation_bits=bits),
    "static": lambda layer, bits: StaticInt8Linear.from_linear(layer, Range(-2, 3), activation_bits=bits),
}


def by_hand(x_codes, x_zero, w_codes, w_zero):
    """The definition: every product by itself, in Python's integers."""
    return [
        [
            sum((int(a) - int(zx)) * (int(b) - int(zw)) for a, b in zip(row, column, strict=True))
            for column, zw in zip(w_codes, w_zero, strict=True)
        ]
        for row, zx in zip(x_codes, x_zero, strict=True)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_the_four_terms_are_the_sum_of_products(tokens, features, outputs, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (tokens, features), generator=draw, dtype=torch.uint8)
    w = torch.randint(-128, 128, (outputs, features), generator=draw, dtype=torch.int8)
    x_zero = torch.randint(0, 256, (tokens, 1), generator=draw)
    w_zero = torch.randint(-128, 128, (outputs,), generator=draw)
    sums = int_linear(x, x_zero, w, w_zero)
    assert sums.dtype == torch.int32
    assert sums.tolist() == by_hand(x, x_zero, w, w_zero)
    same_for_all = int_linear(x, 7, w)
    assert same_for_all.tolist() == by_hand(x, [7] * tokens, w, [0] * outputs)


def test_int_linear_refuses_what_has_no_exact_answer():
    ones = torch.ones(1, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="x_codes must be integers, got torch.float32"):
        int_linear(ones.float(), 0, ones)
    with pytest.raises(ValueError, match="4 features, w_codes 3"):
        int_linear(ones, 0, ones[:, :3])
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        int_linear(ones * 2**15, 0, ones * 2**15)
    for zero in (torch.zeros(4, dtype=torch.int32), torch.tensor(0.5), 1.5):
        with pytest.raises(ValueError, match="x_zero must be"):
            int_linear(torch.ones(4, 4, dtype=torch.int32), zero, torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="w_zero must be"):
        int_linear(ones, 0, ones, torch.zeros(1, 2, dtype=torch.int32))
    assert int_linear(ones * -(2**15), 0, ones * 2**14).item() == -(2**31)  # just fits
    assert int_linear(ones * 2**15, 0, ones * (2**14 - 1)).item() == 4 * 2**15 * (2**14 - 1)  # just below


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("way", LAYERS)
def test_three_ways_give_the_same_layer(way, tokens, bias, bits):
    layer = LAYERS[way](linear(bias=bias), bits)
    x = random(tokens, 48, seed=3) * torch.linspace(0.2, 3, tokens)[:, None]
    exact, fast, simulated = layer.exact(x), layer(x), layer.simulate(x)
    size = exact.abs().max()
    assert (simulated - exact).abs().max() <= 1e-5 * size
    assert (fast - exact).abs().max() <= 1e-5 * size
    qp = layer.input_qparams(x)
    steps = qp.scale * layer.weight_scale
    sums = int_linear(quantize(x, qp), qp.zero_point, layer.codes)
    undone = (fast - (0 if layer.bias is None else layer.bias)) / steps
    assert torch.equal(undone.round().int(), sums), "the kernel's integers are ours"


@pytest.mark.skipif(kernel_status() == "missing", reason="this torch has no integer kernel")
def test_the_kernel_is_used_and_is_exact_at_the_largest_sums_it_is_given():
    layer = nn.Linear(4096, 16, bias=False).requires_grad_(False)
    layer.weight.fill_(1.0)
    layer.weight[1::2] = -1.0
    bits = 8 if kernel_status() == "exact" else 7
    fast = DynamicInt8Linear.from_linear(layer, activation_bits=bits)
    assert fast.kernel == "oneDNN"
    for x in (torch.ones(3, 4096), -torch.ones(3, 4096), random(3, 4096)):
        assert (fast(x) - fast.exact(x)).abs().max() <= 1e-5 * fast.exact(x).abs().max()


@settings(max_examples=200, deadline=None)
@given(st.floats(-(2**99), 2**99, width=32), st.floats(-(2**99), 2**99, width=32), st.integers(2, 8), st.booleans())
def test_numbers_are_those_of_choose_qparams(a, b, bits, symmetric):
    low, high = min(a, b), max(a, b)
    qp = choose_qparams(torch.tensor(low), torch.tensor(high), qmin=0, qmax=2**bits - 1, symmetric=symmetric)
    numbers = _choose_numbers(low, high, qmax=2**bits - 1, symmetric=symmetric)
    assert numbers == (qp.scale.item(), qp.zero_point.item())


def test_a_cpu_without_vnni_is_told_apart_and_stays_exact():
    """oneDNN held back to AVX2 in a process of its own: 8-bit layers go the exact way, 7-bit ones the fast way."""
    program = """
import json, torch
from quantlab.linear import DynamicInt8Linear, kernel_status
torch.manual_seed(0)
layer = torch.nn.Linear(256, 64, bias=False).requires_grad_(False)
layer.weight.abs_()
x, found = torch.rand(5, 256), {"status": kernel_status()}
for bits in (7, 8):
    int8 = DynamicInt8Linear.from_linear(layer, activation_bits=bits)
    found[bits] = int8.kernel, (int8(x) - int8.exact(x)).abs().max().item() / int8.exact(x).abs().max().item()
print(json.dumps(found))
"""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):  # x86; elsewhere the setting does nothing
        assert found["status"] == "saturates"
        assert (found["7"][0], found["8"][0]) == ("oneDNN", "exact integers")
    assert max(found["7"][1], found["8"][1]) < 1e-5


def test_the_maps_are_those_of_their_definitions():
    x = random(6, 48, seed=4)
    x[2] *= 10
    dynamic, token, static = (LAYERS[way](linear(), 8) for way in LAYERS)
    whole = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
    assert dynamic.input_qparams(x).scale == whole.scale
    assert dynamic.input_qparams(x).zero_point == whole.zero_point
    rows = token.input_qparams(x)
    assert rows.scale.shape == (6, 1)
    torch.testing.assert_close(rows.scale[:, 0], 2 * x.abs().amax(1) / 255)
    assert (rows.zero_point == 128).all()
    fixed = choose_qparams(torch.tensor(-2.0), torch.tensor(3.0), qmin=0, qmax=255)
    assert static.input_qparams(x).scale == static.input_qparams(x * 9).scale == fixed.scale


def test_a_token_scale_saves_the_small_tokens_that_a_tensor_scale_drowns():
    layer = linear(bias=False)
    x = random(8, 48, seed=5)
    x[0] *= 1000
    tensor, token = LAYERS["tensor"](layer, 8), LAYERS["token"](layer, 8)
    wanted = layer(x)[1:]

    def error(int8):
        return ((int8(x)[1:] - wanted).norm() / wanted.norm()).item()

    assert error(token) < 0.02 < 0.5 < error(tensor)


def test_a_static_range_clips_what_lies_outside_it():
    layer = linear(bias=False)
    static = LAYERS["static"](layer, 8)
    x = random(4, 48, seed=6)
    clipped = static.dequantized_weight() @ x.clamp(-2, 3).T
    assert (static(x * 1.0) - clipped.T).abs().max() < 0.02 * clipped.abs().max()


@pytest.mark.parametrize("way", LAYERS)
def test_shapes_and_dtypes_are_kept_and_nothing_is_changed(way):
    original, x = linear(), random(2, 3, 48, seed=7)
    before = original.weight.clone(), x.clone()
    layer = LAYERS[way](original, 8)
    assert layer(x).shape == (2, 3, 20)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert layer(x.to(dtype)).dtype == dtype
    assert torch.equal(original.weight, before[0])
    assert torch.equal(x, before[1])
    assert (layer(x).flatten(0, 1) - original(x).flatten(0, 1)).norm() < 0.02 * original(x).norm() or way == "static"
    again = LAYERS[way](linear(), 8)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))


@pytest.mark.parametrize("way", LAYERS)
def test_bad_input_is_refused(way):
    layer = LAYERS[way](linear(), 8)
    with pytest.raises(ValueError, match="48 features"):
        layer(random(3, 47))
    with pytest.raises(ValueError, match="48 features"):
        layer(torch.zeros(0, 48))
    with pytest.raises(ValueError, match="must be floats"):
        layer(torch.ones(3, 48, dtype=torch.int32))
    for bad in (math.nan, math.inf):
        x = random(3, 48)
        x[1, 2] = bad
        with pytest.raises(ValueError, match="finite"):
            layer(x)
        with pytest.raises(ValueError, match="finite"):
            layer.exact(x)
        with pytest.raises(ValueError, match="finite"):
            layer(x[1:2])
    with pytest.raises(ValueError, match="activation_bits must be 2..8, got 9"):
        LAYERS[way](linear(), 9)
    with pytest.raises(ValueError, match="need an nn.Linear or a Conv1D, got Conv1d"):
        LAYERS[way](nn.Conv1d(3, 3, 1), 8)
    with pytest.raises(ValueError, match="per must be"):
        DynamicInt8Linear.from_linear(linear(), per="row")


@pytest.mark.parametrize("x", [torch.zeros(3, 48), torch.full((3, 48), 2.5), torch.full((1, 48), -1e-30)], ids=str)
def test_constant_inputs(x):
    for way in ("tensor", "token"):
        layer = LAYERS[way](linear(), 8)
        assert torch.isfinite(layer(x)).all()
        assert (layer(x) - layer.exact(x)).abs().max() <= 1e-5 * layer.exact(x).abs().max()


@pytest.mark.parametrize("way", LAYERS)
def test_a_weight_that_is_a_transposed_view(way):
    layer, x = linear(), random(5, 48, seed=10)
    wanted = LAYERS[way](layer, 8)(x)
    layer.weight.data = layer.weight.data.T.contiguous().T
    assert torch.equal(LAYERS[way](layer, 8)(x), wanted)


@pytest.mark.parametrize("way", LAYERS)
def test_a_used_layer_can_be_copied_loaded_and_moved(way):
    layer, x = LAYERS[way](linear(), 8), random(5, 48, seed=11)
    wanted = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)
    other = linear()
    other.weight.data *= -2
    used = LAYERS[way](other, 8)
    assert not torch.equal(used(x), wanted)
    used.load_state_dict(layer.state_dict())
    assert torch.equal(used(x), wanted)
    scales = layer.weight_scale.clone()
    small = layer.to(torch.bfloat16)
    assert torch.equal(small.weight_scale, scales)
    torch.testing.assert_close(small(x), wanted, atol=0.02, rtol=0.01)  # the bias alone was rounded
    assert small(x.bfloat16()).dtype == torch.bfloat16


def test_inference_mode_and_sums_that_the_kernel_could_not_hold():
    with torch.inference_mode():
        layer, x = DynamicInt8Linear.from_linear(linear()), random(3, 48)
        assert torch.equal(layer(x), layer(x))
    wide = nn.Linear(70_000, 2, bias=False).requires_grad_(False)
    wide.weight.fill_(1.0)
    layer = DynamicInt8Linear.from_linear(wide)
    assert layer.kernel == "exact integers"
    with pytest.raises(ValueError, match="does not fit 32 bits"):
        layer(torch.ones(1, 70_000))


def test_weight_only_in_bfloat16():
    layer, x = WeightOnlyLinear.from_linear(linear()), random(5, 48, seed=11)
    wanted = layer(x)
    torch.testing.assert_close(layer(x.bfloat16()).float(), wanted, atol=0.1, rtol=0.05)
    torch.testing.assert_close(layer.to(torch.bfloat16)(x), wanted, atol=0.02, rtol=0.01)


def test_int8_weights_are_a_quarter():
    layer = linear(2048, 2048, bias=False)
    for way in LAYERS:
        int8 = LAYERS[way](layer, 8)
        assert int8.nbytes == 2048 * 2048 + 4 * 2048
        assert int8.nbytes <= 0.26 * layer.weight.nbytes


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerGroup(16), PerGroup(7)], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_only_is_the_layer_with_the_dequantized_weight(bits, symmetric, granularity):
    layer, x = linear(), random(5, 48, seed=8)
    small = WeightOnlyLinear.from_linear(layer, bits=bits, granularity=granularity, symmetric=symmetric)
    q = quantize_tensor(layer.weight, bits=bits, granularity=granularity, symmetric=symmetric)
    assert torch.equal(small.weight, q.dequantize())
    assert small.nbytes == q.nbytes
    torch.testing.assert_close(small(x), x @ q.dequantize().T + layer.bias)
    floats = [b for b in small.buffers() if b.is_floating_point() and b.numel() == layer.weight.numel()]
    assert floats == []  # nothing keeps the float weight


def test_weight_only_takes_gptq_with_act_order():
    layer, x = linear(bias=False), random(200, 48, seed=9) * torch.linspace(0.1, 4, 48)
    q = gptq_quantize(layer.weight, Hessian(48).add(x), bits=4, group_size=16, act_order=True)
    small = WeightOnlyLinear(q)
    assert torch.equal(small.weight, q.dequantize())
    assert small.nbytes == q.nbytes
