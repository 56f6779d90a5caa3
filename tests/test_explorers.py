"""Explorers driven without a browser: setting .value is what the front end's message does."""

import base64
import io
import operator
import re
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from quantlab import (
    Hessian,
    PerAxis,
    PerGroup,
    PerTensor,
    choose_qparams,
    fake_quantize,
    gptq_quantize,
    mse,
    quantize,
    quantize_tensor,
)
from quantlab import explorers as ex
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.floats import FP4_E2M1, round_to
from quantlab.gptq import gptq_steps
from quantlab.linear import DynamicInt8Linear, StaticInt8Linear
from quantlab.lm import DATA, generate, load_lm
from quantlab.metrics import sqnr_db
from quantlab.observers import MSE, MinMax, Percentile
from quantlab.outliers import LLMInt8Linear, smoothing_scales


def values(count=20_000):
    random = torch.Generator().manual_seed(0)
    return (
        torch.randn(count, generator=random)
        / torch.rand(count, generator=random).clamp(min=0.05).sqrt()
        * 0.02
    )


def layer():
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=random) / 8 * torch.arange(1, 65) ** -0.5
    x = torch.randn(1000, 64, generator=random) @ mix + 0.05 * torch.randn(1000, 64, generator=random)
    return torch.randn(32, 64, generator=random) * 0.05, Hessian(64).add(x)


