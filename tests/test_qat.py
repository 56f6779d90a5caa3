"""qat: fake-quantized layers against loops, torch's own kernels and finite differences; a model there and back."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_lm import random_model, random_tokens
from torch import nn
from transformers.pytorch_utils import Conv1D

from quantlab import MinMax, PerAxis, PerGroup, PerTensor, QParams, choose_qparams, fake_quantize, lm, quantize_tensor
from quantlab.linear import DynamicInt8Linear, StaticInt8Linear
from quantlab.qat import (
    LSQ,
    FakeQuantLinear,
    MinMaxRounding,
    Rounding,
    binary,
    convert,
    fake_quant_layers,
    pack_ternary,
    prepare_qat,
    quantize_binary,
    quantize_ternary,
    ternary,
    unpack_ternary,
)
from quantlab.storage import load_tensors
from quantlab.train.rounding import FewLevels
from recipes import learned_steps, minmax

GRANULARITIES = [PerTensor(), PerAxis(0), PerGroup(8), PerGroup(5), PerGroup(100)]
WEIGHT_METHODS = {
    "minmax 4 asymmetric": {"bits": 4, "group_size": 8},
    "minmax 2 symmetric": {"bits": 2, "group_size": None, "symmetric": True},
    "minmax 1": {"bits": 1, "group_size": 8},
    "minmax 3 short groups": {"bits": 3, "group_size": 7},
    "minmax 8 one a layer": {"bits": 8, "group_size": "tensor"},
    "lsq 2": {"bits": 2, "group_size": 8, "method": "lsq"},
    "lsq 4 short groups": {"bits": 4, "group_size": 7, "method": "lsq"},
    "lsq 3 rows": {"bits": 3, "group_size": None, "method": "lsq"},
    "ternary": {"group_size": "tensor", "method": "ternary"},
    "ternary short groups": {"group_size": 7, "method": "ternary"},
    "binary": {"group_size": 8, "method": "binary"},
    "binary rows": {"group_size": None, "method": "binary"},
    "binary one a layer": {"group_size": "tensor", "method": "binary"},
    "lsq as torch masks": {"method": lambda w: LSQ(w, bits=3, granularity=PerAxis(0), mask="code")},
}


def weights(rows=6, columns=24, seed=0, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=random, dtype=dtype) * 0.3


def blocks_by_hand(x, granularity):
    """Lists of flat indices that share a scale."""
    index = torch.arange(x.numel()).view(x.shape)
    if isinstance(granularity, PerTensor):
        return [index.flatten().tolist()]
    if isinstance(granularity, PerAxis):
        return [row.flatten().tolist() for row in index.movedim(granularity.axis, 0)]
    rows = index.reshape(-1, x.shape[-1]).tolist()
    size = granularity.group_size
    return [row[i : i + size] for row in rows for i in range(0, len(row), size)]


# --- the gradient of plain fake quantization ---------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize(("bits", "symmetric"), [(2, False), (2, True), (4, False), (4, True), (8, True)])
def test_minmax_equals_torch_values_and_gradients(bits, symmetric, granularity):
    """torch knows a scale a tensor or a channel: each block of ours is a channel of torch's."""
    x, upstream = weights(), weights(seed=1)
    rounding = MinMaxRounding(bits=bits, granularity=granularity, symmetric=symmetric)
    ours = x.clone().requires_grad_()
    y = rounding(ours)
    y.backward(upstream)
    qmin, qmax = rounding.qmin, rounding.qmax
    for block in blocks_by_hand(x, granularity):
        part = x.flatten()[block].clone()[None].requires_grad_()
        low, high = part.detach().amin(1), part.detach().amax(1)
        qp = choose_qparams(low, high, qmin=qmin, qmax=qmax, symmetric=symmetric)
        theirs = torch.fake_quantize_per_channel_affine(part, qp.scale, qp.zero_point, 0, qmin, qmax)
        theirs.backward(upstream.flatten()[block][None])
        assert torch.equal(y.flatten()[block], theirs[0])
        assert torch.equal(ours.grad.flatten()[block], part.grad[0])


@pytest.mark.parametrize("zero", [0, 3, -8, 7])
def test_the_mask_at_the_edges(zero):
    """Inside is what rounds to a code: half a step beyond the last code still counts, a hair more does not."""
    qp = QParams(torch.tensor(0.5), torch.tensor(zero, dtype=torch.int32), -8, 7)
    for code, outward in ((-8, -1), (7, 1)):
        last = 0.5 * (code - zero)
        even = (code - zero) % 2 == 0  # ties go to the even multiple: the tie beyond an even end stays inside
        beyond = last + outward * 0.25
        x = torch.tensor([last, beyond - outward * 1e-3, beyond, beyond + outward * 1e-3, outward * 1e6])
        x.requires_grad_()
        fake_quantize(x, qp).sum().backward()
        assert x.grad.tolist() == [1.0, 1.0, float(even), 0.0, 0.0]
        theirs = x.detach().clone().requires_grad_()
        torch.fake_quantize_per_tensor_affine(theirs, 0.5, zero, -8, 7).sum().backward()
        assert torch.equal(x.grad, theirs.grad)


