"""How soon the picture under a slider follows a key or the mouse: quantlab's explorer against interact, and against the
least that browser and kernel need: a slider whose picture is one ready square.

Both draw the same picture of the same values, in the same JupyterLab and browser. A time ends with the first
animation frame that finds the new picture loaded; it may reach the glass 16 ms later, in both cases.
With --busy all cores but one are kept busy meanwhile, for both alike.
Each press to the right shows a state for the first time; those back to the left, and the drag, meet states whose
pictures quantlab has kept, as a reader's do.

For explore_affine and explore_clipping the rival is what a notebook would hold: a function that draws, under
interact. For the others it is the explorer's own figure, with all that was computed before the slider moved, copied
and drawn in full.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import labs

PACE = 0.25  # seconds between presses that do not wait for the picture
# The bar, in ms: the median of a press may take 1.5 times an empty round trip of browser and kernel, and 20 ms to draw;
# the 95th percentile twice that.
ROUND_TRIPS, DRAWING = 1.5, 20
QUIET = 0.3  # seconds without a new picture, a move or work of the kernel, after which no more is expected

# The cells of the notebooks. x has as many values as an explorer looks at, and draw() draws what it shows.
DATA = """\
import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from functools import cache
from quantlab import choose_qparams, fake_quantize, split_error, sqnr_db
from quantlab.explorers import clipping_curves, explore_affine, explore_clipping

torch.manual_seed(0)
weight = torch.distributions.StudentT(4.0).sample((100_000,)) * 0.02
x = weight[torch.linspace(0, len(weight) - 1, 20_000).long()]
reach = x.abs().max().item()
"""
AFFINE = """\
line = torch.linspace(-1.6 * reach, 1.6 * reach, 1500)

def draw(bits, low, high, symmetric):
    qp = choose_qparams(torch.tensor(low * reach), torch.tensor(high * reach), qmin=0, qmax=2**bits - 1,
                        symmetric=symmetric)
    points, half = qp.scale * (torch.arange(2**bits) - qp.zero_point), qp.scale.item() / 2
    fig, (top, bottom) = plt.subplots(2, sharex=True, figsize=(8.4, 4.2), dpi=100, height_ratios=[3, 2])
    counts, edges = np.histogram(x.numpy(), bins=160)
    top.stairs(counts, edges, fill=True, color="0.6")
    top.set(ylabel="weights", xlim=(-1.6 * reach, 1.6 * reach), ylim=(0, 1.15 * counts.max()))
    top.vlines(points, 0, 1, linewidth=1.0, transform=top.get_xaxis_transform())
    top.plot([0], [0], "^", markersize=9, clip_on=False)
    bottom.plot(line, fake_quantize(line, qp) - line, linewidth=1.2)
    bottom.hlines([-half, half], -1.6 * reach, 1.6 * reach, colors="0.4", linestyles="dashed", linewidth=0.8)
    bottom.set(xlabel="real value", ylabel="error", ylim=(-0.6 * reach, 0.6 * reach))
    fig.subplots_adjust(left=0.09, right=0.98, top=0.97, bottom=0.12, hspace=0.08)
    plt.show()
    split = split_error(x, qp)
    print(f"scale {half * 2:.4g}   zero point {qp.zero_point.item()}   mean squared error {sum(split):.2e}   "
          f"signal to noise {sqnr_db(x, fake_quantize(x, qp)):.1f} dB")

bits = widgets.IntSlider(4, min=1, max=8)
low = widgets.FloatSlider(-0.8, min=-1.5, max=0.0, step=0.01, description="min")
high = widgets.FloatSlider(x.max().item() / reach, min=0.0, max=1.5, step=0.01, description="max")
"""
CLIPPING = """\
clips = np.round(np.arange(0.05, 1.001, 0.05), 2)
curves = cache(lambda bits: np.array(clipping_curves(x, bits, clips)))
sizes = [error for bits in (2, 8) for error in curves(bits).sum(1)]

