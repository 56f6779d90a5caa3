"""The notebooks as a learner uses them: in JupyterLab, in a browser, dragging the sliders with a mouse."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import labs
import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1800)]

FOLDER = Path(os.environ.get("QUANTLAB_NOTEBOOKS", labs.ROOT / "notebooks"))
FIRST = "01_scale_and_zero_point.ipynb"
WIDGET = "application/vnd.jupyter.widget-view+json"
SLOWEST = 60  # seconds in which the slowest slider must have changed what is shown


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def names_with_explorers() -> list[str]:
    notebooks = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.ipynb"))}
    return [name for name, notebook in notebooks.items()
            if any("explore_" in "".join(cell["source"]) for cell in code_cells(notebook))]


def copy_without_outputs(source: Path, target: Path) -> None:
    notebook = json.loads(source.read_text(encoding="utf-8"))
    for cell in code_cells(notebook):
        cell.update(outputs=[], execution_count=None)
    target.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    if labs.find_chromium() is None:
        stop = pytest.fail if os.environ.get("QUANTLAB_REQUIRE_BROWSER") == "1" else pytest.skip
        stop("no Chromium on this machine (CHROMIUM=<path> names one that is not found)")
    with labs.chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """JupyterLab on a copy: the notebooks write files, and a stored output must not pass for one just made."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(labs.ROOT / "data", root / "data")
    (root / "notebooks").mkdir()
    for path in FOLDER.glob("*.ipynb"):
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
    """What is shown once it is no longer `before` and half a second has passed without work; or `before`."""
    now, deadline, quiet = before, time.monotonic() + SLOWEST, None
    while now == before and time.monotonic() < deadline:
        notebook.page.wait_for_timeout(50)
        now = shown(explorer)
    while quiet is None or time.monotonic() - quiet < 0.5:
        last, now = now, shown(explorer)
        if quiet is None or now != last or not notebook.idle():
            quiet = time.monotonic()
        notebook.page.wait_for_timeout(50)
    return now


def drag(notebook, handle, end: float | None = None) -> None:
    """Drag a slider's handle with the mouse to an end of its track: 0 left, 1 right, None the farther one."""
    handle.scroll_into_view_if_needed()
    track = handle.locator("xpath=ancestor::*[contains(@class, 'noUi-target')]").bounding_box()
    box, mouse = handle.bounding_box(), notebook.page.mouse
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    if end is None:
        end = x < track["x"] + track["width"] / 2
    mouse.move(x, y)
    mouse.down()
    mouse.move(track["x"] + end * track["width"], y, steps=8)
    mouse.up()


@pytest.mark.parametrize("notebook", [FIRST], indirect=True)
def test_a_slider_moves_picture_and_numbers_by_mouse_and_by_key(notebook):
    explorer = notebook.explorers()[0]
    handle, before = explorer.locator(".noUi-handle").first, shown(explorer)
    value = handle.get_attribute("aria-valuenow")
    drag(notebook, handle, end=0)
    dragged = shown_next(notebook, explorer, before)
    assert handle.get_attribute("aria-valuenow") != value
    assert dragged.picture != before.picture
    assert dragged.numbers != before.numbers
    handle.press("ArrowRight")
    stepped = shown_next(notebook, explorer, dragged)
    assert stepped.picture != dragged.picture
    assert stepped.numbers != dragged.numbers


@pytest.mark.parametrize("notebook", names_with_explorers(), indirect=True)
def test_every_slider_of_every_explorer_changes_what_is_shown(notebook):
    bundles = [out.get("data", {}) for cell in notebook.code_cells() for out in cell["outputs"]]
    sent = [bundle for bundle in bundles if {WIDGET, "image/png"} <= bundle.keys()]
    explorers, dead = notebook.explorers(), []
    assert len(explorers) == len(sent) > 0, "some explorer is not in the page"
    for number, explorer in enumerate(explorers, 1):
        for handle in explorer.locator(".noUi-handle").all():
            before = shown(explorer)
            drag(notebook, handle)
            if shown_next(notebook, explorer, before) == before:
                dead.append(f"explorer {number}, slider {handle.get_attribute('aria-valuetext')}")
    assert (dead, notebook.errors()) == ([], [])
