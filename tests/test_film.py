"""Films: what is drawn ahead is what an explorer shows live, state by state."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_explorers import EXPLORERS

from quantlab.explorers import explore_angle
from quantlab.explorers.data import thinned
from quantlab.explorers.film import MOST, film, grid


def live(explorer) -> tuple[np.ndarray, str]:
    picture = Image.open(io.BytesIO(explorer.picture())).convert("RGB")
    return np.asarray(picture), explorer.numbers()


def standing(explorer) -> dict:
    return {name: control.value for name, control in explorer.controls.items()}


def differing(explorer, made) -> list[tuple]:
    """The states whose picture or text on the film is not what the explorer shows at them."""
    wrong = []
    for place in made.shown:
        for control, at in zip(made.controls, place, strict=True):
            explorer.controls[control.name].value = control.stops[at]
        stands = tuple(c.stops.index(explorer.controls[c.name].value) for c in made.controls)
        picture, text = live(explorer)
        if stands != place or made.text(place) != text or not np.array_equal(made.picture(place), picture):
            wrong.append(place)
    return wrong


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_state_on_film_is_what_the_explorer_shows_there(name):
    explorer = EXPLORERS[name]()
    before, states = standing(explorer), grid(explorer)
    made = film(explorer, states[:: -(-len(states) // 8)])
    assert standing(explorer) == before
    assert differing(EXPLORERS[name](), made) == []


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_explorer_names_states_with_its_start_and_the_ends_of_its_controls(name):
    explorer = EXPLORERS[name]()
    states = grid(explorer)
    assert len(states) <= 1.1 * MOST
    for key, control in explorer.controls.items():
        seen = {state[key] for state in states if key in state}
        if seen and hasattr(control, "min"):
            assert {control.min, control.max} <= seen
        elif seen and hasattr(control, "options"):
            values = [o[1] if isinstance(o, tuple) else o for o in control.options]
            assert {values[0], values[-1]} <= seen


def test_a_film_starts_where_the_explorer_stood_and_repeats_no_picture():
    explorer = explore_angle(10, 1, bits=4)
    made = film(explorer, [{"bits": bits} for bits in (3, 6, 3)])
    assert len(made.shown) == 3
    assert made.controls[1].stops == [3, 4, 6]
    assert made.start == (0, 1)
    assert len(made.pictures) == len(set(made.pictures))
    assert np.array_equal(made.picture(made.start), live(explorer)[0])


def test_what_is_saved_gives_every_picture_back(tmp_path):
    made = film(explore_angle(10, 1), [{"angle": angle} for angle in (-90, 5, 90)])
    made.save(tmp_path / "1")
    index, data = json.loads((tmp_path / "1.json").read_text("utf-8")), (tmp_path / "1.bin").read_bytes()
    cuts = [0, *index["ends"]]
    assert [data[a:b] for a, b in zip(cuts, cuts[1:], strict=False)] == made.pictures
    assert {tuple(row[:-2]): tuple(row[-2:]) for row in index["states"]} == made.shown
    assert index["controls"][0]["stops"] == ["-90", "0", "5", "90"]
    with Image.open(tmp_path / "1.webp") as first:
        assert first.size == tuple(index["size"])


@pytest.mark.parametrize(("count", "kept"), [(2, 0), (2, 7), (5, 7), (5, 99), (40, 63), (100, 5), (300, 5)])
def test_thinned_stops_keep_both_ends_and_where_the_control_stands(count, kept):
    some = thinned(list(range(100)), count, kept)
    assert {0, kept, 99} <= set(some)
    assert some == sorted(set(some))
    assert len(some) <= max(count, 3)


def test_a_slider_that_stands_between_two_steps_is_filmed_there():
    explorer = EXPLORERS["affine"]()
    low = explorer.controls["low"].value
    assert low in {state["low"] for state in grid(explorer)}
    assert torch.tensor(low * 100).frac().abs() > 1e-6  # it does
