"""The buttons "play" and "reset" of an explorer, the pictures that it keeps, and those that it draws at rest."""

import asyncio
import io
import math

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from quantlab.explorers import base, explore_angle, explore_clipping, playing


def button(explorer, name):
    children = explorer.view.children[0].children
    return next(b for b in children if isinstance(b, widgets.Button) and b.description == name)


@pytest.fixture
def explorer(monkeypatch):
    monkeypatch.setattr(playing, "PACE", 0.001)
    monkeypatch.setattr(playing, "STEPS", 7)
    return explore_angle(10, 1)


def seen_while(explorer, seconds, then=None, name="angle") -> list:
    """Where a control stood after "play" was pressed; `then` is done after the third step."""
    angles = []

    async def wait():
        button(explorer, "play").click()
        await asyncio.sleep(seconds)

    def keep(change):
        angles.append(change.new)
        if then and len(angles) == 3:
            asyncio.get_running_loop().call_soon(then)

    explorer.controls[name].observe(keep, names="value")
    asyncio.run(wait())
    return angles


def test_play_goes_once_through_the_values_and_ends_where_it_began(explorer):
    start = explorer.controls["angle"].value
    angles = seen_while(explorer, 1)
    assert len(angles) == len(set(angles)) == 7
    assert {-90, 90, start} <= set(angles)
    assert angles[-1] == explorer.controls["angle"].value == start
    assert button(explorer, "play")


def test_another_press_stops_it(explorer):
    assert len(seen_while(explorer, 0.5, lambda: button(explorer, "stop").click())) == 3
    assert button(explorer, "play")


def test_a_moved_control_stops_it_and_is_the_next_to_be_played(explorer):
    bits = explorer.controls["bits"]
    assert len(seen_while(explorer, 0.5, lambda: setattr(bits, "index", 0))) == 3
    angle = explorer.controls["angle"].value
    assert seen_while(explorer, 0.5) == []  # bits goes through its values
    assert explorer.controls["angle"].value == angle
    assert bits.index == 0


def test_a_browser_that_answers_with_another_last_digit_does_not_stop_it(monkeypatch):
    monkeypatch.setattr(playing, "PACE", 0.001)
    monkeypatch.setattr(playing, "STEPS", 7)
    explorer = explore_clipping(torch.linspace(-1, 1, 99))
    clip = explorer.controls["clip"]
    clip.value = 0.4  # the control moved last is played

    def answer(change):
        if change.new == round(change.new, 9):
            asyncio.get_running_loop().call_soon(lambda: setattr(clip, "value", math.nextafter(change.new, 0)))

    clip.observe(answer, names="value")
    assert len(seen_while(explorer, 1.5, name="clip")) >= 7
    assert clip.value == pytest.approx(0.4)


def test_reset_brings_all_controls_back(explorer):
    before = {name: control.value for name, control in explorer.controls.items()}, explorer.picture()
    explorer.controls["angle"].value = 33
    explorer.controls["bits"].index = 0
    button(explorer, "reset").click()
    assert {name: control.value for name, control in explorer.controls.items()} == before[0]
    assert explorer.picture() == before[1]


def test_a_state_that_was_drawn_is_not_drawn_again(monkeypatch):
    explorer, drawn = explore_angle(10, 1), []
    png = base.Canvas.png
    monkeypatch.setattr(base.Canvas, "png", lambda canvas, state: drawn.append(1) or png(canvas, state))
    start = explorer.controls["angle"].value
    pictures = []
    for angle in (20, start, 20):
        explorer.controls["angle"].value = angle
        pictures.append(explorer.picture())
    assert len(drawn) == 1
    assert pictures[0] == pictures[2] != pictures[1]


def test_pictures_kept_are_bounded(monkeypatch):
    monkeypatch.setattr(base, "KEPT", 2)
    explorer, drawn = explore_angle(10, 1), []
    png = base.Canvas.png
    monkeypatch.setattr(base.Canvas, "png", lambda canvas, state: drawn.append(1) or png(canvas, state))
    for angle in (20, 30, 40, 20):
        explorer.controls["angle"].value = angle
    assert len(drawn) == 4


def rested(make) -> tuple[Image.Image, Image.Image]:
    """The picture while something moves, and the one that stands where nothing has moved for a while."""

    async def wait():
        explorer = make()
        image = next(w for w in explorer.view.children if isinstance(w, widgets.Image))
        moving = image.value
        await asyncio.sleep(3 * playing.REST)
        return explorer, moving, image.value

    explorer, moving, still = asyncio.run(wait())
    assert explorer.picture() == moving  # what is filmed, and stored in a notebook
    return tuple(Image.open(io.BytesIO(png)) for png in (moving, still))


def apart(*pictures) -> float:
    """From afar, where the edges of letters and lines do not count."""
    return np.asarray(
        ImageChops.difference(*(p.convert("RGB").resize((105, 42), Image.Resampling.BOX) for p in pictures))
    ).mean()


def bell():
    return explore_clipping(torch.randn(5000, generator=torch.Generator().manual_seed(0)))


def moved():
    explorer = explore_angle(10, 1)
    explorer.controls["bits"].index = 0
    return explorer


@pytest.mark.parametrize("make", [bell, moved], ids=["64", "all"])
def test_a_picture_at_rest_is_the_same_one_with_twice_the_pixels(make, monkeypatch):
    monkeypatch.setattr(playing, "REST", 0.05)
    moving, still = rested(make)
    assert still.size == (2 * moving.width, 2 * moving.height)
    assert apart(moving, still) < 2  # of 255
    assert apart(moving, still.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 5  # as would be seen


def test_while_a_control_moves_nothing_is_drawn_twice_as_fine(monkeypatch):
    monkeypatch.setattr(playing, "REST", 0.2)
    sizes = []

    async def keep_moving():
        explorer = explore_angle(10, 1)
        image = next(w for w in explorer.view.children if isinstance(w, widgets.Image))
        image.observe(lambda change: sizes.append(len(change.new)), names="value")
        for angle in range(-45, 45, 10):
            explorer.controls["angle"].value = angle
            await asyncio.sleep(0.02)
        sizes.append("end")
        await asyncio.sleep(0.8)

    asyncio.run(keep_moving())
    assert len(sizes[sizes.index("end") + 1 :]) == 1  # and once it is at rest, once
    assert max(sizes[: sizes.index("end")]) < sizes[-1]


def test_without_a_loop_a_picture_stays_as_it_is():
    explorer = moved()
    assert Image.open(io.BytesIO(explorer.view.children[1].value)).width == 840
