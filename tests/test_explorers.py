"""Explorers driven without a browser: setting .value is what the front end's message does."""

import base64
import io
import math
import operator
import re
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from quantlab import explorers as ex
from quantlab.affine import choose_qparams, fake_quantize, quantize
from quantlab.awq import scale_and_round, scales_of, search_scales
from quantlab.blocks import PerAxis, PerGroup, PerTensor
from quantlab.capstone import Plans
from quantlab.codebook import nf4_levels, quantize_codebook
from quantlab.explorers import base, data
from quantlab.explorers.rotations import block_sizes
from quantlab.floats import FP4_E2M1, round_to
from quantlab.gptq import gptq_quantize, gptq_steps
from quantlab.granularity import quantize_tensor
from quantlab.hadamard import hadamard
from quantlab.hessian import Hessian
from quantlab.linear import DynamicInt8Linear, StaticInt8Linear
from quantlab.lm import DATA, generate, load_lm
from quantlab.metrics import mse, sqnr_db
from quantlab.mixed import Sensitivity, greedy, knapsack
from quantlab.observers import MSE, MinMax, Percentile
from quantlab.outliers import LLMInt8Linear, smoothing_scales
from quantlab.rotations import rounding_error
from quantlab.superblocks import round_in_superblocks
from quantlab.train.few_levels import binary, pack_ternary, ternary
from quantlab.train.lsq import LSQ

# --- what is explored -------------------------------------------------------------------------------------------


def seeded():
    return torch.Generator().manual_seed(0)


def values(*shape):
    random, count = seeded(), int(np.prod(shape or (20_000,)))
    x = torch.randn(count, generator=random) / torch.rand(count, generator=random).clamp(min=0.05).sqrt() * 0.02
    return x.view(shape or -1)


def layer():
    random = seeded()
    mix = torch.randn(64, 64, generator=random) / 8 * torch.arange(1, 65) ** -0.5
    x = torch.randn(1000, 64, generator=random) @ mix + 0.05 * torch.randn(1000, 64, generator=random)
    return torch.randn(32, 64, generator=random) * 0.05, Hessian(64).add(x)


def layer_and_inputs():
    """A layer whose rows differ in size, and its input."""
    random = seeded()
    weight = torch.randn(40, 150, generator=random) * torch.linspace(0.01, 0.1, 40)[:, None]
    return weight, torch.randn(300, 150, generator=random)


def measured_models():
    texts = {32: "a dog ran home today", 8: "a dog ran home today", 4: "a dog ran far away", 2: "dog dog"}
    return [
        {"label": "float" if b == 32 else f"{b} bits", "bits": b, "perplexity": 40 + 100 / b**2, "stderr": 2.0,
         "kl": 0.0 if b == 32 else 4.0**-b, "text": text, "top1": 1 - 1 / b}
        for b, text in texts.items()
    ]  # fmt: skip


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


def accumulator():
    weight = values(30, 48) * torch.linspace(0.1, 3, 30)[:, None]
    return DynamicInt8Linear.from_linear(data.linear_of(weight)), values(50, 48)


def walk():
    """Weights of three rows that drift for 12 training steps, and a falling loss."""
    random = seeded()
    drift = torch.randn(12, 3, 96, generator=random).cumsum(0) * 0.004
    start = torch.randn(3, 96, generator=random) * 0.05
    return torch.cat([start[None], start + drift]), [3.0 / (1 + k) for k in range(12)]


def scaled_layers():
    """An even layer and one with two loud channels, whose groups of 128 have a short last one."""
    weight, x = layer_and_inputs()
    loud = x * torch.ones(150).index_fill(0, torch.tensor([3, 140]), 50.0)
    return {name: (weight, Hessian(150).add(values)) for name, values in (("even", x), ("loud", loud))}


def loud_layers():
    """A layer with a loud channel, and one with a loud token."""
    weight, x = layer_and_inputs()
    channel, token = x * torch.ones(150).index_fill(0, torch.tensor([7]), 80.0), x.clone()
    token[0] *= 80
    return {"channel": (weight, channel), "token": (weight, token)}
def loud_inputs(width=96):
    """Inputs with one loud channel; 96 channels have Hadamard blocks of 1, 2, 4, 8, 12, 16 ..."""
    x = values(40, width)
    x[:, 11] *= 40
    return x