def layer_and_inputs():
    """A layer whose rows differ in size, and what it reads."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 150, generator=random) * torch.linspace(0.01, 0.1, 40)[:, None]
    return weight, torch.randn(300, 150, generator=random)


def results():
    return [
        {
            "label": f"{b} bits",
            "bits": b,
            "perplexity": 5 + 20 / b,
            "stderr": 0.3,
            "kl": 2.0**-b,
            "text": f"story {b}",
        }
        for b in (8, 4, 2)
    ]


def temperature():
    model, tokenizer = load_lm(str(DATA / "model"))
    return ex.explore_temperature(model, tokenizer, generate, prompt="Once upon a time", tokens=8)


def speeds():
    """Made-up times: what is moved and computed, and a fixed cost."""
    ways = {"float32": (0.0, 4, 1.0), "int8": (20.0, 1, 0.25), "weight-only": (50.0, 9, 1.0)}

    def parts(way, M, K, N):
        fixed, weight, slow = ways[way]
        return {"fixed": fixed * 1e-6, "moving": K * N * weight * 1e-11, "computing": M * K * N * slow * 1e-11}

    shapes = [(M, K, N) for M in (1, 16, 256) for K in (256, 2048) for N in (256, 768, 2048)]
    seconds = {(way, *shape): 1.1 * max(parts(way, *shape).values()) + 1e-6 for way in ways for shape in shapes}
    nbytes = {(way, K, N): K * N * min(ways[way][1], 4) for way in ways for _, K, N in shapes}
    return seconds, nbytes, parts


def accumulator(tokens=50):
    linear = torch.nn.Linear(48, 30, bias=False).requires_grad_(False)
    linear.weight.copy_(values(48 * 30).view(30, 48) * torch.linspace(0.1, 3, 30)[:, None])
    return DynamicInt8Linear.from_linear(linear), values(tokens * 48).view(tokens, 48)


EXPLORERS = {
    "affine": lambda: ex.explore_affine(values()),
    "clipping": lambda: ex.explore_clipping(values()),
    "gptq": lambda: ex.explore_gptq(*layer()),
    "columns": lambda: ex.explore_columns(*layer()),
    "groups": lambda: ex.explore_groups(*layer_and_inputs()),
    "floats": lambda: ex.explore_float_format(values().view(100, 200), inputs=values(4000).view(20, 200)),
    "codebook": lambda: ex.explore_codebook(*layer_and_inputs()),
    "bits": lambda: ex.explore_bits(results()),
    "temperature": temperature,
    "speed": lambda: ex.explore_speed(*speeds()),
    "threshold": lambda: ex.explore_threshold(*layer_and_inputs(), channels=[3, 70]),
    "smoothing": lambda: ex.explore_smoothing(*layer_and_inputs(), channels=[3, 70]),
    "accumulator": lambda: ex.explore_accumulator(*accumulator(), bits=14),
    "calibration": lambda: ex.explore_calibration(values(8192).view(128, 64), weight=layer()[0]),
    "shift": lambda: ex.explore_shift(*layer_and_inputs()[::-1]),
}


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    return EXPLORERS[request.param]()


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer.view.children[1].value)))


def other_values(control):
    """Each value a control can take but the one it has: a few of a slider's, all of a choice's."""
    if hasattr(control, "options"):
        found = [o[1] if isinstance(o, tuple) else o for o in control.options]
    elif hasattr(control, "min"):
        found = np.linspace(control.min, control.max, 4).tolist()
        found = [int(v) for v in found] if isinstance(control.value, int) else found
    else:
        found = [not control.value]
    return [v for v in found if v != control.value]


def test_every_control_changes_picture_or_numbers_and_back(explorer):
    for name, control in explorer.controls.items():
        start, said, shown = control.value, explorer.numbers(), pixels(explorer)
        changed = False
        for value in other_values(control):
            control.value = value
            changed |= explorer.numbers() != said and not np.array_equal(pixels(explorer), shown)
        control.value = start
        assert changed, name
        assert explorer.numbers() == said
        assert np.array_equal(pixels(explorer), shown), name  # no trace of what was shown in between


def test_the_first_picture_stands_without_a_kernel(explorer):
    bundle = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(bundle)
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.size[0] >= 800
    assert bundle["text/plain"] == explorer.numbers()
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10  # not blank


def test_numbers_stand_under_the_picture(explorer):
    assert explorer.numbers().split()[0] in explorer.view.children[2].value


def test_affine_numbers_are_the_librarys():
    x = values(5000)
    explorer = ex.explore_affine(x, bits=3)
    explorer.controls["low"].value = -0.5
    reach = max(-x.min().item(), x.max().item())
    low, high = (explorer.controls[k].value * reach for k in ("low", "high"))
    qp = choose_qparams(torch.tensor(low), torch.tensor(high), qmin=0, qmax=7)
    assert f"mean squared error {mse(x, fake_quantize(x, qp)):.2e}" in explorer.numbers()
    assert f"scale {qp.scale.item():.4g}" in explorer.numbers()


def test_gptq_numbers_are_the_librarys():
    weight, hessian = layer()
    explorer = ex.explore_gptq(weight, hessian)
    explorer.controls["bits"].value = 3
    explorer.controls["group"].value = 32
    explorer.controls["act_order"].value = True
    q = gptq_quantize(weight, hessian, bits=3, group_size=32, act_order=True)
    assert f"{hessian.output_error(weight, q.dequantize()):.2e} (" in explorer.numbers()


def test_columns_end_at_gptqs_error():
    weight, hessian = layer()
    explorer = ex.explore_columns(weight, hessian, bits=3)
    explorer.controls["column"].value = 64
    last = gptq_steps(weight[:24], hessian, bits=3)[-1]
    assert f"GPTQ {hessian.output_error(weight[:24].double(), last):.2e}" in explorer.numbers()


def test_a_message_from_the_front_end_moves_it():
    explorer = EXPLORERS["affine"]()
    slider, before = explorer.controls["bits"], explorer.numbers()
    slider._handle_msg(
        {"content": {"data": {"method": "update", "state": {"value": 7}, "buffer_paths": []}}, "buffers": []}
    )
    assert slider.value == 7
    assert explorer.numbers() != before


def test_two_threads_do_not_break_the_picture():
    """Newer kernels call back on a second thread while cells run on the first."""
    explorer, broken = EXPLORERS["affine"](), []

    def drag():
        try:
            for i in range(40):
                explorer.controls["bits"].value = 2 + i % 6
        except Exception as error:  # noqa: BLE001  any error at all is what this test looks for
            broken.append(error)

    thread = threading.Thread(target=drag)
    thread.start()
    for _ in range(10):  # as a cell that draws meanwhile would
        Figure().subplots().figure.canvas.draw()
    thread.join()
    assert not broken


@pytest.mark.parametrize("name", ["affine", "clipping", "bits"])
def test_a_move_costs_less_than_half_of_a_full_redraw(name):
    explorer = EXPLORERS[name]()
    control = next(iter(explorer.controls.values()))

    def cost(action):
        times = []
        for i in range(12):
            start = time.thread_time()
            action(i)
            times.append(time.thread_time() - start)
        return np.median(times)

    choices = [control.value, *other_values(control)]
    move = cost(lambda i: setattr(control, "value", choices[(i + 1) % len(choices)]))
    full = cost(lambda i: explorer.ax.figure.canvas.draw())
    assert move < 0.5 * full


# --- notebook 03: groups


def test_groups_numbers_are_the_librarys():
    weight, x = layer_and_inputs()
    explorer = ex.explore_groups(weight, x)
    for name, value in {"bits": 3, "group": "32", "symmetric": True}.items():
        explorer.controls[name].value = value
    q = quantize_tensor(weight, bits=3, granularity=PerGroup(32), symmetric=True)
    back = q.dequantize()
    of_output = ((x @ (weight - back).T).square().sum() / (x @ weight.T).square().sum()).item()
    assert f"{q.bits_per_element:.3f} true bits per weight" in explorer.numbers()
    assert f"{q.nbytes:,} bytes" in explorer.numbers()
    assert (
        f"weight error {((weight - back).square().sum() / weight.square().sum()).item():.2e}"
        in explorer.numbers()
    )
    assert f"output error {of_output:.2e}" in explorer.numbers()


@pytest.mark.parametrize(("group", "granularity"), [("tensor", PerTensor()), ("row", PerAxis(0))])
def test_groups_without_inputs_show_the_weights_error(group, granularity):
    weight, _ = layer_and_inputs()
    explorer = ex.explore_groups(weight)
    explorer.controls["group"].value = group
    q = quantize_tensor(weight, bits=4, granularity=granularity, symmetric=False)
    error = ((weight - q.dequantize()).square().sum() / weight.square().sum()).item()
    (_, point) = explorer.ax.figure.axes[1].lines
    assert point.get_xdata() == [q.bits_per_element]
    assert point.get_ydata() == pytest.approx([error], rel=1e-5)
    assert "output" not in explorer.numbers()


def test_groups_heat_map_is_the_error_of_each_weight_where_it_can_show_it():
    weight, _ = layer_and_inputs()
    weight = weight[:, :90]  # 40 x 90 fit into the picture as they are
    explorer = ex.explore_groups(weight, group=64)
    error = weight - quantize_tensor(weight, bits=4, granularity=PerGroup(64), symmetric=False).dequantize()
    shown = np.asarray(explorer.ax.images[0].get_array())
    expected = 10 * (error.square() / weight.square().mean()).clamp(min=1e-12).log10()
    assert np.allclose(shown, expected.numpy(), atol=1e-3)


@pytest.mark.parametrize(
    ("weight", "x", "message"),
    [
        (torch.zeros(4), None, "need weight"),
        (torch.zeros(4, 8), torch.zeros(3, 4), "need weight"),
        (torch.full((4, 8), float("nan")), None, "finite"),
    ],
)
def test_groups_refuse_what_is_no_layer(weight, x, message):
    with pytest.raises(ValueError, match=message):
        ex.explore_groups(weight, x)


def test_groups_of_a_layer_of_zeros():
    assert "weight error 0.00e+00" in ex.explore_groups(torch.zeros(4, 16), torch.ones(3, 16)).numbers()


# --- notebook 05: float formats


def test_float_format_numbers_are_the_librarys():
    x = values(5000).view(50, 100)
    inputs = values(3000).view(30, 100)
    explorer = ex.explore_float_format(x, inputs=inputs, preset="FP4 E2M1", scaled=True)
    scale = x.abs().max().item() / 6
    back = round_to(x.double() / scale, FP4_E2M1) * scale
    wrong = (inputs @ (back.float() - x).T).square().sum() / (inputs @ x.T).square().sum()
    assert f"signal to noise {sqnr_db(x, back.float()):.1f} dB" in explorer.numbers()
    assert f"become 0: {((back == 0) & (x != 0)).double().mean().item():.2%}" in explorer.numbers()
    assert f"output error of the layer {wrong.item():.2e}" in explorer.numbers()


def test_a_float_preset_moves_the_sliders_and_a_slider_the_preset():
    explorer = ex.explore_float_format(values(500))
    c = explorer.controls
    c["preset"].value = "FP16"
    assert (c["exponent"].value, c["mantissa"].value) == (5, 10)
    c["mantissa"].value = 3
    assert c["preset"].value == "custom"
    assert "E5M3: 9 bits" in explorer.numbers()
    c["exponent"].value = 4
    assert c["preset"].value == "FP8 E4M3"
    assert "largest 448" in explorer.numbers()
    c["preset"].value = "custom"  # the same bits without a code for NaN
    assert "largest 480" in explorer.numbers()
    with pytest.raises(ValueError, match="not what a layer"):
        ex.explore_float_format(values(100).view(10, 10), inputs=values(100).view(20, 5))


# --- calibration (notebook 02)


def test_calibration_numbers_are_the_librarys():
    x, weight = values(8192).view(128, 64), layer()[0]
    explorer = ex.explore_calibration(x, bits=4, weight=weight)
    controls = explorer.controls
    controls["observer"].value = "MSE"
    observer = MSE(bits=4).update(x)
    qp = choose_qparams(*observer.min_max(), qmin=0, qmax=15)
    x_hat = fake_quantize(x, qp)
    output = (((x_hat - x) @ weight.T).square().sum() / (x @ weight.T).square().sum()).item()
    assert f"error of the OUTPUT {output:.2e}" in explorer.numbers()
    assert f"error of the input {mse(x, x_hat) / x.square().mean().item():.2e}" in explorer.numbers()
    controls["clip"].value = controls["clip"].options[12][1]
    assert controls["observer"].value == "by hand"  # dragging takes over
    clip = controls["clip"].value
    qp = choose_qparams(x.min() * clip, x.max() * clip, qmin=0, qmax=15)
    assert f"scale {qp.scale.item():.4g}" in explorer.numbers()


@pytest.mark.parametrize(
    "x", [torch.zeros(40), values(400).relu(), -values(400).abs() - 1, values(480).view(2, 12, 20)]
)
def test_calibration_of_odd_data(x):
    explorer = ex.explore_calibration(x)
    for name in ("entropy", "MSE", "by hand"):
        explorer.controls["observer"].value = name
        assert "nan" not in explorer.numbers()
    explorer.controls["bits"].value = 2
    assert "scale" in explorer.numbers()


# --- codebook ---------------------------------------------------------------------------------------------------


def test_codebook_numbers_are_the_librarys():
    weight, x = layer_and_inputs()
    explorer = ex.explore_codebook(weight, x, block_size=32)
    q = quantize_codebook(weight, nf4_levels(), block_size=32)
    assert (
        f"{sqnr_db(weight, q.dequantize()):.2f} dB at {q.bits_per_element:.3f} true bits"
        in explorer.numbers()
    )
    error = ((weight - q.dequantize()) @ x.T).square().sum() / (weight @ x.T).square().sum()
    assert f"output error {error:.2e}" in explorer.numbers()
    explorer.controls["table"].value = "INT4 asymmetric"
    grid = quantize_tensor(weight.flatten(), bits=4, granularity=PerGroup(36), symmetric=False)
    decibels = sqnr_db(weight.flatten(), grid.dequantize())
    assert f"blocks of 36: {decibels:.2f} dB at {grid.bits_per_element:.3f} true bits" in explorer.numbers()


def test_codebook_shows_where_nf4_loses():
    """Small blocks of normal values: the asymmetric grid wins; large blocks: NF4 does; symmetric never."""
    explorer = ex.explore_codebook(layer_and_inputs()[0])
    explorer.controls["values"].value = "normal"
    for block, wins in ((16, True), (32, True), (256, False), (4096, False)):
        explorer.controls["block"].value = block
        found = re.findall(r"([\d.]+) dB", explorer.numbers().splitlines()[1])
        nf4, fp4, symmetric, asymmetric, kmeans = map(float, found)
        assert (asymmetric > nf4) == wins
        assert max(symmetric, fp4) < nf4 < kmeans


def test_codebook_usage_and_levels_are_drawn():
    explorer = ex.explore_codebook(layer_and_inputs()[0], table="INT4 symmetric")
    density = explorer.ax
    usage = next(ax for ax in density.figure.axes if ax.get_ylabel() == "used by, %")
    assert sum(bar.get_height() for bar in usage.patches) == pytest.approx(100)
    levels = [line[0][0] for line in density.collections[0].get_segments()]
    assert levels == pytest.approx([(k - 8) / 7.5 for k in range(16)])
    with pytest.raises(ValueError, match="need weight"):
        ex.explore_codebook(torch.ones(4))


# --- integers (notebook 07)


def test_speed_numbers_are_the_measured_ones():
    seconds, nbytes, parts = speeds()
    explorer = ex.explore_speed(seconds, nbytes, parts, shape=(1, 2048, 768), way="int8")
    times = [seconds[way, 1, 2048, 768] for way in ("float32", "int8")]
    assert f"{times[0] / times[1]:.2f} × as fast" in explorer.numbers()
    assert f"{1e6 * times[1]:,.0f} µs" in explorer.numbers()
    assert f"weight {2048 * 768:,} bytes, 8.00 true bits each" in explorer.numbers()
    assert "the largest: fixed" in explorer.numbers()
    explorer.controls["M"].value = 256
    assert "the largest: computing" in explorer.numbers()
    curve = explorer.ax.lines[1]
    assert curve.get_ydata() == pytest.approx([1e6 * seconds["int8", m, 2048, 768] for m in (1, 16, 256)])


def test_speed_needs_every_combination():
    seconds, nbytes, parts = speeds()
    del seconds["int8", 16, 256, 768]
    with pytest.raises(ValueError, match="every combination"):
        ex.explore_speed(seconds, nbytes, parts)


@pytest.mark.parametrize("at_the_end", ["wraps", "saturates"])
@pytest.mark.parametrize("bits", [8, 12, 16, 32])
def test_accumulator_numbers_are_those_of_a_loop(bits, at_the_end):
    layer, x = accumulator()
    explorer = ex.explore_accumulator(layer, x, bits=bits, at_the_end=at_the_end)
    qp, half, kept = layer.input_qparams(x), 2 ** (bits - 1), []
    codes = (quantize(x, qp) - qp.zero_point).tolist()
    sums = [[sum(map(operator.mul, row, column)) for column in layer.codes.tolist()] for row in codes]
    for total in [total for row in sums for total in row]:
        if at_the_end == "saturates":
            total = min(max(total, -half), half - 1)
        while not -half <= total < half:
            total -= 2 * half if total > 0 else -2 * half
        kept.append(total)
    exact, stored = torch.tensor(sums).double(), torch.tensor(kept).double().view(-1, 30)
    scale = layer.weight_scale.double()
    error = ((stored - exact) * scale).norm() / (exact * scale).norm()
    assert f"lost: {(stored != exact).double().mean():.3%}" in explorer.numbers()
    assert f"output from that: {error:.2e}" in explorer.numbers()
    assert f"its largest sum is {int(exact.abs().max()):,}" in explorer.numbers()
    assert explorer.ax.figure.axes[1].lines[-1].get_ydata().tolist() == stored.flatten().tolist()
    if at_the_end == "wraps" and bits in (8, 16):  # what hardware does
        assert torch.equal(torch.tensor(sums).to({8: torch.int8, 16: torch.int16}[bits]).double(), stored)


def test_accumulator_of_zeros():
    layer, x = accumulator()
    assert "lost: 0.000%" in ex.explore_accumulator(layer, torch.zeros_like(x), bits=8).numbers()


# --- outliers (notebook 09)


def stretched(planted):
    """layer_and_inputs with channels 3 and 70 ten times as large, and the weight's columns made smaller if planted."""
    weight, x = layer_and_inputs()
    stretch = torch.ones(150).index_fill(0, torch.tensor([3, 70]), 10.0)
    return weight / stretch if planted else weight, x[:256] * stretch


