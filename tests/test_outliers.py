"""Outliers: planting and smoothing leave the float model's outputs alone; LLM.int8() against its definition."""

import copy
import math

import pytest
import torch
from test_lm import CONFIGS, random_model, random_tokens
from torch import nn

from quantlab import lm
from quantlab.linear import DynamicInt8Linear, kernel_status
from quantlab.outliers import LLMInt8Linear, norm_readers, plant_outliers, smooth, smoothing_scales

READERS = {"llama": [3, 2], "qwen2": [3, 2], "qwen3": [3, 2], "opt": [3, 1], "gpt2": [1, 1]}  # of each block's norms


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return random_model(family)


def logits(model):
    with torch.no_grad():
        return model(random_tokens()[None, :40], use_cache=False).logits


def close(one, other):
    return ((one - other).abs().max() / other.abs().max()).item()


def test_the_readers_of_every_norm_are_found(model, family):
    assert [len(layers) for _, layers in norm_readers(model)] == READERS[family] * 2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("factor", [30.0, 0.01])
def test_planted_outliers_change_nothing_but_the_activations(model, factor):
    before, wanted = copy.deepcopy(model.state_dict()), logits(model)
    new = plant_outliers(model, channels=[1, 7], factor=factor)
    assert close(logits(new), wanted) < 1e-5
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    first = next(iter(lm.linear_layers(model)))
    old, now = (lm.capture_inputs(m, random_tokens(), [first], window=64)[first] for m in (model, new))
    stretch = torch.ones(24)
    stretch[[1, 7]] = factor
    torch.testing.assert_close(now, old * stretch)


def test_smoothing_undoes_what_was_planted(model):
    planted = plant_outliers(model, channels=[3], factor=50.0)
    scales = lm.activation_scales(planted, random_tokens(), window=64)
    smoothed = smooth(planted, scales, alpha=1.0)
    assert close(logits(smoothed), logits(model)) < 1e-5
    after = lm.activation_scales(smoothed, random_tokens(), window=64)
    for _, layers in norm_readers(smoothed):
        names = {module: name for name, module in smoothed.named_modules()}
        peak = after[names[layers[0]]]
        torch.testing.assert_close(peak, torch.ones_like(peak))  # alpha = 1: all difficulty goes to the weights


def test_alpha_divides_the_difficulty():
    layers = [nn.Linear(4, 6, bias=False), nn.Linear(4, 3, bias=False)]
    x = torch.tensor([0.1, 1.0, 8.0, 100.0])
    largest_w = torch.cat([layer.weight for layer in layers]).abs().amax(0).detach()
    for alpha in (0.0, 0.5, 0.8, 1.0):
        by_hand = [x[j] ** alpha / largest_w[j] ** (1 - alpha) for j in range(4)]
        torch.testing.assert_close(smoothing_scales(x, layers, alpha), torch.stack(by_hand))
    s = smoothing_scales(x, layers, 0.5)
    torch.testing.assert_close(x / s, largest_w * s)  # at a half, input and weight are equally hard


def test_smoothing_needs_layers():
    with pytest.raises(ValueError, match="no layers"):
        smoothing_scales(torch.ones(3), [], 0.5)


def test_silent_channels_and_unused_columns_keep_their_scale():
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 0.0, 4.0], [2.0, 0.0, 1.0]])
    assert smoothing_scales(torch.tensor([0.0, 5.0, 1.0]), [layer], 0.5).tolist() == [1.0, 1.0, 0.5]


def test_activation_scales_are_the_largest_inputs():
    model = random_model("llama")
    layers = list(lm.linear_layers(model))
    inputs = lm.capture_inputs(model, random_tokens(), layers, window=64)
    scales = lm.activation_scales(model, random_tokens(), window=64)
    assert list(scales) == layers
    for name in layers:
        assert torch.equal(scales[name], inputs[name].abs().amax(0))