def sensitivity(blocks=3):
    """Made-up costs that fall by 4 for each bit, of layers of two sizes."""
    random, kinds = seeded(), {"attn.q_proj": 4096, "attn.v_proj": 4096, "mlp.up_proj": 12288}
    weights = {f"model.layers.{i}.{kind}": count for i in range(blocks) for kind, count in kinds.items()}
    scale = {name: 10 ** torch.rand(1, generator=random).item() for name in weights}
    costs = {name: {b: factor * 4.0**-b for b in (2, 3, 4, 6)} for name, factor in scale.items()}
    sizes = {name: {b: count * b // 8 + count // 32 for b in (2, 3, 4, 6)} for name, count in weights.items()}
    return Sensitivity(costs, costs, sizes, weights, 512)


def wide_layer():
    """A layer whose rows are super-blocks of 256, and its input."""
    return values(12, 512), values(100, 512)


def ranks():
    """Made-up adapters of a layer with 24 outputs and 16 inputs, and one with 8 outputs."""
    random = seeded()

    def row(r):
        updates = {
            name: (torch.randn(r, 16, generator=random), torch.randn(out, r, generator=random))
            for name, out in (("q_proj", 24), ("v_proj", 8))
        }
        numbers = {"rank": r, "perplexity": 20 + 60 / (1 + r), "stderr": 2.0, "kl": r / 10, "trained": 56 * r}
        return numbers | {"text": f"day {r}", "updates": updates}

    return [row(r) for r in (0, 1, 4)]


def head():
    """Keys with two loud channels, values without, and a query; 80 tokens of 24 channels."""
    random = seeded()
    keys, values_, query = (torch.randn(*shape, generator=random) for shape in ((80, 24), (80, 24), (24,)))
    keys[:, [3, 11]] += torch.tensor([9.0, -14.0])
    return keys, values_, 2 * query


def caches():
    """Made-up KLs that fall by 4 for each bit of the keys and by 3 for each of the values."""
    settings = [(k, v, sinks) for k in (8, 4, 2) for v in (8, 4, 2) for sinks in (0, 4)]
    return {(k, v, sinks): (4.0**-k + 0.3 * 3.0**-v) / (1 + sinks) for k, v, sinks in settings}
def planned():
    """Made-up costs that fall by 4 for each bit, and bytes of three parts."""
    parts, bits, groups = {"embedding": 30_000, "attention": 20_000, "MLP": 60_000}, (2, 3, 4), (32, 64)
    scale = {"nearest": 2.0, "GPTQ": 1.0}
    each = [(group, part, b) for group in groups for part in parts for b in bits]
    costs = {(m, g, part, b): s * g / parts[part] * 4.0**-b * 1e4 for m, s in scale.items() for g, part, b in each}
    codes = {(part, b): count * b // 8 for part, count in parts.items() for b in bits}
    sides = {(g, part, b): parts[part] // g * 4 for g, part, b in each}
    return Plans(costs, codes, sides, 500, 700, 110_000, tuple(scale), groups, bits)


EXPLORERS = {
    "kv": lambda: ex.explore_kv(*head()[:2]),
    "cache": lambda: ex.explore_cache(head()[2], head()[0], caches(), recent=8),
    "activations": lambda: ex.explore_activations(loud_layers()),
    "hunt": lambda: ex.explore_hunt("integers"),
    "rank": lambda: ex.explore_rank(ranks()),
    "budget": lambda: ex.explore_budget(sensitivity()),
    "capstone": lambda: ex.explore_capstone(planned(), 60_000, references={"a": (50_000, 0.2), "b": (70_000, 0.01)}),
    "affine": lambda: ex.explore_affine(values()),
    "clipping": lambda: ex.explore_clipping(values()),
    "gptq": lambda: ex.explore_gptq(*layer()),
    "columns": lambda: ex.explore_columns(*layer()),
    "groups": lambda: ex.explore_groups(*layer_and_inputs()),
    "floats": lambda: ex.explore_float_format(values(100, 200), inputs=values(20, 200)),
    "codebook": lambda: ex.explore_codebook(*layer_and_inputs()),
    "bits": lambda: ex.explore_bits(measured_models()),
    "temperature": temperature,
    "speed": lambda: ex.explore_speed(*speeds()),
    "threshold": lambda: ex.explore_threshold(*layer_and_inputs(), channels=[3, 70]),
    "smoothing": lambda: ex.explore_smoothing(*layer_and_inputs(), channels=[3, 70]),
    "accumulator": lambda: ex.explore_accumulator(*accumulator(), bits=14),
    "calibration": lambda: ex.explore_calibration(values(128, 64), weight=layer()[0]),
    "shift": lambda: ex.explore_shift(*layer_and_inputs()[::-1]),
    "scaling": lambda: ex.explore_scaling(scaled_layers()),
    "training": lambda: ex.explore_training(*walk(), bits=2, group_size=48, step=5),
    "step": lambda: ex.explore_step(*layer_and_inputs(), group_size=50),
    "angle": lambda: ex.explore_angle(10.0, 0.6),
    "blocks": lambda: ex.explore_blocks(loud_inputs()),
    "super-blocks": lambda: ex.explore_super_blocks(*wide_layer()),
}

# --- how it is looked at ----------------------------------------------------------------------------------------


def put(explorer, **settings):
    """Set some controls, in this order."""
    for name, value in settings.items():
        explorer.controls[name].value = value
    return explorer


def shows(explorer, *texts):
    """The line of numbers holds each of these."""
    for text in texts:
        assert text in explorer.numbers()


def axes(explorer, place):
    return explorer.ax.figure.axes[place]


def relative(y, wanted):
    """‖y - wanted‖² / ‖wanted‖², written out."""
    return ((y - wanted).square().sum() / wanted.square().sum()).item()


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


# --- every explorer ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=EXPLORERS)
def explorer(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "KEPT", 0)  # each picture is drawn anew, and none hides what the last one left
        return EXPLORERS[request.param]()


def test_every_explorer_is_tested():
    assert len(EXPLORERS) == sum(name.startswith("explore_") for name in ex.__all__)


def test_every_control_changes_picture_or_numbers_and_back(explorer):
    for name, control in explorer.controls.items():
        start, text, shown = control.value, explorer.numbers(), pixels(explorer)
        changed = False
        for value in other_values(control):
            control.value = value
            changed |= explorer.numbers() != text and not np.array_equal(pixels(explorer), shown)
        control.value = start
        assert changed, name
        assert explorer.numbers() == text
        assert np.array_equal(pixels(explorer), shown), name  # no trace of what was shown in between


def test_what_moves_is_no_part_of_the_still_background(explorer):
    """A full drawing leaves animated artists out: what else is drawn must be the same at every setting."""

    def still():
        explorer.ax.figure.canvas.draw()
        return np.asarray(explorer.ax.figure.canvas.buffer_rgba()).copy()

    start, background = {name: control.value for name, control in explorer.controls.items()}, still()
    for control in explorer.controls.values():
        control.value = other_values(control)[-1]
        assert np.array_equal(still(), background)
    put(explorer, **start)


def test_a_picture_is_the_figure_drawn_anew(explorer):
    """In 256 colours at most, and whatever was drawn before."""
    fig, start = explorer.ax.figure, {name: control.value for name, control in explorer.controls.items()}
    moving = sorted(fig.findobj(lambda artist: artist.get_animated()), key=lambda artist: artist.zorder)
    for control in explorer.controls.values():
        for value in other_values(control)[:2]:
            control.value = value
            shown = Image.open(io.BytesIO(explorer.picture()))
            assert shown.mode == "P"
            shown = shown.convert("RGB")
            anew = base.Canvas(fig, moving).picture()
            off = abs(np.asarray(shown, int) - np.asarray(anew, int)).max(2)
            assert off.mean() < 2.5, (control.description, value)
            assert (off > 60).mean() < 5e-4, (control.description, value)
    put(explorer, **start)


def test_what_changes_seldom_is_drawn_seldom(monkeypatch):
    """The table of the cache changes with the tokens left in float, and not with the bits."""
    explorer, drawn, draw = EXPLORERS["cache"](), [], AxesImage.draw
    monkeypatch.setattr(AxesImage, "draw", lambda *arguments: drawn.append(1) or draw(*arguments))
    put(explorer, **{"key bits": 4, "value bits": 2})
    assert drawn == []
    put(explorer, **{"first in float": 4})
    assert drawn == [1]


def test_the_first_picture_stands_without_a_kernel(explorer):
    bundle = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} <= set(bundle)
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert picture.size[0] >= 800
    assert bundle["text/plain"] == explorer.numbers()
    assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10  # not blank


def test_numbers_stand_under_the_picture(explorer):
    assert explorer.numbers().split()[0] in explorer.view.children[2].value


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
def test_a_move_costs_less_than_half_of_a_full_redraw(name, monkeypatch):
    monkeypatch.setattr(base, "KEPT", 0)
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


NAN = float("nan")
LAYERS = {  # explorers of a layer, by (weight, x)
    "activations": lambda weight, x: ex.explore_activations({"layer": (weight, x)}),
    "groups": ex.explore_groups,
    "codebook": ex.explore_codebook,
    "threshold": ex.explore_threshold,
    "smoothing": ex.explore_smoothing,
    "shift": lambda weight, x: ex.explore_shift(x, weight),
    "step": lambda weight, x: ex.explore_step(weight, x, group_size=4),
    "floats": lambda weight, x: ex.explore_float_format(weight, inputs=x),
}


@pytest.mark.parametrize("explore", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(
    ("weight", "x", "message"),
    [
        (torch.zeros(8), torch.zeros(3, 8), "need weight (out, in) and x (tokens, in), got (8,) and (3, 8)"),
        (torch.zeros(4, 8), torch.zeros(3, 4), "got (4, 8) and (3, 4)"),
        (torch.zeros(4, 8), torch.zeros(8), "got (4, 8) and (8,)"),
        (torch.full((4, 8), NAN), torch.zeros(3, 8), "must be finite"),
        (torch.zeros(4, 8), torch.full((3, 8), NAN), "x must be finite"),
        ([[1.0]], torch.zeros(3, 1), "must be a tensor"),
    ],
    ids=["a row", "another layer's input", "one token", "nan weight", "nan input", "a list"],
)
def test_what_is_no_layer_is_refused(explore, weight, x, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explore(weight, x)


def test_nothing_given_is_changed():
    weight, x = (t[:20, :48].clone() for t in layer_and_inputs())
    hessian, observer = Hessian(48).add(x), MinMax().update(x / 10)
    before = [t.clone() for t in (weight, x, hessian.matrix, *observer.min_max())]
    for explore in LAYERS.values():
        explore(weight, x)
    ex.explore_calibration(x, weight=weight)
    ex.explore_scaling({"layer": (weight, hessian)})
    ex.explore_gptq(weight, hessian)
    ex.explore_shift(x, weight, observer=observer, loud=64)
    after = (weight, x, hessian.matrix, *observer.min_max())
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_a_layer_without_errors_can_be_explored():
    """A layer of zeros is rounded exactly, and no ratio of its errors exists."""
    hessian = Hessian(32).add(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))
    for weight in (torch.zeros(8, 32), torch.ones(8, 32)):
        explorer = put(ex.explore_gptq(weight, hessian), bits=3, group=16)
        shows(explorer, "– ×")


@pytest.mark.parametrize("count", [1, 2, 5, 7, 200])
def test_rows_are_picked_evenly_from_the_first_to_the_last(count):
    rows = data.evenly(torch.arange(100.0), count)
    assert len(rows) == min(count, 100)
    assert rows[0] == 0
    assert count == 1 or rows[-1] == 99
    assert count == 1 or rows.diff().max() - rows.diff().min() <= 1


def test_rows_are_picked_by_the_nearest_whole_number():
    assert data.evenly(torch.arange(9.0), 4).tolist() == [0, 3, 5, 8]  # of 0, 2.67, 5.33, 8


def test_a_sample_keeps_the_smallest_and_the_largest():
    x = values(50_000)
    some = data.sample(x.view(500, 100))
    assert len(some) == 20_000
    assert torch.aminmax(some) == torch.aminmax(x)
    assert torch.equal(data.sample(x[:10]), x[:10])


# --- notebook 00: a model that writes


def test_temperature_shows_the_probabilities_it_samples_with():
    explorer, (model, tokenizer) = temperature(), load_lm(str(DATA / "model"))
    ids = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids += tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    for t in (0.5, 2.0, 1.0):
        shown = [bar.get_height() for bar in put(explorer, temperature=t).ax.patches]
        assert shown == pytest.approx((logits / t).softmax(0).topk(11).values.tolist(), rel=1e-4)
    assert [bar.get_height() for bar in put(explorer, temperature=0.0).ax.patches] == [1.0] + [0.0] * 10
    story = generate(model, tokenizer, "Once upon a time", tokens=8)
    assert explorer.numbers() == f"temperature 0.0: {story}"


# --- notebook 01: scale and zero point


def test_affine_numbers_are_the_librarys():
    x = values(5000)
    explorer = put(ex.explore_affine(x, bits=3), low=-0.5)
    reach = max(-x.min().item(), x.max().item())
    low, high = (torch.tensor(explorer.controls[k].value * reach) for k in ("low", "high"))
    qp = choose_qparams(low, high, qmin=0, qmax=7)
    shows(explorer, f"mean squared error {mse(x, fake_quantize(x, qp)):.2e}", f"scale {qp.scale.item():.4g}")
    places = [line[0][0] for line in explorer.ax.collections[0].get_segments()]
    assert places == pytest.approx((qp.scale * (torch.arange(8) - qp.zero_point)).tolist())


# --- notebook 02: calibration


def test_calibration_numbers_are_the_librarys():
    x, weight = values(128, 64), layer()[0]
    explorer = put(ex.explore_calibration(x, bits=4, weight=weight), observer="MSE")
    x_hat = fake_quantize(x, choose_qparams(*MSE(bits=4).update(x).min_max(), qmin=0, qmax=15))
    shows(explorer, f"error of the OUTPUT {relative(x_hat @ weight.T, x @ weight.T):.2e}")
    shows(explorer, f"error of the input {relative(x_hat, x):.2e}")
    clip = explorer.controls["clip"].options[12][1]
    put(explorer, clip=clip)
    assert explorer.controls["observer"].value == "by hand"  # dragging takes over
    qp = choose_qparams(x.min() * clip, x.max() * clip, qmin=0, qmax=15)
    first, last = (qp.scale * (code - qp.zero_point) for code in (0, 15))
    outside = (x < first - qp.scale / 2) | (x > last + qp.scale / 2)
    shows(explorer, f"scale {qp.scale.item():.4g}", f"clipped {outside.float().mean().item():.3%}")


@pytest.mark.parametrize(
    "x", [torch.zeros(40), values(400).relu(), -values(400).abs() - 1, values(480).view(2, 12, 20)]
)
def test_calibration_of_odd_data(x):
    explorer = ex.explore_calibration(x)
    for name in ("entropy", "MSE", "by hand"):
        assert "nan" not in put(explorer, observer=name).numbers()
    shows(put(explorer, bits=2), "scale")


# --- notebook 03: groups


def test_groups_numbers_are_the_librarys():
    weight, x = layer_and_inputs()
    explorer = put(ex.explore_groups(weight, x), bits=3, group="32", symmetric=True)
    q = quantize_tensor(weight, bits=3, granularity=PerGroup(32), symmetric=True)
    shows(explorer, f"{q.bits_per_element:.3f} true bits per weight", f"{q.nbytes:,} bytes")
    shows(explorer, f"weight error {relative(q.dequantize(), weight):.2e}")
    shows(explorer, f"output error {relative(x @ q.dequantize().T, x @ weight.T):.2e}")


@pytest.mark.parametrize(("group", "granularity"), [("tensor", PerTensor()), ("row", PerAxis(0))])
def test_groups_without_inputs_show_the_weights_error(group, granularity):
    weight, _ = layer_and_inputs()
    explorer = put(ex.explore_groups(weight), group=group)
    q = quantize_tensor(weight, bits=4, granularity=granularity, symmetric=False)
    (_, point) = axes(explorer, 1).lines
    assert point.get_xdata() == [q.bits_per_element]
    assert point.get_ydata() == pytest.approx([relative(q.dequantize(), weight)], rel=1e-5)
    assert "output" not in explorer.numbers()


def test_groups_heat_map_is_the_error_of_each_weight_where_it_can_show_it():
    weight = layer_and_inputs()[0][:, :90]  # 40 x 90 fit into the picture as they are
    explorer = ex.explore_groups(weight, group=64)
    error = weight - quantize_tensor(weight, bits=4, granularity=PerGroup(64), symmetric=False).dequantize()
    shown = np.asarray(explorer.ax.images[0].get_array())
    expected = 10 * (error.square() / error.square().mean()).clamp(min=1e-12).log10()
    assert np.allclose(shown, expected.numpy(), atol=1e-3)


def test_groups_of_a_layer_of_zeros():
    shows(ex.explore_groups(torch.zeros(4, 16), torch.ones(3, 16)), "weight error 0.00e+00")


# --- notebook 04: codebooks


def test_codebook_numbers_are_the_librarys():
    weight, x = layer_and_inputs()
    explorer = ex.explore_codebook(weight, x, block_size=32)
    q = quantize_codebook(weight, nf4_levels(), block_size=32)
    shows(explorer, f"{sqnr_db(weight, q.dequantize()):.2f} dB at {q.bits_per_element:.3f} true bits")
    shows(explorer, f"output error {relative(q.dequantize() @ x.T, weight @ x.T):.2e}")
    shares = np.bincount(q.codes.flatten().numpy(), minlength=16) / weight.numel()
    shows(explorer, f"entropy {-(shares * np.log2(shares)).sum():.2f} bits")
    put(explorer, table="INT4 asymmetric")
    grid = quantize_tensor(weight.flatten(), bits=4, granularity=PerGroup(36), symmetric=False)
    decibels = sqnr_db(weight.flatten(), grid.dequantize())
    shows(explorer, f"blocks of 36: {decibels:.2f} dB at {grid.bits_per_element:.3f} true bits")


def test_codebook_shows_where_nf4_loses():
    """Small blocks of normal values: the asymmetric grid wins; large blocks: NF4 does; symmetric never."""
    explorer = put(ex.explore_codebook(layer_and_inputs()[0]), values="normal")
    for block, wins in ((16, True), (32, True), (256, False), (4096, False)):
        found = re.findall(r"([\d.]+) dB", put(explorer, block=block).numbers().splitlines()[1])
        nf4, fp4, symmetric, asymmetric, kmeans = map(float, found)
        assert (asymmetric > nf4) == wins
        assert max(symmetric, fp4) < nf4 < kmeans


def test_codebook_usage_and_levels_are_drawn():
    explorer = ex.explore_codebook(layer_and_inputs()[0], table="INT4 symmetric")
    usage = next(ax for ax in explorer.ax.figure.axes if ax.get_ylabel() == "used by, %")
    assert sum(bar.get_height() for bar in usage.patches) == pytest.approx(100)
    levels = [line[0][0] for line in explorer.ax.collections[0].get_segments()]
    assert levels == pytest.approx([(k - 8) / 7.5 for k in range(16)])


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


# --- notebook 05: float formats


def test_float_format_numbers_are_the_librarys():
    x, inputs = values(50, 100), values(30, 100)
    explorer = ex.explore_float_format(x, inputs=inputs, preset="FP4 E2M1", scaled=True)
    scale = x.abs().max().item() / 6
    back = (round_to(x.double() / scale, FP4_E2M1) * scale).float()
    shows(explorer, f"signal to noise {sqnr_db(x, back):.1f} dB")
    shows(explorer, f"become 0: {((back == 0) & (x != 0)).double().mean().item():.2%}")
    shows(explorer, f"output error of the layer {relative(inputs @ back.T, inputs @ x.T):.2e}")


def test_a_float_preset_moves_the_sliders_and_a_slider_the_preset():
    explorer = ex.explore_float_format(values(500))
    c = explorer.controls
    put(explorer, preset="FP16")
    assert (c["exponent"].value, c["mantissa"].value) == (5, 10)
    put(explorer, mantissa=3)
    assert c["preset"].value == "custom"
    shows(explorer, "E5M3: 9 bits")
    put(explorer, exponent=4)
    assert c["preset"].value == "FP8 E4M3"
    shows(explorer, "largest 448")
    shows(put(explorer, preset="custom"), "largest 480")  # the same bits without a code for NaN


# --- notebook 06: the bits of a whole model


def test_bits_stand_at_their_places_and_a_kl_of_zero_below_all_others():
    explorer = ex.explore_bits(measured_models())
    left, right = explorer.ax.figure.axes
    assert list(left.lines[0].get_xdata()) == [10, 8, 4, 2]  # 8 and 4 are twice as far apart as 4 and 2
    assert list(left.lines[0].get_ydata()) == [r["perplexity"] for r in measured_models()]
    curve, nothing = right.lines[:2]
    assert list(curve.get_xdata()) == [8, 4, 2]
    assert list(curve.get_ydata()) == [4.0**-8, 4.0**-4, 4.0**-2]
    assert list(nothing.get_xdata()) == [10]
    assert 0 < nothing.get_ydata()[0] < 4.0**-8
    assert [text.get_text() for text in right.texts] == ["0"]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["float", "8", "4", "2"]
    for result, place in zip(measured_models(), (10, 8, 4, 2), strict=True):
        put(explorer, model=result["label"])
        assert [ax.lines[-1].get_xdata()[0] for ax in (left, right)] == [place, place]
        assert left.lines[-1].get_ydata() == [result["perplexity"]]
        shows(explorer, result["text"], f"KL {result['kl']:.4f}, same top token {result['top1']:.1%}")


@pytest.mark.parametrize(("label", "words"), [("8 bits", 5), ("4 bits", 3), ("2 bits", 0)])
def test_bits_say_how_long_the_story_is_the_float_models(label, words):
    explorer = ex.explore_bits(measured_models())
    assert "words as" not in explorer.numbers()
    shows(put(explorer, model=label), f"; {words} words as float\n")


# --- notebook 07: integers


def test_speed_numbers_are_the_measured_ones():
    seconds, nbytes, parts = speeds()
    explorer = ex.explore_speed(seconds, nbytes, parts, shape=(1, 2048, 768), way="int8")
    times = [seconds[way, 1, 2048, 768] for way in ("float32", "int8")]
    shows(explorer, f"{times[0] / times[1]:.2f} × as fast", f"{1e6 * times[1]:,.0f} µs")
    shows(explorer, f"weight {2048 * 768:,} bytes, 8.00 true bits each", "the largest: fixed")
    shows(put(explorer, M=256), "the largest: computing")
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
    shows(explorer, f"lost: {(stored != exact).double().mean():.3%}", f"output from that: {error:.2e}")
    shows(explorer, f"its largest sum is {int(exact.abs().max()):,}")
    assert axes(explorer, 1).lines[-1].get_ydata().tolist() == stored.flatten().tolist()
    if at_the_end == "wraps" and bits in (8, 16):  # what hardware does
        assert torch.equal(torch.tensor(sums).to({8: torch.int8, 16: torch.int16}[bits]).double(), stored)


def test_accumulator_of_zeros():
    layer, x = accumulator()
    shows(ex.explore_accumulator(layer, torch.zeros_like(x), bits=8), "lost: 0.000%")


# --- notebook 08: dynamic or static


def a_layer_shifted(*, scale=1.0, shift=0.0, loud=1):
    """32 tokens and 64 outputs, which the explorer takes as they are; and the live input."""
    random = seeded()
    weight, x = torch.randn(64, 150, generator=random) * 0.05, torch.randn(32, 150, generator=random)
    qp = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
    low, high = (qp.scale * (code - qp.zero_point) for code in (0, 255))
    live = scale * x + shift * (high - low)
    live[0] *= loud
    return weight, x, live


@pytest.mark.parametrize("place", [{}, {"scale": 4.0}, {"scale": 0.125, "shift": 0.3}, {"shift": -0.5, "loud": 16}])
def test_shift_errors_are_those_of_the_layers(place):
    weight, x, live = a_layer_shifted(**place)
    explorer, linear = put(ex.explore_shift(x, weight), **place), data.linear_of(weight)
    layers = (
        StaticInt8Linear.from_linear(linear, MinMax().update(x)),
        DynamicInt8Linear.from_linear(linear),
        DynamicInt8Linear.from_linear(linear, per="token"),
    )
    wanted = [relative(int8.exact(live), linear(live)) for int8 in layers]
    said = explorer.numbers().split("OUTPUT: ")[1]
    assert [float(number) for number in re.findall(r"\d\.\d\de[-+]\d\d", said)] == pytest.approx(wanted, rel=0.01)
    lines, points = axes(explorer, 1).lines[:3], axes(explorer, 1).lines[3:]
    assert [point.get_ydata()[0] for point in points] == pytest.approx(wanted, rel=1e-3)
    at = list(lines[0].get_xdata()).index(place.get("scale", 1.0))
    assert [line.get_ydata()[at] for line in lines] == pytest.approx(wanted, rel=1e-3)
    qp = layers[0].input_qparams(live)
    beyond = (live / qp.scale + qp.zero_point).sub(127.5).abs() > 128
    shows(explorer, f"clipped {beyond.float().mean().item():.2%}")


def test_a_static_grid_suffers_both_ways_and_a_dynamic_one_follows():
    weight, x, _ = a_layer_shifted()
    static, tensor, token = (line.get_ydata() for line in axes(ex.explore_shift(x, weight), 1).lines[:3])
    assert static.argmin() == 8  # where scale is 1
    assert static[0] > 20 * static[8] < static[-1] / 100
    for dynamic in (tensor, token):
        assert max(dynamic) < 1.001 * min(dynamic)


def test_shift_observer_bits_and_first_position():
    weight, x, _ = a_layer_shifted()
    explorer = ex.explore_shift(x, weight, observer=Percentile(percentile=90), bits=4, scale=1.9, shift=0.52, loud=5)
    assert [control.value for control in explorer.controls.values()] == [2.0, 0.5, 4]
    qp = choose_qparams(*Percentile(percentile=90).update(x).min_max(), qmin=0, qmax=15)
    shows(explorer, f"scale {qp.scale.item():.3g}")
    with pytest.raises(ValueError, match="bits must be 2..8, got 9"):
        ex.explore_shift(x, weight, bits=9)


@pytest.mark.parametrize("x", [torch.zeros(5, 4), -torch.ones(1, 4), torch.full((40, 4), 1e-20)])
def test_shift_of_odd_inputs(x):
    explorer = ex.explore_shift(x, torch.ones(3, 4))
    for name, value in {"scale": 16.0, "shift": -1.0, "loud": 64}.items():
        assert "nan" not in put(explorer, **{name: value}).numbers()


# --- notebook 09: outliers


def stretched(planted):
    """layer_and_inputs with channels 3 and 70 ten times as large, and the weight's columns made smaller if planted."""
    weight, x = layer_and_inputs()
    stretch = torch.ones(150).index_fill(0, torch.tensor([3, 70]), 10.0)
    return weight / stretch if planted else weight, x[:256] * stretch


def outlier_layer():
    weight, x = layer_and_inputs()
    return weight, x[:256]


@pytest.mark.parametrize("planted", [True, False])
def test_threshold_numbers_are_the_librarys(planted):
    explorer = ex.explore_threshold(*outlier_layer(), channels=[3, 70])
    put(explorer, factor=10, threshold=5, planted=planted)
    weight, x = stretched(planted)
    linear, wanted = data.linear_of(weight), x @ weight.T
    split = LLMInt8Linear.from_linear(linear, threshold=5.0)
    count = int(split.outlier_columns(x).sum())
    shows(explorer, f"threshold 5: {count} of 150 columns in float ({count / 150:.1%})")
    shows(explorer, f"output error {relative(split.exact(x), wanted):.2e}")
    shows(explorer, f"int8 weights only {relative(x @ split.dequantized_weight().T, wanted):.2e}")
    shows(explorer, f"W8A8 with one scale {relative(DynamicInt8Linear.from_linear(linear).exact(x), wanted):.2e}")
    bits = 8 * (1 - count / 150) + 16 * count / 150 + 32 / 150
    shows(explorer, f"{bits:.2f} an input value", f"{8 + 32 / 150:.3f} a weight")


def test_threshold_shows_the_columns_that_go_to_float():
    explorer = ex.explore_threshold(*layer_and_inputs(), channels=[3, 70], factor=100, threshold=10)
    (dots, line) = explorer.ax.lines
    assert list(dots.get_xdata()) == [3.5, 70.5]
    assert line.get_ydata() == [10, 10]
    put(explorer, threshold=float("inf"))
    assert list(dots.get_xdata()) == []
    shows(explorer, "threshold inf: 0 of 150 columns in float")


@pytest.mark.parametrize(("bits", "of_weight", "of_x"), [("W8A8", 8, 8), ("W4A8", 4, 8), ("W8A4", 8, 4)])
def test_smoothing_numbers_are_the_librarys(bits, of_weight, of_x):
    weight, x = stretched(planted=False)
    explorer = put(ex.explore_smoothing(*outlier_layer(), channels=[3, 70]), factor=10, alpha=0.75, bits=bits)
    s = smoothing_scales(x.abs().amax(0), [data.linear_of(weight)], 0.75)
    q = quantize_tensor(weight * s, bits=of_weight, granularity=PerAxis(0))
    qp = choose_qparams(*torch.aminmax(x / s), qmin=0, qmax=2**of_x - 1)
    error = relative(fake_quantize(x / s, qp) @ q.dequantize().T, x @ weight.T)
    shows(explorer, f"output error {error:.2e}", f"{q.bits_per_element:.2f} true bits per weight")
    if bits == "W8A8":
        plain = relative(DynamicInt8Linear.from_linear(data.linear_of(weight)).exact(x), x @ weight.T)
        shows(explorer, f"not smoothed {plain:.2e}")
    peaks = [part.abs().amax(0) for part in (x, x / s, weight, weight * s)]
    for line, peak in zip(axes(explorer, 2).lines, peaks, strict=True):
        np.testing.assert_allclose(line.get_ydata(), peak.numpy())


def test_smoothing_undoes_what_was_planted_at_any_alpha():
    """s grows by the factor that the inputs grew by and the weights shrank by: the smoothed layer stays the same."""
    explorer = ex.explore_smoothing(*layer_and_inputs(), channels=[3, 70], planted=True)
    for alpha in (0.0, 0.5, 1.0):
        texts = [put(explorer, alpha=alpha, factor=factor).numbers() for factor in (1, 10, 100)]
        assert len({text.split("output error ")[1].split()[0] for text in texts}) == 1


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
        assert "nan" not in put(explore(weight, x, channels=[0]), factor=300).numbers()
    with pytest.raises(ValueError, match="a channel must be 0..7, got 8"):
        explore(torch.zeros(4, 8), torch.zeros(3, 8), channels=[8])


# --- notebook 19: super-blocks


def test_super_blocks_show_the_librarys_numbers():
    weight, x = wide_layer()
    explorer = put(ex.explore_super_blocks(weight, x), block=64, scale=4, offset=False)
    rounded = round_in_superblocks(weight, block_size=64, scale_bits=4, offset=False)
    plain = round_in_superblocks(weight, block_size=64, scale_bits=16, offset=False)
    errors, output = [relative(r.values, weight) for r in (rounded, plain)], Hessian(512).add(x)
    shows(explorer, f"{rounded.bits_per_element:.3f} true bits", f"need {plain.bits_per_element:.3f} bits")
    shows(explorer, f"weight error {errors[0]:.2e} ({errors[0] / errors[1]:.3f} ×")
    shows(explorer, f"output error {output.output_error(weight, rounded.values):.2e}")
    for place, error in enumerate((errors[0], output.output_error(weight, rounded.values))):
        dot = axes(explorer, place).lines[1]
        assert [float(v[0]) for v in dot.get_data()] == pytest.approx([rounded.bits_per_element, error], rel=1e-5)


def test_super_blocks_stand_beside_gptq():
    weight, x = wide_layer()
    line = next(line for line in axes(ex.explore_super_blocks(weight, x), 1).lines if line.get_label() == "GPTQ")
    hessian = Hessian(512).add(x)
    wanted = [gptq_quantize(weight, hessian, bits=4, group_size=n, symmetric=False) for n in (128, 64, 32, 16)]
    assert line.get_xdata() == pytest.approx([q.bits_per_element for q in wanted])
    assert line.get_ydata() == pytest.approx([hessian.output_error(weight, q.dequantize()) for q in wanted])


def test_super_blocks_need_rows_of_256():
    with pytest.raises(ValueError, match="does not go up"):
        ex.explore_super_blocks(torch.ones(4, 96), torch.ones(5, 96))


# --- notebook 10: GPTQ


def test_gptq_numbers_are_the_librarys():
    weight, hessian = layer()
    explorer = put(ex.explore_gptq(weight, hessian), bits=3, group=32, act_order=True)
    q = gptq_quantize(weight, hessian, bits=3, group_size=32, act_order=True)
    nearest = quantize_tensor(weight, bits=3, granularity=PerGroup(32), symmetric=False)
    errors = [hessian.output_error(weight, one.dequantize()) for one in (nearest, q)]
    shows(explorer, f"output error {errors[0]:.2e} → {errors[1]:.2e} (")
    (dots,) = axes(explorer, 1).lines[1:]
    for shown, one in zip(dots.get_data(), (nearest, q), strict=True):
        of_row = [hessian.output_error(w[None], b[None]) for w, b in zip(weight, one.dequantize(), strict=True)]
        assert shown == pytest.approx(of_row, rel=1e-6)


def test_gptq_says_the_true_bits_and_what_the_order_costs():
    weight, hessian = layer()
    explorer = ex.explore_gptq(weight, hessian, bits=3, group_size=32)
    plain, ordered = (
        gptq_quantize(weight, hessian, bits=3, group_size=32, act_order=order).bits_per_element
        for order in (False, True)
    )
    shows(explorer, f"true bits per weight {plain:.2f} → {plain:.2f}")
    shows(put(explorer, act_order=True), f"true bits per weight {plain:.2f} → {ordered:.2f} (the order")


def test_columns_end_at_gptqs_error():
    weight, hessian = layer()
    explorer = put(ex.explore_columns(weight, hessian, bits=3), column=64)
    last = gptq_steps(weight[:24], hessian, bits=3)[-1]
    shows(explorer, f"GPTQ {hessian.output_error(weight[:24].double(), last):.2e}")


@pytest.mark.parametrize(("column", "row"), [(0, 0), (20, 5), (64, 23)])
def test_columns_show_one_row_on_its_grid(column, row):
    weight, hessian = layer()
    explorer = ex.explore_columns(weight, hessian, bits=3, column=column, row=row)
    states = gptq_steps(weight[:24], hessian, bits=3)
    qp = quantize_tensor(weight[:24], bits=3, granularity=PerAxis(0), symmetric=False).qparams
    wanted = [((states[k] / qp.scale) + qp.zero_point)[row].numpy() for k in (0, column)]
    before, now = axes(explorer, 1).lines
    assert np.allclose(before.get_ydata(), wanted[0], atol=1e-4)
    assert np.allclose(now.get_ydata(), wanted[1], atol=1e-4)
    done = np.asarray(now.get_ydata())[:column]
    assert np.allclose(done, done.round(), atol=1e-4)  # on the grid; the lines are its whole numbers
    drift = abs(wanted[1] - wanted[0])[column:]
    shows(explorer, f"moved by {drift.mean() if len(drift) else 0:.3f} steps")


# --- notebook 11: AWQ


def test_scaling_numbers_are_the_librarys():
    layers = scaled_layers()
    explorer = put(ex.explore_scaling(layers, bits=3), layer="loud", alpha=0.45, group=32)
    weight, hessian = layers["loud"]
    search = search_scales([weight], hessian, bits=3, group_size=32)
    scaled = scale_and_round(weight, scales_of(hessian.mean_abs, 0.45), bits=3, group_size=32)
    error = hessian.output_error(weight, scaled.dequantize())
    assert error == pytest.approx(search.errors[9], rel=1e-6)
    shows(explorer, f"output error {error:.2e} ({error / search.errors[0]:.2f} ×)")
    shows(explorer, f"best {min(search.errors):.2e} at alpha {search.alpha:.2f}")
    shows(explorer, f"true bits per weight {scaled.q.bits_per_element:.3f}")
    shows(explorer, f"weight error {relative(scaled.dequantize(), weight):.2e}")
    curve = explorer.ax.lines[0]
    np.testing.assert_allclose(curve.get_ydata(), np.array(search.errors) / search.errors[0], rtol=1e-3)


def test_scaling_parts_are_those_of_rounding_some_channels_only():
    """Loud alone, others alone, and one channel alone, each from a weight in which nothing else was rounded."""
    layers = scaled_layers()
    explorer = put(ex.explore_scaling(layers, alpha=0.3, bits=4, group_size=None), layer="loud")
    weight, hessian = layers["loud"]
    scaled = scale_and_round(weight, scales_of(hessian.mean_abs, 0.3), bits=4, group_size=None)
    plain = scale_and_round(weight, torch.ones(150), bits=4, group_size=None)
    whole = hessian.output_error(weight, plain.dequantize())
    loud = hessian.mean_abs.topk(4).indices

    def alone(columns):
        mixed = weight.clone()
        mixed[:, columns] = scaled.dequantize()[:, columns]
        return hessian.output_error(weight, mixed) / whole

    def drawn(line):
        return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))[hessian.mean_abs.numpy()[140]]

    others = [c for c in range(150) if c not in loud.tolist()]
    _, of_loud, of_others = explorer.ax.lines[:3]
    assert of_loud.get_ydata()[6] == pytest.approx(alone(loud), rel=1e-3)
    assert of_others.get_ydata()[6] == pytest.approx(alone(others), rel=1e-3)
    assert drawn(axes(explorer, 1).lines[1]) == pytest.approx(alone([140]), rel=1e-3)
    ratio = scaled.q.qparams.scale / plain.q.qparams.scale / scaled.input_scale[140]
    weighted = (ratio * plain.q.qparams.scale).mean() / plain.q.qparams.scale.mean()
    assert drawn(axes(explorer, 0).lines[1]) == pytest.approx(weighted.item(), rel=1e-4)


@pytest.mark.parametrize(("width", "groups", "start"), [(150, (0, 128, 32), 128), (96, (0, 32), 0), (32, None, None)])
def test_scaling_offers_only_groups_that_differ(width, groups, start):
    """A group of 128 in rows of 96 is the whole row: as a choice it would change nothing."""
    weight, x = layer_and_inputs()
    layers = {name: (weight[:, :n], Hessian(n).add(x[:, :n])) for name, n in (("wide", 150), ("narrow", width))}
    explorer = ex.explore_scaling(layers, group_size=128)
    control = explorer.controls.get("group")
    assert (control and tuple(value for _, value in control.options)) == groups
    assert (control and control.value) == start
    shown = {put(explorer, layer="narrow", group=group).numbers() for group in groups or ()}
    assert len(shown) == len(groups or ())


def test_scaling_of_odd_layers():
    for weight, x in ((torch.zeros(3, 4), torch.zeros(5, 4)), (torch.ones(1, 1), torch.ones(1, 1))):
        explorer = ex.explore_scaling({"odd": (weight, Hessian(weight.shape[1]).add(x))})
        assert "nan" not in put(explorer, alpha=1.0).numbers()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": {}}, "no layers"),
        ({"layers": {"a": (layer()[0][:, :9], layer()[1])}}, "need a weight"),
        ({"bits": 9}, "bits must be one of 2, 3, 4, 8, got 9"),
        ({"group_size": 7}, "group_size must be one of"),
        ({"alpha": 0.33}, "alpha must be one of"),
    ],
)
def test_scaling_refuses_what_is_not_on_its_sliders(settings, message):
    with pytest.raises(ValueError, match=message):
        ex.explore_scaling(**{"layers": {"a": layer()}} | settings)