def output_error(y, wanted):
    return ((y - wanted).square().sum() / wanted.square().sum()).item()


def as_linear(weight):
    linear = torch.nn.Linear(weight.shape[1], len(weight), bias=False).requires_grad_(False)
    linear.weight.copy_(weight)
    return linear


@pytest.mark.parametrize("planted", [True, False])
def test_threshold_numbers_are_the_librarys(planted):
    explorer = ex.explore_threshold(layer_and_inputs()[0], layer_and_inputs()[1][:256], channels=[3, 70])
    for name, value in {"factor": 10, "threshold": 5, "planted": planted}.items():
        explorer.controls[name].value = value
    weight, x = stretched(planted)
    split, wanted = LLMInt8Linear.from_linear(as_linear(weight), threshold=5.0), x @ weight.T
    count = int(split.outlier_columns(x).sum())
    assert f"threshold 5: {count} of 150 columns in float ({count / 150:.1%})" in explorer.numbers()
    assert f"output error {output_error(split.exact(x), wanted):.2e}" in explorer.numbers()
    alone = output_error(x @ split.dequantized_weight().T, wanted)
    assert f"int8 weights only {alone:.2e}" in explorer.numbers()
    whole = output_error(DynamicInt8Linear.from_linear(as_linear(weight)).exact(x), wanted)
    assert f"W8A8 with one scale {whole:.2e}" in explorer.numbers()
    bits = 8 * (1 - count / 150) + 16 * count / 150 + 32 / 150
    assert f"{bits:.2f} an input value" in explorer.numbers()