def test_bad_arguments_are_refused():
    model = random_model("llama")
    for channels, factor, message in (
        ([24], 2.0, "a channel must be 0..23, got 24"),
        ([-1], 2.0, "a channel must be 0..23, got -1"),
        ([0.5], 2.0, "a channel must be an int"),
        ([0], 0.0, "factor must be (above 0|a finite number)"),
        ([0], float("nan"), "factor must be (above 0|a finite number)"),
        ([0], float("inf"), "factor must be (above 0|a finite number)"),
        ([0], "3", "factor must be (above 0|a finite number), got '3'"),
    ):
        with pytest.raises(ValueError, match=message):
            plant_outliers(model, channels=channels, factor=factor)
    scales = lm.activation_scales(model, random_tokens(), window=64)
    with pytest.raises(ValueError, match=r"alpha must be at least 0 and at most 1, got 1.5"):
        smooth(model, scales, alpha=1.5)
    with pytest.raises(ValueError, match="no activation scales for 'model.layers.0.self_attn.q_proj'"):
        smooth(model, {}, alpha=0.5)
    with pytest.raises(ValueError, match="23 activation scales for 24"):
        smooth(model, {name: x[:23] for name, x in scales.items()}, alpha=0.5)


def test_a_model_whose_residual_reads_the_norm_is_refused():
    """Post-norm models add the norm's output to the residual stream: scaling it would change the model."""
    from transformers import OPTConfig, OPTForCausalLM

    config = CONFIGS["opt"].to_dict() | {"do_layer_norm_before": False}
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**config)).eval()
    with pytest.raises(ValueError, match="would change|no norm"):
        plant_outliers(model, channels=[0], factor=50.0)


@pytest.mark.parametrize("seed", range(8))
def test_a_norm_that_multiplies_by_one_plus_its_weight_is_refused(seed):
    """Gemma's. Its gain would not grow by the factor, so dividing the columns would change the model."""
    from transformers import AutoModelForCausalLM, GemmaConfig

    torch.manual_seed(seed)
    gemma = AutoModelForCausalLM.from_config(GemmaConfig(**SMALL_GEMMA)).eval()
    for parameter in gemma.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.randn_like(parameter) * 0.3
    with pytest.raises(ValueError, match="would change"):
        plant_outliers(gemma, channels=[0, 5], factor=30.0)