# --- notebook 12: mixed precision


@pytest.mark.parametrize(("rule", "allocate"), [("exact", knapsack), ("greedy", greedy)])
def test_budget_numbers_and_picture_are_the_librarys(rule, allocate):
    given = sensitivity()
    explorer = ex.explore_budget(given, steps=30)
    kinds = "attn.q_proj", "attn.v_proj", "mlp.up_proj"
    for place in (0, 7, 18, 29):
        put(explorer, budget=place, rule=rule)
        budget = int(re.search(r"budget ([\d,]+) bytes", explorer.numbers())[1].replace(",", ""))
        found = allocate(given.costs, given.sizes, budget)
        used = 8 * found.nbytes / sum(given.weights.values())
        shows(explorer, f"used {found.nbytes:,}: {used:.2f} bits a weight")
        assert f"predicted KL {found.kl:.3g} " in explorer.numbers() + " "
        wanted = [[found.bits[f"model.layers.{i}.{kind}"] for i in range(3)] for kind in kinds]
        assert np.array_equal(explorer.ax.images[0].get_array(), wanted)
        assert [text.get_text() for text in explorer.ax.texts] == [str(found.bits[name]) for name in given.costs]


def test_chance_deals_the_same_bits_anew_among_layers_of_one_size():
    explorer = put(ex.explore_budget(sensitivity(blocks=6)), rule="exact")
    exact, text = explorer.ax.images[0].get_array().copy(), explorer.numbers()
    dealt = put(explorer, rule="by chance").ax.images[0].get_array()
    assert not np.array_equal(dealt, exact)
    assert sorted(dealt[:2].flatten()) == sorted(exact[:2].flatten())
    assert sorted(dealt[2]) == sorted(exact[2])
    assert text.split("   ")[0] == explorer.numbers().split("   ")[0]  # the same bytes
    assert float(re.search(r"([\d.]+) × the exact", explorer.numbers())[1]) > 1.05