def test_threshold_shows_the_columns_that_go_to_float():
    weight, x = layer_and_inputs()
    explorer = ex.explore_threshold(weight, x, channels=[3, 70], factor=100, threshold=10)
    (dots, line) = explorer.ax.lines
    assert list(dots.get_xdata()) == [3.5, 70.5]
    assert line.get_ydata() == [10, 10]
    explorer.controls["threshold"].value = float("inf")
    assert list(dots.get_xdata()) == []
    assert "threshold inf: 0 of 150 columns in float" in explorer.numbers()


@pytest.mark.parametrize(("bits", "of_weight", "of_x"), [("W8A8", 8, 8), ("W4A8", 4, 8), ("W8A4", 8, 4)])
def test_smoothing_numbers_are_the_librarys(bits, of_weight, of_x):
    weight, x = stretched(planted=False)
    explorer = ex.explore_smoothing(layer_and_inputs()[0], layer_and_inputs()[1][:256], channels=[3, 70])
    for name, value in {"factor": 10, "alpha": 0.75, "bits": bits}.items():
        explorer.controls[name].value = value
    s = smoothing_scales(x.abs().amax(0), [as_linear(weight)], 0.75)
    w_hat = quantize_tensor(weight * s, bits=of_weight, granularity=PerAxis(0)).dequantize()
    qp = choose_qparams(*torch.aminmax(x / s), qmin=0, qmax=2**of_x - 1)
    error = output_error(fake_quantize(x / s, qp) @ w_hat.T, x @ weight.T)
    assert f"output error {error:.2e}" in explorer.numbers()
    if bits == "W8A8":
        plain = output_error(DynamicInt8Linear.from_linear(as_linear(weight)).exact(x), x @ weight.T)
        assert f"not smoothed {plain:.2e}" in explorer.numbers()
    peaks = [part.abs().amax(0) for part in (x, x / s, weight, weight * s)]
    for line, peak in zip(explorer.ax.figure.axes[2].lines, peaks, strict=True):
        np.testing.assert_allclose(line.get_ydata(), peak.numpy())


