"""The static site: a chapter of one explorer is built and driven in Chromium, with no kernel and no other host.

`python run.py site` runs the last tests on the site it has built (QUANTLAB_SITE names its folder).
"""

import functools
import http.server
import importlib.util
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from recipes import filming

if importlib.util.find_spec("furo") is None or importlib.util.find_spec("myst_nb") is None:
    pytest.skip("the site's packages are not installed (python run.py site)", allow_module_level=True)

from recipes import notebooks, site, site_pages

WHOLE = os.environ.get("QUANTLAB_SITE")
CHAPTERS = ("01_scale_and_zero_point", "10_gptq", "17_rotations")
SOURCE = """\
# %% [markdown]
# # 01 A small chapter
# A formula: $$q = \\mathrm{round}(x / s)$$
#
# ## Drag it
# %%
import dataclasses

from quantlab.explorers import explore_angle

some = [{"angle": angle} for angle in range(-5, 31)]
dataclasses.replace(explore_angle(10, 1), filmed=some)  # explore_angle's own would take longer
# %% [markdown]
# The step is smallest where both are equal. Back to [the next](02_none.ipynb).
# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(2, 1))
plt.plot([1, 2])
plt.show()
# %% [markdown]
# A line rises.
#
# ### Exercise
# %%
from quantlab.checks import check

check("1.1", None)
"""
# JavaScript. Moves a slider 24 steps, back at its ends, by events as a key sends them, and gives for each the
# milliseconds from the event to the end of the first frame in which the canvas has other pixels; null where none came
# within half a second. Beside each step, how long a frame takes that changes nothing but a letter.
STEPS = """async film => {
    const input = film.querySelector('input[type=range]'), canvas = film.querySelector('canvas');
    const pixels = () => canvas.toDataURL();
    const frame = () => new Promise(next => requestAnimationFrame(() => {
        const {port1, port2} = new MessageChannel();
        port1.onmessage = next;
        port2.postMessage(0);  // after the frame's painting
    }));
    const times = [], empty = [], letter = document.body.appendChild(document.createElement('p'));
    let by = 1;
    for (let step = 0; step < 24; step++) {
        if (Number(input.value) + by > Number(input.max) || Number(input.value) + by < 0) by = -by;
        const before = pixels(), began = performance.now();
        input.value = Number(input.value) + by;
        input.dispatchEvent(new Event('input'));
        let now = null;
        while (performance.now() - began < 500) {
            await frame();
            now = performance.now() - began;
            if (pixels() !== before) break;
            now = null;
        }
        times.push(now);
        await new Promise(rest => setTimeout(rest, 60));
        const idle = performance.now();
        letter.textContent = step;
        await frame();
        empty.push(performance.now() - idle);
        await new Promise(rest => setTimeout(rest, 60));
    }
    letter.remove();
    return {times, empty};
}"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A site of one chapter."""
    root = tmp_path_factory.mktemp("site")
    source = root / "notebooks/src/01_small.py"
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(filming, "FILMS", root / "films")
        patch.setattr(site_pages, "modules", lambda: ["quantlab.affine"])
        assert notebooks.build(source) == []
        filming.make(source)
        assert site.build([source], root / "out") == 0
    return root / "out/html"


@pytest.fixture
def opened(browser):
    """A function that opens pages of a folder, served on this machine; afterwards nothing may have gone wrong."""
    wrong, closing = [], []

    def open_page(folder: Path, address: str, width: int = 900):
        handler = functools.partial(Quiet, directory=folder)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))

        def only_here(route):
            if route.request.url.startswith(base):
                return route.continue_()
            wrong.append(f"asked for {route.request.url}")
            return route.abort()

        page.route("**/*", only_here)
        page.goto(base + address)
        closing.extend([page.close, server.shutdown, server.server_close])
        return page

    yield open_page
    for close in closing:
        close()
    assert wrong == []