def draw(bits, clip):
    half = 2 ** (bits - 1)
    qp = choose_qparams(torch.tensor(-clip * reach), torch.tensor(clip * reach), qmin=-half, qmax=half - 1,
                        symmetric=True)
    errors, split = curves(bits), split_error(x, qp)
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.4), dpi=100)
    left.hist(x.numpy(), bins=160, log=True, color="0.6")
    left.set(xlabel="value", ylabel="count (log)", title="grid over the values")
    points = qp.scale * torch.arange(-half, half)
    left.vlines(points, 0, 1, linewidth=0.7, transform=left.get_xaxis_transform())
    for sign in (-1, 1):
        left.axvspan(sign * min(clip, 1) * reach, sign * reach, color="C3", alpha=0.35)
    right.plot(clips, errors[:, 0], label="rounding")
    right.plot(clips, np.maximum(errors[:, 1], 1e-30), linestyle="--", label="clipping")
    right.plot(clips, errors.sum(1), color="black", linewidth=2, label="sum")
    right.plot([clip], [sum(split)], "o", markersize=9)
    right.set(xlabel="clip (fraction of the largest)", ylabel="mean squared error", yscale="log",
              ylim=(min(sizes) / 3, max(sizes) * 3), title="error")
    right.legend(loc="upper center", ncols=3, fontsize="small")
    fig.subplots_adjust(left=0.09, right=0.98, top=0.9, bottom=0.16, wspace=0.28)
    plt.show()
    print(f"scale {qp.scale.item():.4g}   rounding {split.rounding:.2e}   clipping {split.clipping:.2e}")

bits = widgets.IntSlider(4, min=2, max=8)
clip = widgets.FloatSlider(0.4, min=0.05, max=1.0, step=0.01, description="clip")
"""
# As little as can be done for a slider: a small picture is chosen, and nothing is drawn.
EMPTY = """\
import io
import ipywidgets as widgets
from PIL import Image

slider, image = widgets.IntSlider(0, max=24, description="empty"), widgets.Image(format="png")

def square(gray):
    file = io.BytesIO()
    Image.new("L", (8, 8), gray).save(file, "png")
    return file.getvalue()

squares = [square(10 * i) for i in range(25)]

def choose(_=None):
    image.value = squares[slider.value]

slider.observe(choose, "value")
choose()
"""
NOTEBOOKS = {
    "affine": {
        "interact": [DATA + AFFINE, "widgets.interact(draw, bits=bits, low=low, high=high, symmetric=False);"],
        "quantlab": [DATA + 'e = explore_affine(weight)\ne.controls["low"].value = -0.8', "e"],
    },
    "clipping": {
        "interact": [DATA + CLIPPING, "widgets.interact(draw, bits=bits, clip=clip);"],
        "quantlab": [
            DATA + 'e = explore_clipping(weight)\ne.controls["clip"].step = 0.01\ne.controls["clip"].value = 0.4',
            "e",
        ],
    },
}
MODEL = """\
import ipywidgets as widgets
import pickle
from IPython.display import display
import torch
from quantlab import Hessian
from quantlab.explorers import *
from quantlab.explorers.base import Canvas
from quantlab.train.loop import finetune
from quantlab.lm import *
from quantlab.mixed import sensitivity
from quantlab.qat import prepare_qat

model, tokenizer = load_lm()
name = "model.layers.1.mlp.down_proj"
weight = weight_of(linear_layers(model)[name])
tokens = token_stream(tokenizer, load_text("calibration"))[:2048]
x = capture_inputs(model, tokens, [name])[name]
"""
# The rival of the explorers below. The explorer moves its artists, then a fresh copy of its figure is drawn in full, as
# matplotlib does for every figure that a notebook shows. (A copy is made faster than a figure that is plotted anew.)
IN_FULL = """
Canvas.png = lambda canvas, state: b""  # it draws nothing by itself
for artist in e.ax.figure.findobj():
    artist.set_animated(False)

def draw(**values):
    display(pickle.loads(pickle.dumps(e.ax.figure)))
"""
TRAINING = """
new, walk = prepare_qat(model, bits=2, layers=[name]), []
kept = lambda: walk.append(new.get_submodule(name).weight[:4].detach().clone())
kept()
history = finetune(new, tokens, steps=24, window=64, batch=2, on_step=lambda *_: kept(), progress=False)
e = explore_training(torch.stack(walk), history.losses, bits=2)
"""
CACHE = """
kl = {(keys, values, first): (4.0**-keys + 4.0**-values) / (1 + first)
      for keys in (16, 8, 6, 5, 4, 3, 2) for values in (16, 8, 6, 5, 4, 3, 2) for first in (0, 4)}