def test_smoothing_undoes_what_was_planted_at_any_alpha():
    """s grows by the factor that the inputs grew by and the weights shrank by: the smoothed layer stays the same."""
    weight, x = layer_and_inputs()
    explorer = ex.explore_smoothing(weight, x, channels=[3, 70], planted=True)
    for alpha in (0.0, 0.5, 1.0):
        explorer.controls["alpha"].value, seen = alpha, set()
        for factor in (1, 10, 100):
            explorer.controls["factor"].value = factor
            seen.add(explorer.numbers().split("output error ")[1].split()[0])
        assert len(seen) == 1


def test_smoothing_colours_are_the_bits_of_codes():
    weight, x = layer_and_inputs()
    explorer = ex.explore_smoothing(weight[:, :100], x[:64, :100], channels=[3], factor=30)
    before = explorer.ax.images[0].get_array()
    stretched = x[:64, :100] * torch.ones(100).index_fill(0, torch.tensor(3), 30.0)
    codes = torch.round(127 * stretched.abs() / stretched.abs().max()).int().tolist()
    assert [[code.bit_length() for code in row] for row in codes] == before.astype(int).tolist()


@pytest.mark.parametrize("explore", [ex.explore_threshold, ex.explore_smoothing])
def test_outliers_of_odd_layers(explore):
    for weight, x in ((torch.zeros(3, 4), torch.zeros(5, 4)), (torch.ones(1, 1), torch.ones(1, 1))):
        explorer = explore(weight, x, channels=[0])
        explorer.controls["factor"].value = 300
        assert "nan" not in explorer.numbers()
    for weight, x, channels, message in (
        (torch.zeros(4), torch.zeros(3, 4), [], "need weight"),
        (torch.zeros(4, 8), torch.zeros(3, 4), [], "need weight"),
        (torch.full((4, 8), float("nan")), torch.zeros(3, 8), [], "weight must be finite"),
        (torch.zeros(4, 8), torch.zeros(3, 8), [8], "a channel must be 0..7, got 8"),
    ):
        with pytest.raises(ValueError, match=message):
            explore(weight, x, channels=channels)


