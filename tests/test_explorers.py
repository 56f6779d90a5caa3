"""Explorers driven without a browser: setting .value is what the front end's message does."""

import base64
import io
import threading
import time

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from quantlab import Hessian, choose_qparams, fake_quantize, gptq_quantize, mse
from quantlab import explorers as ex
from quantlab.gptq import gptq_steps
from quantlab.lm import DATA, generate, load_lm


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


EXPLORERS = {
    "affine": lambda: ex.explore_affine(values()),
    "clipping": lambda: ex.explore_clipping(values()),
    "gptq": lambda: ex.explore_gptq(*layer()),
    "columns": lambda: ex.explore_columns(*layer()),
    "bits": lambda: ex.explore_bits(results()),
    "temperature": temperature,
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