SMALL_GEMMA = {
    "vocab_size": 97, "num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 6, "intermediate_size": 40, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def test_a_model_in_training_mode_or_in_bfloat16_is_accepted(model, family):
    model.train()
    modes = [m.training for m in model.modules()]
    planted = plant_outliers(model, channels=[2], factor=20.0)
    assert [m.training for m in model.modules()] == modes
    assert close(logits(planted), logits(model.eval())) < 1e-5
    plant_outliers(model.bfloat16(), channels=[2], factor=20.0)


# --- LLM.int8() -------------------------------------------------------------------------------------------------


def layer_and_input(tokens=12):
    random = torch.Generator().manual_seed(0)
    layer = nn.Linear(32, 10).requires_grad_(False)
    layer.weight.copy_(torch.randn(10, 32, generator=random) * 0.1)
    x = torch.randn(tokens, 32, generator=random)
    x[3, 5], x[7, 20] = 40.0, -9.0
    return layer, x


def by_hand(layer, x, threshold):
    """The definition, one output at a time: int8 vectors for the ordinary columns, floats for the others."""
    keep = [j for j in range(x.shape[1]) if max(abs(v) for v in x[:, j].tolist()) < threshold]
    y = torch.zeros(len(x), layer.out_features)
    for t in range(len(x)):
        for o in range(layer.out_features):
            w_peak = layer.weight[o].abs().max()
            w = torch.round(layer.weight[o] * (127 / w_peak))
            x_peak = x[t, keep].abs().max() if keep else torch.tensor(1.0)
            codes = torch.round(x[t, keep] * (127 / x_peak))
            whole = int((codes * w[keep]).sum()) * (x_peak / 127) * (w_peak / 127)
            rest = [j for j in range(x.shape[1]) if j not in keep]
            y[t, o] = whole + (x[t, rest] * w[rest]).sum() * (w_peak / 127) + layer.bias[o]
    return y


@pytest.mark.parametrize("threshold", [6.0, 1e9, 0.5])
def test_llm_int8_is_its_definition(threshold):
    layer, x = layer_and_input()
    int8 = LLMInt8Linear.from_linear(layer, threshold=threshold)
    wanted = by_hand(layer, x, threshold)
    for y in (int8(x), int8.exact(x), int8.simulate(x)):
        torch.testing.assert_close(y, wanted, atol=2e-5 * wanted.abs().max().item(), rtol=0)
    assert int8.outlier_columns(x).nonzero().flatten().tolist() == (
        [5, 20] if threshold == 6.0 else [] if threshold == 1e9 else list(range(32))
    )


def test_the_split_gives_back_what_an_outlier_takes():
    layer, x = layer_and_input(40)

    def error(int8):
        """On the two tokens that have an outlier, of what the ordinary columns contribute."""
        wanted = x.clone()
        wanted[:, [5, 20]] = 0
        wanted = (wanted @ int8.dequantized_weight().T)[[3, 7]]
        with_outliers = x[:, [5, 20]] @ int8.dequantized_weight()[:, [5, 20]].T + layer.bias
        return ((int8(x) - with_outliers)[[3, 7]] - wanted).norm() / wanted.norm()

    split, whole = (error(LLMInt8Linear.from_linear(layer, threshold=t)) for t in (6.0, 1e9))
    tensor = error(DynamicInt8Linear.from_linear(layer))
    assert split < 0.5 * whole < 0.5 * tensor


def test_codes_are_those_of_bitsandbytes_off_ties():
    functional = pytest.importorskip("bitsandbytes.functional")
    random = torch.Generator().manual_seed(1)
    layer = nn.Linear(512, 64, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(64, 512, generator=random) * 0.05)
    x = torch.randn(30, 512, generator=random)
    x[2, 9] = 50.0
    int8 = LLMInt8Linear.from_linear(layer)
    codes, peaks, _ = functional.int8_vectorwise_quant(layer.weight.clone())
    assert torch.equal(codes, int8.codes)
    torch.testing.assert_close(peaks / 127, int8.weight_scale)
    theirs, peaks, columns = functional.int8_vectorwise_quant(x.clone(), threshold=6.0)
    assert columns.tolist() == int8.outlier_columns(x).nonzero().flatten().tolist() == [9]
    rest = x.masked_fill(int8.outlier_columns(x), 0.0)
    qp = int8.input_qparams(rest)
    exact_steps = rest.double() * 127 / peaks.double()[:, None]
    off_tie = ((exact_steps - exact_steps.floor()) - 0.5).abs() > 1e-4
    ours = torch.round(rest / qp.scale)
    assert torch.equal(ours[off_tie], theirs.float()[off_tie])
    assert off_tie.float().mean() > 0.999


def test_llm_int8_edges():
    layer, x = layer_and_input()
    int8 = LLMInt8Linear.from_linear(layer)
    torch.testing.assert_close(int8(torch.zeros(2, 32)), layer.bias.expand(2, -1))
    assert int8(x.view(3, 4, 32).bfloat16()).shape == (3, 4, 10)
    assert int8.nbytes == 10 * 32 + 10 * 4
    assert (int8.kernel == "oneDNN") == (kernel_status() == "exact")
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be (above 0, got|a number, got)"):
            LLMInt8Linear.from_linear(layer, threshold=bad)
    x[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        int8(x)
    silent = nn.Linear(4, 2, bias=False).requires_grad_(False)
    silent.weight.zero_()
    assert LLMInt8Linear.from_linear(silent)(torch.ones(1, 4)).tolist() == [[0.0, 0.0]]


def test_the_threshold_itself_is_an_outlier_and_tiny_rows_keep_their_values():
    layer, x = layer_and_input()
    x[0, 0] = 6.0
    assert LLMInt8Linear.from_linear(layer).outlier_columns(x)[0]
    layer.weight[2] *= 1e-36
    tiny = LLMInt8Linear.from_linear(layer).dequantized_weight()[2]
    torch.testing.assert_close(tiny, layer.weight[2], atol=layer.weight[2].abs().max().item() / 100, rtol=0)
    layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight must be finite"):
        LLMInt8Linear.from_linear(layer)


def test_an_infinite_threshold_leaves_no_column_in_float():
    linear, x = nn.Linear(8, 4).requires_grad_(False), torch.full((2, 8), 1e6)
    layer = LLMInt8Linear.from_linear(linear, threshold=math.inf)
    assert not layer.outlier_columns(x).any()
    torch.testing.assert_close(layer(x), linear(x), rtol=0.05, atol=0.05 * linear(x).abs().max().item())