# --- dynamic or static (notebook 08)


def a_layer_shifted(*, scale=1.0, shift=0.0, loud=1):
    """32 tokens and 64 outputs, which the explorer takes as they are; and what the layer then reads."""
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 150, generator=random) * 0.05, torch.randn(32, 150, generator=random)
    qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
    low, high = (qp.scale * (code - qp.zero_point) for code in (0, 255))
    live = scale * x + shift * (high - low)
    live[0] *= loud
    return weight, x, live


@pytest.mark.parametrize("place", [{}, {"scale": 4.0}, {"scale": 0.125, "shift": 0.3}, {"shift": -0.5, "loud": 16}])
def test_shift_errors_are_those_of_the_layers(place):
    weight, x, live = a_layer_shifted(**place)
    explorer = ex.explore_shift(x, weight)
    for name, value in place.items():
        explorer.controls[name].value = value
    linear = torch.nn.Linear(150, 64, bias=False).requires_grad_(False)
    linear.weight.data = weight
    layers = (
        StaticInt8Linear.from_linear(linear, MinMax().update(x)),
        DynamicInt8Linear.from_linear(linear),
        DynamicInt8Linear.from_linear(linear, per="token"),
    )
    y = linear(live)
    wanted = [((int8.exact(live) - y).square().sum() / y.square().sum()).item() for int8 in layers]
    said = explorer.numbers().split("OUTPUT: ")[1]
    assert [float(number) for number in re.findall(r"\d\.\d\de[-+]\d\d", said)] == pytest.approx(wanted, rel=0.01)
    points = explorer.ax.figure.axes[1].lines[3:]
    assert [point.get_ydata()[0] for point in points] == pytest.approx(wanted, rel=1e-3)
    scales = list(explorer.ax.figure.axes[1].lines[0].get_xdata())
    here = [line.get_ydata()[scales.index(place.get("scale", 1.0))] for line in explorer.ax.figure.axes[1].lines[:3]]
    assert here == pytest.approx(wanted, rel=1e-3)
    qp = layers[0].input_qparams(live)
    beyond = (live / qp.scale + qp.zero_point).sub(127.5).abs() > 128
    assert f"clipped {beyond.float().mean().item():.2%}" in explorer.numbers()