def test_budget_starts_where_it_is_asked_to_and_counts_uniform_bits():
    given = sensitivity()
    everywhere = sum(row[4] for row in given.sizes.values())
    explorer = ex.explore_budget(given, steps=5, budget=everywhere)
    shows(explorer, f"budget {everywhere:,} bytes, used {everywhere:,}")
    same = float(re.search(r"everywhere about ([\d.e-]+)", explorer.numbers())[1])
    assert same == pytest.approx(sum(row[4] for row in given.costs.values()), rel=0.01)
    shows(ex.explore_budget(given, steps=5, budget=everywhere + 12345), f"budget {everywhere + 12345:,} bytes")


def test_budget_of_many_blocks_has_no_digits():
    explorer = ex.explore_budget(sensitivity(blocks=30), steps=5)
    assert len(explorer.ax.texts) == 0
    assert explorer.ax.images[0].get_array().shape == (3, 30)


# --- notebook 22: the capstone


def test_capstone_shows_every_byte_and_the_sum_of_the_costs():
    plans, limit = planned(), 60_000
    explorer = ex.explore_capstone(plans, limit, references={"a": (50_000, 0.2)}, bits=3)
    for method, group, bits in (("nearest", 32, (3, 3, 3)), ("GPTQ", 64, (4, 2, 3)), ("nearest", 64, (2, 4, 4))):
        chosen = dict(zip(("embedding", "attention", "MLP"), bits, strict=True))
        put(explorer, method=method, group=group, **chosen)
        codes = [plans.codes[part, b] for part, b in chosen.items()]
        sides = sum(plans.sides[group, part, b] for part, b in chosen.items())
        size, kl = sum(codes) + sides + 1200, sum(plans.costs[method, group, part, b] for part, b in chosen.items())
        assert plans.nbytes(group, chosen) == size
        left = f"{limit - size:,} left" if size <= limit else f"{size - limit:,} OVER"
        shows(explorer, f"{size:,} bytes of 60,000: {left}", f"predicted KL {kl:.4f}", f"scales {sides:,}")
        bars = [bar.get_height() for bar in explorer.ax.patches]
        assert bars == pytest.approx([count / 1e6 for count in (*codes, sides, 500, 700)])
        assert explorer.ax.patches[-1].get_y() + bars[-1] == pytest.approx(size / 1e6)
        ring = axes(explorer, 1).lines[-1]
        assert (ring.get_xdata()[0], ring.get_ydata()[0]) == pytest.approx((size / 1e6, kl))
    with pytest.raises(ValueError, match="bits must be one of 2, 3, 4, got 5"):
        ex.explore_capstone(plans, limit, bits=5)