def live_film(page, number: int = 0):
    film = page.locator(".film").nth(number)
    film.scroll_into_view_if_needed()
    film.locator("canvas").wait_for()
    page.wait_for_timeout(300)  # the neighbours are decoded
    return film


def measured(film, rounds: int = 3) -> list[dict]:
    """From event to changed pixels, and an empty frame; several rounds, as other work may come between."""
    found = [film.evaluate(STEPS) for _ in range(rounds)]
    return [{**steps, "times": [time for time in steps["times"] if time is not None]} for steps in found]


def quickest(rounds: list[dict]) -> dict:
    return min(rounds, key=lambda steps: np.percentile(steps["times"], 95))


def assert_soon(times: list[float], empty: list[float]) -> None:
    """Half of the steps within 16 ms and 95% within 33 ms; where a frame is late by itself, little longer than that."""
    for share, most in ((50, 16), (95, 33)):
        assert np.percentile(times, share) <= max(most, 2 * np.percentile(empty, share) + 8)


def seen(film) -> tuple[str, str]:
    return film.locator("canvas").evaluate("canvas => canvas.toDataURL()"), film.locator(".numbers").inner_text()


@pytest.mark.browser
def test_a_slider_moves_picture_and_numbers_by_key_and_reset_brings_them_back(small, opened):
    page = opened(small, "chapters/01_small.html")
    film = live_film(page)
    slider, first = film.get_by_role("slider", name="angle"), seen(film)
    value = slider.get_attribute("aria-valuetext")
    slider.press("ArrowRight")
    page.wait_for_timeout(200)
    second = seen(film)
    assert slider.get_attribute("aria-valuetext") != value
    assert second[0] != first[0]
    assert second[1] != first[1]
    film.get_by_role("button", name="reset").click()
    page.wait_for_timeout(200)
    assert seen(film) == first


@pytest.mark.browser
def test_play_sweeps_until_something_else_is_touched(small, opened):
    page = opened(small, "chapters/01_small.html")
    film = live_film(page)
    film.get_by_role("button", name="play").click()
    page.wait_for_timeout(800)
    assert film.get_by_role("button", name="stop").is_visible()
    film.locator("canvas").click()
    held = seen(film)
    page.wait_for_timeout(600)
    assert film.get_by_role("button", name="play").is_visible()
    assert seen(film) == held


@pytest.mark.browser
def test_every_step_is_shown_soon(small, opened):
    rounds = measured(live_film(opened(small, "chapters/01_small.html")))
    assert [len(steps["times"]) for steps in rounds] == [24, 24, 24]
    assert_soon(**quickest(rounds))