def test_a_static_grid_suffers_both_ways_and_a_dynamic_one_follows():
    weight, x, _ = a_layer_shifted()
    static, tensor, token = (
        line.get_ydata() for line in ex.explore_shift(x, weight).ax.figure.axes[1].lines[:3]
    )
    assert static.argmin() == 8  # where scale is 1
    assert static[0] > 20 * static[8] < static[-1] / 100
    for dynamic in (tensor, token):
        assert max(dynamic) < 1.001 * min(dynamic)


def test_shift_observer_bits_and_first_position():
    weight, x, _ = a_layer_shifted()
    explorer = ex.explore_shift(x, weight, observer=Percentile(percentile=90), bits=4, scale=1.9, shift=0.52, loud=5)
    assert [control.value for control in explorer.controls.values()] == [2.0, 0.5, 4]
    qp = choose_qparams(*Percentile(percentile=90).update(x).min_max(), qmin=0, qmax=15)
    assert f"scale {qp.scale.item():.3g}" in explorer.numbers()


@pytest.mark.parametrize("x", [torch.zeros(5, 4), -torch.ones(1, 4), torch.full((40, 4), 1e-20)])
def test_shift_of_odd_inputs(x):
    explorer = ex.explore_shift(x, torch.ones(3, 4))
    for name, value in {"scale": 16.0, "shift": -1.0, "loud": 64}.items():
        explorer.controls[name].value = value
        assert "nan" not in explorer.numbers()