# --- notebook 13: training


@pytest.mark.parametrize(("step", "row"), [(0, 0), (7, 2), (12, 1)])
def test_training_shows_the_weights_on_their_grid(step, row):
    weights, losses = walk()
    explorer = ex.explore_training(weights, losses, bits=2, group_size=48, step=step, row=row)
    now, first = (quantize_tensor(weights[k], bits=2, granularity=PerGroup(48), symmetric=False) for k in (step, 0))
    multiples = [q.codes - q.element_qparams().zero_point for q in (now, first)]
    place = weights[step] / now.element_qparams().scale
    elsewhere = multiples[0] != multiples[1]
    shows(explorer, f"first: {100 * elsewhere.double().mean():.1f} % of the weights")
    shows(explorer, f"{elsewhere[row].double().mean():.0%} of row {row}")
    shows(explorer, f"distance from the grid: {(place - multiples[0]).abs().mean():.3f} steps")
    shows(explorer, f"loss {losses[min(step, 11)]:.3f} (at first 3.000)")
    shows(explorer, "2.71 true bits")  # 2 + (32 + 2) / 48; zero points packed over all 13 snapshots
    stay, moved, _ = explorer.ax.lines
    for dots, which in ((stay, ~elsewhere), (moved, elsewhere)):
        of_row = place[row][which[row]]
        assert all(np.isclose(of_row, y, atol=1e-4).any() for y in dots.get_ydata())
    assert len(stay.get_ydata()) + len(moved.get_ydata()) == 16