@pytest.mark.browser
def test_what_stands_on_the_page(small, opened):
    page = opened(small, "chapters/01_small.html", width=360)
    live_film(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    said = page.locator(".film .numbers").evaluate("p => getComputedStyle(p, '::before').content")
    assert "sideways" in said
    frame = page.locator(".film .frame").first  # in which the picture moves sideways, by finger and by key
    widths = frame.evaluate("f => [f.clientWidth, f.scrollWidth, f.querySelector('canvas').clientWidth]")
    assert widths[0] <= 360 < 600 <= widths[1] == widths[2]
    frame.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.querySelector('.film .frame').scrollLeft > 0")
    assert page.locator("img:not([alt]), img[alt='']").count() == 0
    assert page.locator("math").count() == 1
    assert "python run.py lab" in page.locator("article").inner_text()
    hint = page.get_by_text("Hint 1 for exercise 1.1")
    below = hint.locator("xpath=..").locator("p").first
    assert not below.is_visible()
    hint.click()
    assert below.is_visible()
    assert page.get_by_text("the next").locator("xpath=self::a").count() == 0  # its chapter is not on this site


@pytest.mark.browser
def test_the_first_page_has_an_explorer_and_the_ledger_can_be_sorted(small, opened):
    live_film(opened(small, "index.html"))
    page = opened(small, "ledger.html")
    tables, heading = page.locator(".sortable"), page.get_by_role("button", name="KL, nats")
    assert tables.count() == 2  # the bundled model's and SmolLM2's
    for table in tables.all():
        column = table.locator("th", has=heading).evaluate("cell => cell.cellIndex")
        values = f"rows => rows.map(row => row.cells[{column}].dataset.value).filter(Boolean).map(Number)"
        for order in (1, -1):
            table.locator("th", has=heading).get_by_role("button").click()
            found = table.locator("tbody tr").evaluate_all(values)
            assert len(found) > 20
            assert found == sorted(found, reverse=order < 0)


@pytest.mark.browser
def test_axe_finds_nothing_serious(small, opened):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for address in ("index.html", "chapters/01_small.html", "ledger.html"):
        page = opened(small, address)
        page.wait_for_timeout(500)
        found = axe.run(page).response["violations"]
        assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []


def test_an_old_film_makes_way_for_that_of_a_changed_source(tmp_path, monkeypatch):
    monkeypatch.setattr(filming, "FILMS", tmp_path / "films")
    source = tmp_path / "01_none.py"
    source.write_text("# %%\n1 + 1\n", encoding="utf-8")
    first = filming.make(source)
    assert filming.make(source) == first
    source.write_text("# %%\n1 + 2\n", encoding="utf-8")
    assert [path.name for path in filming.FILMS.iterdir()] != [filming.make(source).name]
    assert len(list(filming.FILMS.iterdir())) == 1


def test_what_is_left_out_of_a_notebook_is_met_in_it_and_lies_before_its_last_explorer():
    assert filming.LEFT_OUT
    for stem, starts in filming.LEFT_OUT.items():
        cells = notebooks.cells_of(notebooks.NOTEBOOKS / f"src/{stem}.py").cells
        left = [cell for cell in cells if cell not in filming.cells_to_run(stem, cells)]
        assert sum(cell.source.startswith(starts) for cell in left) >= len(starts)
        assert sum(map(filming.shows_explorer, filming.cells_to_run(stem, cells))) == sum(
            map(filming.shows_explorer, cells)
        )
    with pytest.raises(RuntimeError, match="no cell begins with"):
        filming.cells_to_run(next(iter(filming.LEFT_OUT)), cells[:2])


def test_docstrings_become_markdown():
    doc = "The *codes* of x.\n\n    q = x / s    (1)\n\nRaises: none.\n\n>>> 1 + 1\n2"
    assert site_pages.prose(doc) == (
        "The \\*codes\\* of x.\n\n```text\nq = x / s    (1)\n```\n\nRaises: none.\n\n```pycon\n>>> 1 + 1\n2\n```"
    )


# --- the whole site ---------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(not WHOLE, reason="python run.py site runs it on the site that it has built")
@pytest.mark.parametrize("stem", CHAPTERS)
def test_three_chapters_of_the_built_site(stem, opened):
    folder = Path(WHOLE)
    if not (folder / f"chapters/{stem}.html").exists():
        pytest.skip("it was built without this chapter")
    page = opened(folder, f"chapters/{stem}.html")
    for number in range(page.locator(".film").count()):
        steps = quickest(measured(live_film(page, number)))  # of these states some have the same picture
        median, p95, empty, late = (np.percentile(steps[k], q) for k in ("times", "empty") for q in (50, 95))
        print(f"{stem}, film {number + 1}: {len(steps['times'])} of 24 steps with another picture, median {median:.0f}")
        print(f"    ms, 95% within {p95:.0f} ms; an empty frame {empty:.0f} and {late:.0f} ms")
        assert_soon(**steps)
    assert page.locator("img:not([alt]), img[alt='']").count() == 0


@pytest.mark.skipif(not WHOLE, reason="python run.py site runs it on the site that it has built")
def test_pages_and_films_keep_to_their_sizes():
    folder = Path(WHOLE)
    assert max(path.stat().st_size for path in folder.rglob("*.bin")) <= filming.LARGEST
    assert {path.name: path.stat().st_size for path in folder.rglob("*.html") if path.stat().st_size > 1e6} == {}
