"""The notebooks as a learner uses them: in JupyterLab, in a browser, dragging the sliders with a mouse."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import labs
import pytest
from playwright.sync_api import expect

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

NOTEBOOKS = sorted(Path(os.environ.get("QUANTLAB_NOTEBOOKS", labs.ROOT / "notebooks")).glob("*.ipynb"))
FIRST = "01_scale_and_zero_point.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"
SLOWEST = 30  # seconds in which the slowest slider must have changed what is shown
AT_REST = 1.0  # seconds after which the picture is the finer one that an explorer draws at rest


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def has_explorer(path: Path) -> bool:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return any("explore_" in "".join(cell["source"]) for cell in code_cells(notebook))


def copy_without_outputs(source: Path, target: Path) -> None:
    notebook = json.loads(source.read_text(encoding="utf-8"))
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    target.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """JupyterLab on a copy: the notebooks write files, and no stored output may pass for a new one."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(labs.ROOT / "data", root / "data")
    (root / "notebooks").mkdir()
    for path in NOTEBOOKS:
        copy_without_outputs(path, root / "notebooks" / path.name)
    with labs.jupyterlab(root) as lab:
        yield lab


@pytest.fixture(scope="module")
def notebook(request, browser, lab):
    """The notebook that a test names, opened once and run from a fresh kernel."""
    with labs.notebook(browser, lab, f"notebooks/{request.param}") as notebook:
        notebook.run_all()
        yield notebook


class Shown(NamedTuple):
    picture: str  # a hash of its bytes: a new address alone is no new picture
    numbers: str


def shown(explorer) -> Shown:
    picture = explorer.locator("img").evaluate(f"img => ({labs.HASH})(img.src)")
    return Shown(picture, explorer.locator(".widget-html-content").last.inner_text())


def shown_next(notebook, explorer, before: Shown) -> Shown:
    """What is shown once it is no longer `before` and a second has passed without work; or `before`."""
    now, deadline, quiet = before, time.monotonic() + SLOWEST, None
    while now == before and time.monotonic() < deadline:
        notebook.page.wait_for_timeout(50)
        now = shown(explorer)
    while quiet is None or time.monotonic() - quiet < AT_REST:
        last, now = now, shown(explorer)
        if quiet is None or now != last or not notebook.idle():
            quiet = time.monotonic()
        notebook.page.wait_for_timeout(50)
    return now


def drag(notebook, slider, end: float | None = None) -> None:
    """Drag a slider's handle with the mouse to an end of its track: 0 left, 1 right, None the farther one."""
    slider.scroll_into_view_if_needed()
    handle, track = (slider.locator(f".noUi-{part}").bounding_box() for part in ("handle", "target"))
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    if end is None:
        end = x < track["x"] + track["width"] / 2
    mouse = notebook.page.mouse
    mouse.move(x, y)
    mouse.down()
    mouse.move(track["x"] + end * track["width"], y, steps=8)
    mouse.up()


@pytest.mark.parametrize("notebook", [FIRST], indirect=True)
def test_a_slider_moves_picture_and_numbers_by_mouse_and_by_key(notebook):
    explorer = notebook.explorers().first
    slider = explorer.locator(".widget-slider").first
    handle, before = slider.locator(".noUi-handle"), shown(explorer)
    value = handle.get_attribute("aria-valuenow")
    drag(notebook, slider, end=0)
    dragged = shown_next(notebook, explorer, before)
    assert handle.get_attribute("aria-valuenow") != value
    assert dragged.picture != before.picture
    assert dragged.numbers != before.numbers
    handle.press("ArrowRight")
    stepped = shown_next(notebook, explorer, dragged)
    assert stepped.picture != dragged.picture
    assert stepped.numbers != dragged.numbers


@pytest.mark.parametrize("notebook", [path.name for path in NOTEBOOKS if has_explorer(path)], indirect=True)
def test_every_slider_of_every_explorer_changes_what_is_shown(notebook):
    bundles = [out.get("data", {}) for cell in notebook.code_cells() for out in cell["outputs"]]
    sent = [bundle for bundle in bundles if {WIDGET, "image/png"} <= bundle.keys()]
    assert sent
    expect(notebook.explorers()).to_have_count(len(sent), timeout=SLOWEST * 1000)
    dead = []
    for number, explorer in enumerate(notebook.explorers().all(), 1):
        for slider in explorer.locator(".widget-slider").all():
            before = shown(explorer)
            drag(notebook, slider)
            if shown_next(notebook, explorer, before) == before:
                dead.append(f"explorer {number}: {slider.locator('label').inner_text()}")
    assert notebook.errors() == []
    assert dead == []