def test_training_counts_what_is_rounded_elsewhere_and_not_what_a_zero_point_moves():
    """The grid of a group moves down by one code with its lowest weight: codes change, multiples of 0 do not."""
    weights = torch.tensor([[[-1.0, 0.0, 0.1, 1.0, 2.0]], [[-2.0, 0.0, 0.1, 1.0, 1.0]]])
    codes = quantize_tensor(weights, bits=2, granularity=PerGroup(5), symmetric=False).codes
    assert (codes[0] != codes[1]).tolist() == [[False, True, True, True, False]]
    explorer = ex.explore_training(weights, [1.0], bits=2, group_size=5, step=1)
    shows(explorer, "elsewhere than at first: 40.0 % of the weights, 40% of row 0")


@pytest.mark.parametrize(
    ("weights", "losses", "message"),
    [
        (torch.zeros(3, 4), [1.0, 1.0], "need weights"),
        (torch.zeros(3, 2, 4), [1.0], "need weights"),
        (torch.zeros(1, 2, 4), [], "need weights"),
        (torch.full((2, 2, 4), NAN), [1.0], "finite"),
    ],
)
def test_training_refuses_what_is_no_run(weights, losses, message):
    with pytest.raises(ValueError, match=message):
        ex.explore_training(weights, losses, bits=2)