e = explore_cache(x[500, :64], x[:500, :64], kl)
e.controls["key bits"].index = 0
"""
EXPLORERS = {
    "calibration": 'e = explore_calibration(x, weight=weight, bits=4)\ne.controls["clip"].index = 5',
    "groups": 'e = explore_groups(weight, x)\ne.controls["group"].index = 0',
    "codebook": 'e = explore_codebook(weight, x)\ne.controls["block"].index = 0',
    "shift": 'e = explore_shift(x, weight)\ne.controls["scale"].index = 0',
    "threshold": 'e = explore_threshold(weight, x, channels=range(0, 240, 40))\ne.controls["threshold"].index = 0',
    "smoothing": 'e = explore_smoothing(weight, x, channels=range(0, 240, 40))\ne.controls["alpha"].index = 0',
    "float_format": 'e = explore_float_format(weight, inputs=x)\ne.controls["mantissa"].value = 0',
    "columns": "e = explore_columns(weight[:, :48], Hessian(48).add(x[:, :48]))",
    "scaling": "e = explore_scaling({name: (weight, Hessian(768).add(x))})",
    "budget": 'e = explore_budget(sensitivity(model, tokens[:512], progress=False))\ne.controls["budget"].index = 5',
    "training": TRAINING,
    "step": 'e = explore_step(weight, x)\ne.controls["step"].index = 5',
    "blocks": "e = explore_blocks(x)",
    "kv": "e = explore_kv(x[:192, :64], x[:192, 64:128])",
    "cache": CACHE,
}
SHOW = "display(widgets.VBox([*e.controls.values(), widgets.interactive_output(draw, e.controls)]))"
NOTEBOOKS |= {
    key: {"interact": ["%matplotlib inline\n" + MODEL + make + IN_FULL, SHOW], "quantlab": [MODEL + make, "e"]}
    for key, make in EXPLORERS.items()
}
# The slider that is moved, by its label, and how often: each step gives another picture.
SLIDER = {
    "affine": ("min", 24),
    "clipping": ("clip", 24),
    "calibration": ("clip", 24),
    "groups": ("group", 6),
    "codebook": ("block", 6),
    "shift": ("scale", 12),
    "threshold": ("threshold", 10),
    "smoothing": ("alpha", 12),
    "float_format": ("mantissa bits", 8),
    "columns": ("columns done", 12),
    "scaling": ("alpha", 12),
    "budget": ("budget", 12),
    "training": ("training step", 12),
    "step": ("step / mean |w|", 12),
    "blocks": ("block", 12),
    "kv": ("bits", 6),
    "cache": ("key bits", 6),
}

# In the page: the time of each key press and mouse move, and of the first frame of each picture. An img that
# loads its next picture still shows the last one (Chromium's screencast agrees), so it does not count as blank.
PICTURES = ".jp-OutputArea-output img"
PROBE = f"""() => {{
    const hash = {labs.HASH}, idle = {labs.IDLE};
    const probe = window.probe = {{events: [], pictures: [], blank: 0, busy: 0}};
    for (const name of ['keydown', 'pointermove'])
        document.addEventListener(name, event => probe.events.push(event.timeStamp), true);
    let address = null, painted = null;
    const look = () => {{
        const img = [...document.querySelectorAll('{PICTURES}')].at(-1), now = performance.now();
        const loaded = img?.complete && img.naturalWidth > 0;
        if (!loaded && (img !== painted || img.complete)) probe.blank += 1;
        const atRest = loaded && img.naturalWidth > 1.5 * img.clientWidth;  // the same picture, finer: no answer
        if (loaded && img.src !== address && !atRest) probe.pictures.push([now, hash(img.src)]);
        if (loaded) [address, painted] = [img.src, img];
        if (!idle()) probe.busy = now;
        requestAnimationFrame(look);
    }};
    look();
}}"""
FORGET = "() => { probe.events = []; probe.pictures = []; }"
IS_QUIET = """ms => {
    const last = [probe.busy, probe.pictures.at(-1)?.[0] ?? 0, probe.events.at(-1) ?? 0];
    return performance.now() - Math.max(...last) > ms;
}"""
READ = """async () => {
    const pictures = await Promise.all(probe.pictures.map(async ([at, hash]) => [at, await hash]));
    return {...probe, pictures};
}"""


@dataclass
class Measured:
    """What one notebook gave, or several. Times in ms."""

    latencies: list[float]  # from each press to the picture that it ended in
    shown: int  # of the presses that did not wait, how many had their picture on the screen
    blank: int  # frames without a picture
    still: float  # from the last move of the mouse to the last new picture
    right: bool  # the picture after the drag is that of the value on which the mouse stopped


def measure(notebook: labs.Notebook, label: str, presses: int) -> Measured:
    """Presses one by one, as many back without waiting, then two seconds of dragging back to the same place."""
    slider = notebook.page.locator(".widget-slider", has_text=label)
    slider.evaluate("slider => slider.scrollIntoView()")
    notebook.page.locator(PICTURES).last.evaluate("img => img.decode()")
    notebook.page.evaluate(PROBE)
    slider.locator(".noUi-handle").focus()
    notebook.page.keyboard.press("ArrowRight")
    once_quiet(notebook)
    notebook.page.keyboard.press("ArrowLeft")  # the first value as it is while the slider moves
    steps, latencies = [once_quiet(notebook)["pictures"][-1][1]], []
    for _ in range(presses):
        milliseconds, picture = press_and_wait(notebook)
        latencies.append(milliseconds)
        steps.append(picture)
    if len(set(steps)) < len(steps):
        raise RuntimeError("two values of the slider have the same picture, so steps cannot be told apart")
    shown = press_at_pace(notebook, steps[:-1])
    seen = drag(notebook, slider)
    still, last = seen["pictures"][-1]
    return Measured(latencies, shown, seen["blank"], still - seen["events"][-1], last == steps[0])


def press_and_wait(notebook: labs.Notebook) -> tuple[float, str]:
    """One press to the right: the time to the picture in which it ends, and that picture."""
    notebook.page.evaluate(FORGET)
    notebook.page.keyboard.press("ArrowRight")
    notebook.page.wait_for_function("() => probe.pictures.length")
    seen = once_quiet(notebook)
    final = seen["pictures"][-1][1]
    return next(at for at, picture in seen["pictures"] if picture == final) - seen["events"][0], final


def press_at_pace(notebook: labs.Notebook, expected: list[str]) -> int:
    """A press to the left for each expected picture, one every PACE seconds: how many of them were on the screen."""
    notebook.page.evaluate(FORGET)
    start = time.perf_counter()
    for press in range(len(expected)):
        notebook.page.keyboard.press("ArrowLeft")
        time.sleep(max(0, start + (press + 1) * PACE - time.perf_counter()))
    return len(set(expected) & {picture for _, picture in once_quiet(notebook)["pictures"]})


def drag(notebook: labs.Notebook, slider) -> dict:
    """60 moves a second for 2 s, right, left, and back to where the mouse was; what the probe has seen."""
    handle, track = (slider.locator(f".noUi-{part}").bounding_box() for part in ("handle", "target"))
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    mouse = notebook.page.mouse
    mouse.move(x, y)
    mouse.down()
    notebook.page.evaluate(FORGET)
    start = time.perf_counter()
    for move in range(1, 121):
        mouse.move(x + 0.3 * track["width"] * math.sin(2 * math.pi * move / 120), y)
        time.sleep(max(0, start + move / 60 - time.perf_counter()))
    seen = once_quiet(notebook)
    mouse.up()
    return seen


def once_quiet(notebook: labs.Notebook) -> dict:
    """What the probe has seen, once nothing more is to come."""
    notebook.page.wait_for_function(IS_QUIET, arg=1000 * QUIET)
    return notebook.page.evaluate(READ)


def write_notebook(path: Path, cells: list[str]) -> None:
    empty = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    content = {
        "nbformat": 4,
        "nbformat_minor": 4,
        "metadata": kernel,
        "cells": [empty | {"source": source} for source in cells],
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def measure_all(explorer: str, reps: int) -> dict[str, Measured]:
    """Measure an empty round trip, with interact and with quantlab, in turns."""
    notebooks = {"empty": [EMPTY, "widgets.VBox([slider, image])"], **NOTEBOOKS[explorer]}
    found = {name: [] for name in notebooks}
    with tempfile.TemporaryDirectory() as root, labs.chromium() as browser, labs.jupyterlab(Path(root)) as lab:
        for name in list(found) * reps:
            write_notebook(Path(root) / f"{name}.ipynb", notebooks[name])
            with labs.notebook(browser, lab, f"{name}.ipynb") as notebook:
                notebook.run_all()
                found[name].append(measure(notebook, *(("empty", 12) if name == "empty" else SLIDER[explorer])))
                if notebook.errors():
                    raise RuntimeError(f"{name}: {notebook.errors()}")
    return {name: pool(runs) for name, runs in found.items()}


def pool(runs: list[Measured]) -> Measured:
    """All latencies, and the worst of everything else."""
    return Measured(
        [ms for run in runs for ms in run.latencies],
        shown=min(run.shown for run in runs),
        blank=max(run.blank for run in runs),
        still=max(run.still for run in runs),
        right=all(run.right for run in runs),
    )


def table(interact: Measured, quantlab: Measured, empty: Measured, presses: int) -> list[tuple]:
    """For each line: what, of interact, of quantlab, the bar, whether quantlab keeps it."""
    medians = [float(np.median(m.latencies)) for m in (interact, quantlab, empty)]
    p95 = [float(np.percentile(m.latencies, 95)) for m in (interact, quantlab)]
    bar = ROUND_TRIPS * medians[2] + DRAWING
    return [
        ("empty round trip, median, ms", "", f"{medians[2]:.0f}", "", True),
        ("press to picture, median, ms", *(f"{ms:.0f}" for ms in medians[:2]), f"<= {bar:.0f}", medians[1] <= bar),
        ("press to picture, p95, ms", *(f"{ms:.0f}" for ms in p95), f"<= {2 * bar:.0f}", p95[1] <= 2 * bar),
        ("median as a share of interact's", "1", f"{medians[1] / medians[0]:.3f}", "", True),
        (
            f"steps shown of {presses}, {1 / PACE:.0f} a second",
            interact.shown,
            quantlab.shown,
            presses,
            quantlab.shown == presses,
        ),
        ("frames without a picture", interact.blank, quantlab.blank, 0, quantlab.blank == 0),
        (
            "changes after the mouse stops, ms",
            f"{interact.still:.0f}",
            f"{quantlab.still:.0f}",
            "<= 300",
            quantlab.still <= 300,
        ),
        ("ends with the right picture", interact.right, quantlab.right, True, quantlab.right),
    ]


def load() -> str:
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--explorer", choices=NOTEBOOKS, help="which picture (all)")
    parser.add_argument("--reps", type=int, default=1, help="how often each notebook is measured (1)")
    parser.add_argument("--busy", action="store_true", help="keep all cores but one busy meanwhile")
    options = parser.parse_args()
    if labs.find_chromium() is None:
        parser.error("no Chromium on this machine (CHROMIUM=<path> names one that is not found)")
    names = [options.explorer] if options.explorer else list(NOTEBOOKS)
    with busy((os.cpu_count() or 2) - 1 if options.busy else 0):
        return int(not all([compare(name, options.reps) for name in names]))


@contextmanager
def busy(cores: int):
    """So many processes that only count, while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def compare(explorer: str, reps: int) -> bool:
    """Measure one explorer, print its table, and say whether every bar is kept."""
    print(f"explore_{explorer}; before: {load()}", flush=True)
    lines = table(**measure_all(explorer, reps), presses=SLIDER[explorer][1])
    print(f"after, the benchmark included: {load()}\n\n{'':36}{'interact':>9}{'quantlab':>9}{'bar':>9}")
    for what, theirs, ours, bar, kept in lines:
        print(f"{what:36}{theirs!s:>9}{ours!s:>9}{bar!s:>9}{'' if kept else '  MISSED'}")
    print(flush=True)
    return all(kept for *_, kept in lines)


if __name__ == "__main__":
    sys.exit(main())