def test_rounding_before_training_is_round_to_nearest():
    linear = nn.Linear(24, 6)
    layer = FakeQuantLinear.from_linear(linear, bits=3, group_size=8)
    rtn = quantize_tensor(linear.weight, bits=3, granularity=PerGroup(8), symmetric=False)
    assert torch.equal(layer.quantized_weight(), rtn.dequantize())


# --- learned steps ----------------------------------------------------------------------------------------------


def lsq_by_hand(v, s, qmin, qmax, mask):
    """Value, ∂v̂/∂v and ∂v̂/∂s of one number. The step, and its multiples, are float32 numbers."""
    ratio = v / s
    code = round(ratio)  # Python rounds halves to even
    if mask == "value":
        low, high = ratio <= qmin, ratio >= qmax
    else:
        low, high = code < qmin, code > qmax
    inside = not (low or high)
    value = (torch.tensor(s) * max(qmin, min(qmax, code))).item()
    return value, float(inside), code - ratio if inside else qmin if low else qmax


@pytest.mark.parametrize("mask", ["value", "code"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_lsq_equals_the_loop(bits, granularity, mask):
    x, upstream = weights(dtype=torch.float64).requires_grad_(), weights(seed=1, dtype=torch.float64)
    lsq = LSQ(x, bits=bits, granularity=granularity, mask=mask)
    y = lsq(x)
    y.backward(upstream)
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values, given_back, flat = y.flatten().tolist(), upstream.flatten().tolist(), x.flatten().tolist()
    for k, block in enumerate(blocks_by_hand(x, granularity)):
        step = lsq.step[k].item()
        assert step == pytest.approx(2 * sum(abs(flat[i]) for i in block) / len(block) / math.sqrt(qmax))
        of_step = 0.0
        for i in block:
            value, dv, ds = lsq_by_hand(flat[i], step, qmin, qmax, mask)
            assert values[i] == pytest.approx(value, abs=1e-12)
            assert x.grad.flatten()[i].item() == dv * given_back[i]
            of_step += ds * given_back[i]
        expected = of_step / math.sqrt(len(block) * qmax)
        assert lsq.step.grad[k].item() == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_masked_by_the_code_equals_torch(bits):
    x, upstream = weights(64, 64) * 3, weights(64, 64, seed=1)
    lsq, ours = LSQ(x, bits=bits, mask="code"), x.clone().requires_grad_()
    y = lsq(ours)
    y.backward(upstream)
    theirs, step = x.clone().requires_grad_(), lsq.step.detach().flatten().clone().requires_grad_()
    factor = 1 / math.sqrt(x.numel() * lsq.qmax)
    zero = torch.zeros(1, requires_grad=True)
    z = torch._fake_quantize_learnable_per_tensor_affine(theirs, step, zero, lsq.qmin, lsq.qmax, factor)
    z.backward(upstream)
    assert torch.equal(y, z)
    assert torch.equal(ours.grad, theirs.grad)
    torch.testing.assert_close(lsq.step.grad.flatten(), step.grad, rtol=1e-4, atol=1e-7)


def test_the_two_masks_differ_in_the_half_step_beyond_the_ends_only():
    """One number of each kind, step 1, codes -2..1: v, and what each convention says of v and of the step."""
    expected = {  # v: (paper dv, paper ds, torch dv, torch ds)
        0.3: (1, -0.3, 1, -0.3),  # inside: the same
        1.0: (0, 1.0, 1, 0.0),  # on the last code
        1.4: (0, 1.0, 1, -0.4),  # in the half step beyond it: opposite signs
        1.6: (0, 1.0, 0, 1.0),  # beyond: the same
        -2.0: (0, -2.0, 1, 0.0),
        -2.4: (0, -2.0, 1, 0.4),
        -2.6: (0, -2.0, 0, -2.0),
    }
    for v, (paper_v, paper_s, torch_v, torch_s) in expected.items():
        for mask, dv, ds in (("value", paper_v, paper_s), ("code", torch_v, torch_s)):
            x = torch.tensor([v], dtype=torch.float64, requires_grad=True)
            lsq = LSQ(x, bits=2, mask=mask)
            with torch.no_grad():
                lsq.step.fill_(1.0)
            lsq(x).sum().backward()
            assert x.grad.item() == dv
            assert lsq.step.grad.item() == pytest.approx(ds, abs=1e-7)  # g = 1: one weight, qmax = 1


@pytest.mark.parametrize("mask", ["value", "code"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_lsq_gradients_are_those_of_the_smooth_surrogate(granularity, mask):
    """The surrogate: what rounding moved (round(v/s) - v/s) and what is clamped are frozen where we stand.

    It is smooth in v and s, so central differences in float64 give its true gradient.
    """
    x = weights(dtype=torch.float64).requires_grad_()
    lsq = LSQ(x, bits=2, granularity=granularity, mask=mask)
    upstream = weights(seed=1, dtype=torch.float64)
    lsq(x).backward(upstream)
    index = blocks_by_hand(x, granularity)
    belongs = torch.empty(x.numel(), dtype=torch.long)
    for k, block in enumerate(index):
        belongs[block] = k
    v0, s0 = x.detach().flatten(), lsq.step.detach().double().flatten()
    ratio = v0 / s0[belongs]
    codes = ratio.round()
    low, high = (ratio <= -2, ratio >= 1) if mask == "value" else (codes < -2, codes > 1)

    def surrogate(v, s):
        s = s[belongs]
        moved = s * (v / s + (codes - ratio))
        return (torch.where(low, -2 * s, torch.where(high, 1 * s, moved)) * upstream.flatten()).sum()

    for of, gradient, scale in (
        (0, x.grad.flatten(), torch.ones(1)),
        (1, lsq.step.grad.double().flatten(), lsq.gradient_scale.double().flatten()),
    ):
        numeric = torch.empty_like(gradient)
        for i in range(len(gradient)):
            at = [v0.clone(), s0.clone()]
            at[of][i] += 1e-6
            up = surrogate(*at)
            at[of][i] -= 2e-6
            numeric[i] = (up - surrogate(*at)) / 2e-6
        torch.testing.assert_close(gradient, numeric * scale, rtol=1e-6, atol=1e-7)


def test_lsq_starts_well_and_gets_better():
    """On Gaussian numbers at 2 bits a learned step ends with less than half of min-max's squared error."""
    x = weights(32, 128)
    lsq = LSQ(x, bits=2)
    optimizer, errors = torch.optim.Adam(lsq.parameters(), lr=0.01), []
    for _ in range(60):
        loss = (lsq(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    minmax = (quantize_tensor(x, bits=2, granularity=PerTensor()).dequantize() - x).square().mean().item()
    assert errors[-1] < errors[0]
    assert errors[-1] < 0.5 * minmax


def test_a_step_below_zero_or_at_zero_still_rounds():
    x = weights()
    lsq = LSQ(x, bits=3)
    up = lsq(x)
    with torch.no_grad():
        lsq.step.neg_()
    assert torch.equal(lsq(x), up)
    zeros = LSQ(torch.zeros(2, 8), bits=3, granularity=PerAxis(0))
    assert torch.equal(zeros(torch.zeros(2, 8)), torch.zeros(2, 8))
    assert zeros.scale.min() > 0


def test_the_start_multiplies_the_first_steps():
    x = weights()
    plain, finer = (LSQ(x, bits=2, granularity=PerGroup(8), start=start) for start in (1.0, 0.66))
    torch.testing.assert_close(finer.step, 0.66 * plain.step)
    for bad in (0, -1.0, math.nan, "1"):
        with pytest.raises(ValueError, match="start must be"):
            LSQ(x, bits=2, start=bad)


def test_lsq_of_another_shape_is_refused():
    lsq = LSQ(weights(), bits=4, granularity=PerAxis(0))
    with pytest.raises(ValueError, match="6 steps.*7 blocks"):
        lsq(weights(7))


# --- three values, two values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", [*GRANULARITIES, PerAxis(1)], ids=repr)
def test_ternary_and_binary_equal_the_loop(granularity):
    x = weights()
    x[0, 3], x[1, 0] = 0.0, -0.0
    flat, three, two = x.flatten().tolist(), ternary(x, granularity), binary(x, granularity)
    for block in blocks_by_hand(x, granularity):
        mean = sum(abs(flat[i]) for i in block) / len(block)
        for i in block:
            code = max(-1, min(1, round(flat[i] / mean)))
            assert three.flatten()[i].item() == pytest.approx(code * mean, rel=1e-6, abs=1e-12)
            sign = 1 if flat[i] >= 0 else -1
            assert two.flatten()[i].item() == pytest.approx(sign * mean, rel=1e-6)


@pytest.mark.parametrize("function", [ternary, binary])
def test_three_and_two_values_pass_the_gradient_unchanged(function):
    """The surrogate of an unmasked STE is x + constant: its finite differences are the gradient that comes in."""
    x, upstream = weights(dtype=torch.float64).requires_grad_(), weights(seed=1, dtype=torch.float64)
    y = function(x, PerGroup(8))
    y.backward(upstream)
    moved = (y - x).detach()
    nudged = x.detach().clone()
    nudged[2, 3] += 1e-6
    difference = ((nudged + moved) * upstream).sum() - ((x.detach() + moved) * upstream).sum()
    assert torch.equal(x.grad, upstream)
    assert x.grad[2, 3].item() == pytest.approx(difference.item() / 1e-6, rel=1e-6)


def test_binary_has_the_scale_of_least_error():
    x = weights()
    best = (binary(x) - x).square().sum()
    for factor in (0.99, 1.01):
        assert ((binary(x) * factor - x).square().sum() > best).item()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=repr)
def test_quantized_forms_hold_the_same_values(granularity):
    x = weights()
    x[2, 5] = 0.0
    assert torch.equal(quantize_ternary(x, granularity).dequantize(), ternary(x, granularity))
    if granularity != PerGroup(5):  # 24 columns are no whole number of groups
        assert torch.equal(quantize_binary(x, granularity).dequantize(), binary(x, granularity))


def test_bytes_of_three_and_two_values_by_hand():
    x = weights(6, 24)
    assert quantize_ternary(x, PerGroup(8)).nbytes == 6 * 24 * 2 // 8 + 6 * 3 * 4
    assert quantize_binary(x, PerGroup(8)).nbytes == 6 * 24 // 8 + 6 * 3 * 4 + 2 * 4  # the two levels are stored
    assert len(pack_ternary(quantize_ternary(x).codes)) == math.ceil(6 * 24 / 5)


@given(st.lists(st.integers(-1, 1), max_size=40))
def test_ternary_packing_there_and_back(codes):
    packed = pack_ternary(torch.tensor(codes, dtype=torch.int8))
    assert len(packed) == math.ceil(len(codes) / 5)
    assert unpack_ternary(packed, count=len(codes)).tolist() == codes


@settings(deadline=None, max_examples=60)
@given(
    arrays("float32", (3, 8), elements=st.floats(-(2.0**100), 2.0**100, width=32)),
    st.sampled_from([PerTensor(), PerAxis(0), PerGroup(4), PerGroup(3)]),
    st.floats(0.015625, 64, width=32),
)
def test_properties_of_every_rounding(values, granularity, factor):
    x = torch.from_numpy(values)
    three, two = ternary(x, granularity), binary(x, granularity)
    for block in blocks_by_hand(x, granularity):
        assert len(set(three.flatten()[block].abs().tolist()) - {0.0}) <= 1
        assert len(set(two.flatten()[block].abs().tolist())) == 1
    assert not (three * x < 0).any()  # no weight changes its sign
    assert not (two * x < 0).any()
    power = 2.0 ** round(math.log2(factor))  # scaling by a power of two is exact, so codes must not change
    if x.abs().max() < 1e28 and x.abs().min() > 1e-28:
        assert torch.equal(ternary(x * power, granularity), three * power)
        assert torch.equal(binary(x * power, granularity), two * power)
    lsq = LSQ(x, bits=3, granularity=granularity)
    y = lsq(x)
    assert torch.isfinite(y).all()
    assert torch.equal(lsq.quantized(x).dequantize(), y)
    again = lsq(y.detach())
    assert torch.equal(again, y)  # what is on the grid stays


# --- one law for all roundings: what is trained is what is stored --------------------------------------------------

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROUNDINGS = {
    "minmax": lambda w, g: MinMaxRounding(bits=3, granularity=g),
    "minmax symmetric": lambda w, g: MinMaxRounding(bits=4, granularity=g, symmetric=True),
    "lsq value": lambda w, g: LSQ(w, bits=2, granularity=g),
    "lsq code": lambda w, g: LSQ(w, bits=4, granularity=g, mask="code"),
    "ternary": lambda w, g: FewLevels("ternary", granularity=g),
    "binary": lambda w, g: FewLevels("binary", granularity=g),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(0), PerGroup(16)], ids=repr)
@pytest.mark.parametrize("make", ROUNDINGS.values(), ids=ROUNDINGS)
def test_what_is_trained_is_what_is_stored(make, granularity, dtype):
    """forward(w) equals quantized(w).dequantize() bit by bit; many weights lie near the middle between two codes."""
    w = (weights(64, 64) * 3).to(dtype)
    w[0] = w[0].round()
    rounding = make(w, granularity)
    assert isinstance(rounding, Rounding)
    floats, q = rounding(w.requires_grad_()), rounding.quantized(w)
    assert floats.dtype == q.dtype == dtype
    assert floats.requires_grad
    assert torch.equal(floats, q.dequantize())
    floats.sum().backward()
    assert w.grad.dtype == dtype


@pytest.mark.parametrize("make", ROUNDINGS.values(), ids=ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_rounding_may_change_its_dtype_later(make, dtype):
    """A model is prepared in float32 and then computes in another dtype: its steps go with it."""
    w = weights(16, 64)
    rounding, w = make(w, PerGroup(16)).to(dtype), w.to(dtype)
    assert torch.equal(rounding(w), rounding.quantized(w).dequantize())


@pytest.mark.parametrize("make", ROUNDINGS.values(), ids=ROUNDINGS)
def test_the_largest_float16_stays_finite(make):
    w = torch.tensor([[65504.0, -65504.0, 65504.0, 60000.0]] * 2, dtype=torch.float16)
    rounding = make(w, PerAxis(0))
    assert torch.isfinite(rounding(w)).all()
    assert torch.equal(rounding(w), rounding.quantized(w).dequantize())


def test_codes_of_16_bit_weights_are_those_of_the_same_floats():
    w = (weights(64, 64) * 3).bfloat16()
    for make in ROUNDINGS.values():
        ours, theirs = (make(x, PerGroup(16)).quantized(x).codes for x in (w, w.float()))
        assert torch.equal(ours, theirs)


def test_float64_is_rounded_in_float64():
    x = torch.tensor([0.5 + 1e-12, -2.0, 1.0], dtype=torch.float64)  # 0.5 in float32, which rounds to 0
    lsq = LSQ(x, bits=2)
    with torch.no_grad():
        lsq.step.fill_(1.0)
    assert lsq(x).tolist() == [1.0, -2.0, 1.0]
    assert lsq.quantized(x).codes.tolist() == [1, -2, 1]


def test_steps_of_16_bit_weights_move_as_those_of_the_same_floats_do():
    w, upstream = weights(32, 64).bfloat16(), weights(32, 64, seed=1).bfloat16()
    grads = []
    for x in (w, w.float()):
        lsq = LSQ(x, bits=3, granularity=PerGroup(16))
        x = x.clone().requires_grad_()
        lsq(x).backward(upstream.to(x.dtype))
        grads += [(lsq.step.grad, x.grad.float())]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", WEIGHT_METHODS.values(), ids=WEIGHT_METHODS)
def test_a_converted_16_bit_model_gives_the_same_outputs(how, dtype):
    model, tokens = random_model("llama").to(dtype), random_tokens(64)[None]
    prepared = prepare_qat(model, **{"group_size": 8} | how)
    with torch.no_grad():
        for layer in fake_quant_layers(prepared).values():
            layer.weight.mul_(1.25)  # as if trained
        new, _ = convert(prepared)
        assert torch.equal(new(tokens).logits, prepared(tokens).logits)


@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(8)], ids=repr)
def test_a_granularity_may_be_named_or_not(granularity):
    x = weights()
    for function in (ternary, binary):
        assert torch.equal(function(x, granularity), function(x, granularity=granularity))
    for function in (quantize_ternary, quantize_binary):
        assert torch.equal(function(x, granularity).codes, function(x, granularity=granularity).codes)


def test_float8_weights_count_as_float32():
    x = weights().to(torch.float8_e4m3fn)
    for function in (ternary, binary, lambda x: LSQ(x, bits=2)(x)):
        assert torch.equal(function(x), function(x.float()))
    assert quantize_ternary(x).dtype == quantize_binary(x).dtype == LSQ(x, bits=2).quantized(x).dtype == torch.float32


# --- a layer ----------------------------------------------------------------------------------------------------


def test_a_layer_equals_its_loop_and_leaves_the_linear_alone():
    linear = nn.Linear(24, 6)
    before = copy.deepcopy(linear.state_dict())
    layer = FakeQuantLinear.from_linear(linear, bits=2, group_size=8, symmetric=True)
    x = weights(5)
    rounded = quantize_tensor(linear.weight, bits=2, granularity=PerGroup(8)).dequantize()
    for token in range(5):
        for row in range(6):
            by_hand = sum(x[token, k] * rounded[row, k] for k in range(24)) + linear.bias[row]
            assert layer(x)[token, row].item() == pytest.approx(by_hand.item(), abs=1e-5)
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    assert all(torch.equal(before[k], v) for k, v in linear.state_dict().items())


@pytest.mark.parametrize("per", ["tensor", "token"])
@pytest.mark.parametrize("bits", [4, 8])
def test_dynamic_activations_are_rounded_on_their_own_range(per, bits):
    layer = FakeQuantLinear.from_linear(
        nn.Linear(24, 6), bits=8, group_size=None, activations=per, activation_bits=bits
    )
    x = weights(10, dtype=torch.float32).view(2, 5, 24).requires_grad_()
    rows = [x.detach().view(-1, 24)] if per == "tensor" else x.detach().view(-1, 1, 24)
    expected = []
    for row in rows:
        qp = choose_qparams(row.min(), row.max(), qmin=0, qmax=2**bits - 1, symmetric=per == "token")
        expected.append(torch.fake_quantize_per_tensor_affine(row, qp.scale.item(), int(qp.zero_point), 0, qp.qmax))
    rounded = layer.input_rounding(x)
    assert torch.equal(rounded.detach().view(-1, 24), torch.cat(expected))
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_static_activations_clamp_and_pass_no_gradient_beyond_their_range():
    observer = MinMax()
    observer.update(torch.tensor([-1.0, 3.0]))
    layer = FakeQuantLinear.from_linear(nn.Linear(4, 2), bits=8, activations=observer)
    x = torch.tensor([[-9.0, -0.5, 2.0, 9.0]], requires_grad=True)
    rounded = layer.input_rounding(x)
    rounded.sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    assert rounded[0, 0].item() == pytest.approx(-1.0, abs=0.01)
    assert rounded[0, 3].item() == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize("activations", ["tensor", "token", "static"])
def test_an_integer_layer_equals_the_fake_quantized_one(activations):
    linear, x = nn.Linear(48, 16), weights(9, 48)
    observer = MinMax()
    observer.update(x[:5])
    layer = FakeQuantLinear.from_linear(
        linear,
        bits=8,
        group_size=None,
        symmetric=True,
        activations=observer if activations == "static" else activations,
    )
    with torch.no_grad():
        layer.weight.mul_(1.5)  # as if trained
    integer, same = layer.converted()
    assert isinstance(integer, StaticInt8Linear if activations == "static" else DynamicInt8Linear)
    assert same is integer
    torch.testing.assert_close(integer.exact(x), layer(x), rtol=1e-5, atol=1e-5)


# --- a model ----------------------------------------------------------------------------------------------------


def trained_a_little(model, steps=3):
    """A few steps by hand, so that weights and steps are no longer where they began."""
    tokens = random_tokens(33)[None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        loss = model(tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@pytest.mark.parametrize("how", WEIGHT_METHODS.values(), ids=WEIGHT_METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_converted_model_gives_the_same_outputs(family, how, tmp_path):
    model, tokens = random_model(family), random_tokens(64)[None]
    how = {"group_size": 8} | how
    before = copy.deepcopy(model.state_dict())
    prepared = prepare_qat(model, **how)
    trained_a_little(prepared)
    new, qtensors = convert(prepared)
    with torch.no_grad():
        torch.testing.assert_close(new(tokens).logits, prepared(tokens).logits, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert list(qtensors) == list(lm.linear_layers(model)) == list(lm.linear_layers(new))
    for name, layer in lm.linear_layers(new).items():
        assert type(layer) is type(lm.linear_layers(model)[name])
        assert torch.equal(lm.weight_of(layer), qtensors[name].dequantize())
        assert not torch.equal(lm.weight_of(layer), lm.weight_of(lm.linear_layers(model)[name]))
        assert qtensors[name].bits_per_element > 0
    assert fake_quant_layers(prepared).keys() == qtensors.keys()  # convert left the prepared model as it was
    lm.save_quantized(tmp_path / "there", new, qtensors)
    again, _ = lm.load_quantized(tmp_path / "there")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, new(tokens).logits)


@pytest.mark.parametrize("how", WEIGHT_METHODS.values(), ids=WEIGHT_METHODS)
def test_only_the_rounded_layers_train_and_all_of_them_do(how):
    prepared = prepare_qat(random_model("gpt2"), **{"group_size": 8} | how)
    trainable = {name for name, p in prepared.named_parameters() if p.requires_grad}
    layers = fake_quant_layers(prepared)
    assert trainable == {f"{name}.{p}" for name, layer in layers.items() for p, _ in layer.named_parameters()}
    start = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    trained_a_little(prepared)
    assert all(not torch.equal(start[name], layer.weight) for name, layer in layers.items())


def test_training_helps():
    """A tiny model at 2 bits learns the tokens again, and its converted form with it."""
    model = prepare_qat(random_model("llama"), bits=2, group_size=8)
    first, last = trained_a_little(model, 1), trained_a_little(model, 60)
    assert last < 0.9 * first


@pytest.mark.parametrize("activations", ["tensor", "token", "static"])
def test_a_model_with_rounded_activations_converts_to_integer_layers(activations):
    """Next to a rounding boundary a float in the last digit flips a code, so whole models agree less closely than
    layers (above); against the size of the logits the difference stays small."""
    model, tokens = random_model("gpt2"), random_tokens(64)
    if activations == "static":
        names = list(lm.linear_layers(model))
        inputs = lm.capture_inputs(model, tokens, names)
        activations = {name: MinMax() for name in names}
        for name in names:
            activations[name].update(inputs[name])
    how = {"bits": 8, "group_size": None, "symmetric": True}
    prepared = prepare_qat(model, **how, activations=activations)
    new, qtensors = convert(prepared)
    with torch.no_grad():
        wanted, got = prepared(tokens[None]).logits, new(tokens[None]).logits
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert all(dict(new.named_modules())[name] is layer for name, layer in qtensors.items())
    assert lm.model_bytes(new, qtensors) < lm.model_bytes(model)


def test_layers_can_be_chosen_in_any_model():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    prepared = prepare_qat(model, bits=2, group_size=None, layers=["2"])
    assert [type(m).__name__ for m in prepared] == ["Linear", "ReLU", "FakeQuantLinear"]
    new, qtensors = convert(prepared)
    x = torch.randn(3, 8)
    assert list(qtensors) == ["2"]
    torch.testing.assert_close(new(x), prepared(x))


def test_a_prepared_model_can_be_copied_saved_and_restored():
    prepared = prepare_qat(random_model("gpt2"), bits=3, group_size=8, method="lsq")
    other = copy.deepcopy(prepared)
    trained_a_little(prepared)
    other.load_state_dict(prepared.state_dict())
    tokens = random_tokens(32)[None]
    with torch.no_grad():
        assert torch.equal(other(tokens).logits, prepared(tokens).logits)


def test_a_conv1d_keeps_its_own_axes():
    layer = Conv1D(6, 24)  # 24 in, 6 out, stored (in, out)
    fake = FakeQuantLinear.from_linear(layer, bits=2, group_size=None)
    x = weights(5)
    rounded = quantize_tensor(layer.weight.detach().T, bits=2, granularity=PerAxis(0), symmetric=False).dequantize()
    torch.testing.assert_close(fake(x), x @ rounded.T + layer.bias)


# --- the checkpoints of notebook 13 -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_checkpoints_fit_the_bundled_model_and_their_log(bits):
    log = json.loads((lm.DATA / f"checkpoints/minmax/w{bits}.json").read_text())
    packed = load_tensors(lm.DATA / f"checkpoints/minmax/w{bits}.safetensors")
    layers = lm.linear_layers(lm.load_lm(str(lm.DATA / "model"))[0])
    assert list(packed) == list(layers)
    assert [q.codes.shape for q in packed.values()] == [lm.weight_of(layer).shape for layer in layers.values()]
    assert {(q.bits, q.granularity, q.symmetric) for q in packed.values()} == {(bits, PerGroup(128), False)}
    assert (log["bits"], log["group_size"], len(log["losses"])) == (bits, 128, log["steps"])
    assert log["held_out"][-1] < 0.6 * log["held_out"][0]
    assert (lm.DATA / f"checkpoints/minmax/w{bits}.safetensors").stat().st_size < 2.5e6


def test_a_checkpoint_measures_as_its_log_says():
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    held_out = lm.token_stream(tokenizer, lm.load_text("calibration"))[-4096:]
    waiting = iter(load_tensors(lm.DATA / "checkpoints/minmax/w2.safetensors").values())
    new, _ = lm.quantize_weights(model, lambda weight: next(waiting))
    log = json.loads((lm.DATA / "checkpoints/minmax/w2.json").read_text())
    assert lm.divergence(model, new, held_out).kl == pytest.approx(log["kl_held_out"], rel=1e-3)


@pytest.mark.parametrize("what", ["w2", "lsq2 finer", "ternary"])
def test_the_recipes_write_logs_like_the_committed_ones(monkeypatch, what):
    model, tokens = random_model("llama"), random_tokens(400)
    monkeypatch.setattr(minmax, "WINDOW", 16)
    text, run = {"both": tokens, "held out": tokens[:64]}, (minmax.RUNS | learned_steps.RUNS)[what]
    train = partial(minmax.train, stream="both") if what in minmax.RUNS else learned_steps.train
    _, log = train(model, text, **run | {"steps": 2})
    path = lm.DATA / "checkpoints" / run.get("method", "minmax") / f"{what.replace(' ', '_')}.json"
    committed = json.loads(path.read_text())
    assert committed.keys() <= log.keys()
    same = ("bits", "group_size", "learning_rate", "batch", "seed")
    assert {key: log[key] for key in same} == {key: committed[key] for key in same}
    assert (len(log["losses"]), log["checked_at"]) == (2, [0, 1, 2])


def test_a_finer_run_starts_from_smaller_steps(monkeypatch):
    model, steps = random_model("llama"), {}
    monkeypatch.setattr(minmax, "fit", lambda model, student, *_, **__: {})
    for what in ("lsq2", "lsq2 finer"):
        student, log = learned_steps.train(model, {}, **learned_steps.RUNS[what])
        steps[log["start"]] = next(iter(fake_quant_layers(student).values())).rounding.step
    torch.testing.assert_close(steps[0.66], 0.66 * steps[1.0])


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"method": "qat"}, "minmax, lsq, ternary, binary"),
        ({"bits": 9}, "bits must be 1..8.*got 9"),
        ({"bits": 1, "symmetric": True}, "bits must be 2..8"),
        ({"bits": 1, "method": "lsq"}, "bits must be 2..8"),
        ({"bits": 2, "method": "ternary"}, "ternary takes no bits.*3 values"),
        ({"bits": 1, "method": "binary"}, "binary takes no bits.*2 values"),
        ({"symmetric": False, "method": "lsq"}, "lsq is symmetric"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"group_size": "row"}, "group_size must be a number.*'row'"),
        ({"group_size": 7, "method": "binary"}, "group_size must divide 24, got 7"),
        ({"activations": "static"}, "activations must be None.*'static'"),
        ({"activations": {}}, "no observer for the layer 'model.layers.0"),
        ({"activations": "token", "activation_bits": 9}, "activation_bits must be 2..8, got 9"),
        ({"activation_bits": "4"}, "activation_bits must be an int, got '4'"),
        ({"symmetric": "no"}, "symmetric must be True or False"),
        ({"method": 4}, "minmax, lsq, ternary, binary or a function, got 4"),
        ({"layers": ["nowhere"]}, "no layer 'nowhere'"),
        ({"layers": ["model.norm"]}, "need an nn.Linear or a Conv1D, got LlamaRMSNorm"),
        ({"bits": 4, "method": lambda w: LSQ(w, bits=2)}, "up to the function"),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # an address differs between the workers
)
def test_bad_settings_are_refused(how, message):
    with pytest.raises(ValueError, match=message):
        prepare_qat(random_model("llama"), **how)


def test_a_model_is_prepared_once_and_converted_once():
    prepared = prepare_qat(random_model("llama"), bits=4, group_size=8)
    with pytest.raises(ValueError, match="prepared already"):
        prepare_qat(prepared)
    new, _ = convert(prepared)
    with pytest.raises(ValueError, match="did prepare_qat make it"):
        convert(new)


@pytest.mark.parametrize(
    "how",
    [
        {"bits": 4, "group_size": None, "symmetric": True},
        {"bits": 8, "group_size": 8, "symmetric": True},
        {"bits": 8, "group_size": None, "symmetric": False},
        {"bits": 8, "group_size": None, "method": "lsq"},
        {"group_size": None, "method": "ternary"},
    ],
    ids=str,
)
def test_no_integer_layer_for_these(how):
    prepared = prepare_qat(random_model("llama"), **how, activations="token")
    with pytest.raises(ValueError, match="weights have 8 bits, symmetric, one scale a row"):
        convert(prepared)


BAD = [
    torch.tensor([1, 2]),
    torch.tensor([]),
    torch.tensor([math.nan]),
    torch.tensor([1e300], dtype=torch.float64),
    [1.0],
]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_bad_tensors_are_refused(bad):
    for function in (ternary, binary, quantize_ternary, quantize_binary, lambda x: LSQ(x, bits=2)):
        with pytest.raises(ValueError, match="x must|x is empty"):
            function(bad)


def test_bad_words_and_codes_are_refused():
    with pytest.raises(ValueError, match="mask must be"):
        LSQ(weights(), bits=4, mask="paper")
    with pytest.raises(ValueError, match="codes must be integers"):
        pack_ternary(torch.tensor([0.5]))
    with pytest.raises(ValueError, match="-1, 0 and 1, got -1..2"):
        pack_ternary(torch.tensor([-1, 2]))
    with pytest.raises(ValueError, match="0..242, got 243"):
        unpack_ternary(torch.tensor([243], dtype=torch.uint8), count=5)
    with pytest.raises(ValueError, match="count must be 0..5, got 6"):
        unpack_ternary(torch.tensor([0], dtype=torch.uint8), count=6)
    with pytest.raises(ValueError, match="packed must be uint8"):
        unpack_ternary(torch.tensor([0]), count=1)
    with pytest.raises(ValueError, match=r"PerAxis\(0\), got PerAxis\(axis=1\)"):
        quantize_binary(weights(), PerAxis(1))