# --- notebook 14: the step


def step_layer():
    weight, x = layer_and_inputs()
    wanted = F.linear(x, weight)
    return weight, lambda q: (F.linear(x, q) - wanted).square().sum() / wanted.square().sum()


def lsq_at(weight, bits, factor):
    """LSQ whose steps are `factor` times mean |w|; it starts at 2 mean |w| / sqrt(qmax)."""
    lsq = LSQ(weight, bits=bits, granularity=PerGroup(50))
    lsq.step.data.mul_(factor * lsq.qmax**0.5 / 2)
    return lsq


@pytest.fixture(scope="module")
def steps():
    return ex.explore_step(*layer_and_inputs(), group_size=50)


def move_to(explorer, bits, index, loss="output"):
    """Set all controls; returns the step in units of mean |w|."""
    put(explorer, bits=bits, step=index, loss=loss)
    return float(np.geomspace(0.02, 6, 49)[index])


@pytest.mark.parametrize(("bits", "index"), [("2", 20), ("2", 41), ("3", 33), ("5", 38)])
def test_step_errors_and_pull_are_those_of_lsq_on_the_same_grid(steps, bits, index):
    weight, output_error = step_layer()
    lsq = lsq_at(weight, int(bits), move_to(steps, bits, index))
    rounded = lsq(weight)
    error = output_error(rounded)
    (slope,) = torch.autograd.grad(error, lsq.step)
    pull = (slope / lsq.gradient_scale * lsq.step).sum()
    shows(steps, f"weight error {relative(rounded, weight):.2e}, output error {error.item():.2e}")
    shows(steps, f"output error pulls the step {'down' if pull > 0 else 'up'},")
    shows(steps, f"{lsq.quantized(weight).bits_per_element:.2f} true bits")
    ratio = weight.view(-1, 50) / lsq.step
    clipped = ((ratio <= lsq.qmin) | (ratio >= lsq.qmax)).float().mean().item()
    shows(steps, f"clipped {clipped:.1%}, rounded to 0 {(rounded == 0).float().mean().item():.1%}")


@pytest.mark.parametrize("bits", [2, 4])
def test_step_says_where_lsqs_gradient_turns(steps, bits):
    weight, output_error = step_layer()
    factors, pulls = np.geomspace(0.02, 6, 49), []
    for factor in factors.tolist():
        lsq = lsq_at(weight, bits, factor)
        (slope,) = torch.autograd.grad(output_error(lsq(weight)), lsq.step)
        pulls.append((slope * lsq.step).sum().item())  # the same factor of scale for all groups
    turn = next(i for i in range(48) if pulls[i] < 0 <= pulls[i + 1])
    turn += abs(pulls[turn + 1]) < abs(pulls[turn])
    move_to(steps, str(bits), turn)
    here = re.search(r"output error (\S+)", steps.numbers())[1]
    shows(steps, f"until {factors[turn]:.2g} (error {here})")


def test_three_and_two_values_start_at_the_librarys_scale_and_two_end_there(steps):
    weight, output_error = step_layer()
    for bits, rounding in (("1.58", ternary), ("1", binary)):
        move_to(steps, bits, 33)
        found = float(re.search(r"at the start \(1\) (\S+)", steps.numbers())[1])
        error = output_error(rounding(weight, granularity=PerGroup(50))).item()
        assert found == pytest.approx(error, rel=0.05)  # read off between two steps of the slider
    move_to(steps, "1", 33, "weight")
    shows(steps, "until 1 (", "rounded to 0 0.0%")  # of two values mean |w| has the least error


@pytest.mark.parametrize(("bits", "levels"), [("1.58", (-1, 0, 1)), ("1", (-1, 1))])
def test_three_and_two_values_are_drawn_at_multiples_of_the_step(steps, bits, levels):
    factor = move_to(steps, bits, 30)
    stems = axes(steps, 0).collections[0].get_segments()
    assert [stem[0][0] for stem in stems] == pytest.approx([factor * level for level in levels])
    width = 2 * factor if bits == "1" else factor
    assert sum(stem[1][1] for stem in stems) * width == pytest.approx(1)


def test_five_ternary_codes_are_counted_to_a_byte(steps):
    move_to(steps, "1.58", 33)
    nbytes = pack_ternary(torch.zeros(40 * 150, dtype=torch.int8)).nbytes + 4 * 40 * 3
    shows(steps, f"{8 * nbytes / (40 * 150):.2f} true bits")


def test_step_refuses_a_group_that_is_left_over():
    with pytest.raises(ValueError, match="must divide the 100 inputs, got 128"):
        ex.explore_step(torch.ones(4, 100), torch.ones(5, 100))


# --- notebook 15: ranks