def test_shift_refuses_what_is_no_layer_and_changes_nothing_given():
    weight, x, _ = a_layer_shifted()
    before = weight.clone(), x.clone()
    ex.explore_shift(x, weight, loud=64)
    assert torch.equal(weight, before[0])
    assert torch.equal(x, before[1])
    with pytest.raises(ValueError, match="not what a layer of weight"):
        ex.explore_shift(x[:, :9], weight)
    with pytest.raises(ValueError, match="not what a layer of weight"):
        ex.explore_shift(x[0], weight)
    with pytest.raises(ValueError, match="finite"):
        ex.explore_shift(x, weight * float("nan"))
    with pytest.raises(ValueError, match="bits must be 2..8, got 9"):
        ex.explore_shift(x, weight, bits=9)


def test_compare_tables_is_quantizing_and_measuring_by_hand():
    x = values(9 * 64 * 4)
    found = ex.codebook.compare_tables(x, 64)
    by_hand = {
        "NF4": quantize_codebook(x, nf4_levels(), block_size=64),
        "INT4 symmetric": quantize_tensor(x, bits=4, granularity=PerGroup(64), symmetric=True, signed=False),
        "INT4 asymmetric": quantize_tensor(x, bits=4, granularity=PerGroup(72), symmetric=False, signed=False),
    }
    assert by_hand.keys() <= found.keys()
    for name, q in by_hand.items():
        assert found[name] == pytest.approx(sqnr_db(x, q.dequantize()), abs=1e-3), name