@pytest.mark.parametrize("rank", [1, 4])
def test_rank_shows_the_singular_values_of_the_update(rank):
    rows = ranks()
    explorer = put(ex.explore_rank(rows, rank=rank), layer="v_proj")
    a, b = next(row for row in rows if row["rank"] == rank)["updates"]["v_proj"]
    expected = torch.linalg.svdvals(b @ a)[:rank].numpy()
    shown = [segment[1][1] for segment in explorer.ax.collections[0].get_segments()]
    assert np.allclose(shown, expected, rtol=1e-4)
    energy = np.cumsum(expected**2) / (expected**2).sum()
    shows(explorer, f"holds {energy[0]:.0%} of its square, {(energy < 0.9).sum() + 1} of {rank} hold 90%")
    shows(explorer, f"rank {rank}: {56 * rank:,} trained numbers", f"it writes: day {rank}")


def test_rank_0_is_no_update_and_bad_results_are_refused():
    explorer = ex.explore_rank(ranks(), rank=0)
    shows(explorer, "no update")
    assert len(explorer.ax.collections[0].get_segments()) == 0
    for rows in ([], [*ranks(), *ranks()], ranks()[:1] + [ranks()[1] | {"updates": {}}]):
        with pytest.raises(ValueError, match="need one result for each rank"):
            ex.explore_rank(rows)


# --- the cache of keys and values -------------------------------------------------------------------------------


def rounded_by_loops(x, bits, per):
    """Chunks of 32 tokens: each channel's range, or each token's over its channels."""
    out = x.clone()
    for start in range(0, len(x), 32):
        chunk = x[start : start + 32]
        for i in range(chunk.shape[per == "channel"]):
            line = chunk[:, i] if per == "channel" else chunk[i]
            step = (line.max() - line.min()) / (2**bits - 1)
            new = line.min() + step * torch.round((line - line.min()) / step)
            out[start : start + 32][(slice(None), i) if per == "channel" else i] = new
    return out


@pytest.mark.parametrize("per", ["channel", "token"])
def test_kv_shows_the_numbers_and_their_errors(per):
    keys, values_, _ = head()
    for what, x in (("keys", keys[:64]), ("values", values_[:64])):  # whole chunks
        explorer = put(ex.explore_kv(keys, values_), what=what, per=per, bits=3)
        wanted = rounded_by_loops(x, 3, per)
        numbers, error = (explorer.ax.figure.axes[i].images[0].get_array() for i in (0, 1))
        np.testing.assert_allclose(numbers, x / x.abs().max(), atol=1e-6)
        size = ((wanted - x) / x.abs().max()).abs()  # ranges are float16 there, so a tie may go the other way
        np.testing.assert_allclose(np.abs(error), size, atol=5e-3)
        shows(explorer, f"{relative(wanted, x):.2%}"[:3], f"{3 + (1 if per == 'channel' else 32 / 24):.2f} true bits")


def test_cache_shows_the_attention_of_rounded_keys():
    keys, _, query = head()
    explorer = put(ex.explore_cache(query, keys, caches(), recent=8), **{"key bits": 2, "first in float": 4})
    stored = torch.cat([keys[:4], rounded_by_loops(keys[4:68], 2, "channel"), keys[68:]])
    lines = {line.get_label(): torch.as_tensor(line.get_ydata()) for line in explorer.ax.lines}
    attention = [(k @ query / 24**0.5).softmax(0) for k in (keys, stored)]
    torch.testing.assert_close(lines["in float"], attention[0])
    torch.testing.assert_close(lines["keys in few bits"], attention[1], rtol=0.1, atol=1e-3)
    moved = (attention[1] - attention[0]).abs().sum().item() / 2
    told = float(re.search(r"([\d.]+)% of this row", explorer.numbers())[1]) / 100
    assert told == pytest.approx(moved, abs=0.01)


def test_cache_shows_the_measured_kl():
    kl = caches()
    explorer = put(ex.explore_cache(head()[2], head()[0], kl), **{"key bits": 4, "value bits": 2, "first in float": 4})
    shows(explorer, f"KL {kl[4, 2, 4]:.4f}")
    table = axes(explorer, 1).images[0].get_array()
    np.testing.assert_allclose(table, [[kl[k, v, 4] for v in (8, 4, 2)] for k in (8, 4, 2)])
    ring = axes(explorer, 1).lines[-1]
    assert [v[0] for v in ring.get_data()] == [2, 1]


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="at least 32 tokens"):
        ex.explore_kv(*(x[:31] for x in head()[:2]))


# --- activations ------------------------------------------------------------------------------------------------


def test_who_is_loud_is_said_and_8_bits_are_the_librarys():
    layers = loud_layers()
    explorer = ex.explore_activations(layers)
    for name, (weight, x) in layers.items():
        put(explorer, layer=name)
        loud, y = ex.loudness(x), x @ weight.T
        qp = choose_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), qmin=0, qmax=255)
        error = ((fake_quantize(x, qp) @ weight.T - y).square().sum() / y.square().sum()).item()
        shows(explorer, f"at token {loud.token}, channel {loud.channel}", f"a scale a token {error:.1e}")
    channel, token = (ex.loudness(x) for _, x in layers.values())
    assert channel.channel == 7
    assert channel.of_channels > 10 * channel.of_tokens
    assert token.token == 0
    assert token.of_tokens > 5 * ex.loudness(layer_and_inputs()[1]).of_tokens


def test_a_map_keeps_the_largest_value_of_each_field():
    layers = loud_layers()
    explorer = ex.explore_activations(layers)
    for name, (_, x) in layers.items():
        put(explorer, layer=name)
        shown = explorer.ax.images[0].get_array()
        assert shown.max() == pytest.approx(x.abs().max().item())
        assert shown.shape == (64, 96)


def test_no_layers_to_explore_are_named():
    with pytest.raises(ValueError, match="layers is empty"):
        ex.explore_activations({})
# --- notebook 17: rotations


@pytest.mark.parametrize(("angle", "bits"), [(0, 4), (45, 4), (-30, 3), (90, 6)])
def test_angle_numbers_are_a_turn_and_its_rounding(angle, bits):
    explorer = put(ex.explore_angle(10.0, 0.6), angle=angle, bits=bits)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    turned = torch.tensor([[10 * c - 0.6 * s, 10 * s + 0.6 * c]], dtype=torch.float64)
    shows(explorer, f"turned by {angle} degrees: ({turned[0, 0]:.2f}, {turned[0, 1]:.2f})")
    shows(explorer, f"relative error {rounding_error(turned, bits=bits):.2e}")
    shows(explorer, f"largest over length {turned.abs().max() / turned.norm():.3f}")


def test_angle_refuses_a_point_that_cannot_turn():
    with pytest.raises(ValueError, match="must not both be 0"):
        ex.explore_angle(0, 0)
    with pytest.raises(ValueError, match="x must be a finite number"):
        ex.explore_angle(NAN, 1)


@pytest.mark.parametrize(("block", "bits"), [(1, 4), (12, 4), (32, 3), (96, 8)])
def test_block_numbers_are_those_of_the_matrix(block, bits):
    x = loud_inputs()
    explorer = put(ex.explore_blocks(x), block=block, bits=bits)
    turned = (x.unflatten(1, (-1, block)) @ hadamard(block)).flatten(1)
    shows(explorer, f"{rounding_error(x, bits=bits):.2e} -> {rounding_error(turned, bits=bits):.2e}")
    uneven = [(y.abs().amax(1) / y.square().mean(1).sqrt()).mean().item() for y in (x, turned)]
    shows(explorer, f"on average {uneven[0]:.1f} -> {uneven[1]:.1f}")
    np.testing.assert_allclose(axes(explorer, 2).lines[1].get_ydata(), turned.abs().amax(0).numpy(), rtol=1e-4)


def test_blocks_are_divisors_that_have_a_hadamard_matrix():
    assert block_sizes(96) == [1, 2, 4, 8, 12, 16, 24, 32, 48, 96]
    assert block_sizes(576) == [1, 2, 4, 8, 12, 16, 24, 32, 36, 48, 64, 72, 96, 144, 192, 288, 576]
    assert block_sizes(30) == [1, 2]
    assert 52 not in block_sizes(104)  # no construction known here gives 52
    with pytest.raises(ValueError, match=r"x must be \(tokens, channels\), got \(8,\)"):
        ex.explore_blocks(torch.ones(8))


def test_blocks_of_silent_inputs_have_numbers():
    assert "nan" not in put(ex.explore_blocks(torch.zeros(3, 8)), block=4).numbers()
