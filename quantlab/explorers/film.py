"""An explorer's pictures drawn ahead, for a page whose sliders move without a kernel.

film(explorer) sets the controls to one state after another, as a reader would, and keeps what is shown. A picture is
stored as what differs from the first one: most of it (axes, labels, a histogram) is the same in all.
"""

import io
import itertools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ipywidgets as widgets
import numpy as np
from PIL import Image

from quantlab.explorers.base import Explorer
from quantlab.explorers.data import states, thinned
from quantlab.explorers.playing import stops_of
from quantlab.files import write_whole

MOST = 200  # states of one film
Place = tuple[int, ...]  # of each control, which of its stops


@dataclass(frozen=True)
class Control:
    """One control of a film, and the values at which it can stand."""

    name: str
    label: str
    kind: str  # slider, choice or tick
    stops: list  # values
    texts: list[str]  # as a reader sees them


@dataclass(frozen=True)
class Film:
    """What an explorer shows at each of its states. start is where the explorer stood."""

    controls: list[Control]
    start: Place
    size: tuple[int, int]  # width and height of every picture
    shown: dict[Place, tuple[int, int]]  # at each state, its picture and its text
    pictures: list[bytes]  # lossless WebP: the first whole, of the others what differs from it
    texts: list[str]

    def picture(self, place: Place) -> Image.Image:
        """The whole picture of a state."""
        first = Image.open(io.BytesIO(self.pictures[0])).convert("RGBA")
        part = Image.open(io.BytesIO(self.pictures[self.shown[place][0]])).convert("RGBA")
        return Image.alpha_composite(first, part).convert("RGB")

    def text(self, place: Place) -> str:
        """The line of numbers of a state."""
        return self.texts[self.shown[place][1]]

    def save(self, stem: Path) -> None:
        """Write stem.json (controls, states, texts, where each picture ends), stem.bin (pictures), stem.webp (first).

        The first picture of stem.webp is that of the start, for readers without JavaScript.
        """
        ends = list(itertools.accumulate(map(len, self.pictures)))
        index = {
            "controls": [
                {"label": c.label, "kind": c.kind, "stops": c.texts, "start": at}
                for c, at in zip(self.controls, self.start, strict=True)
            ],
            "size": self.size,
            "states": [[*place, *shown] for place, shown in self.shown.items()],
            "ends": ends,
            "texts": self.texts,
        }
        write_whole(stem.with_suffix(".json"), json.dumps(index, ensure_ascii=False, separators=(",", ":")))
        stem.with_suffix(".bin").write_bytes(b"".join(self.pictures))
        stem.with_suffix(".webp").write_bytes(self.pictures[0])


def film(explorer: Explorer, states: Iterable[dict] | None = None) -> Film:
    """The pictures and numbers of an explorer where it stands and at each of the states; None: those of grid().

    A state is {control: value}, set in this order; the controls that it does not name stay as they are. The explorer
    draws as it does live, and stands afterwards where it stood. Where a control follows another (a preset its
    sliders), its own value counts, so a film holds only states that a reader could reach.

    >>> from quantlab.explorers import explore_angle
    >>> short = film(explore_angle(10, 1), [{"bits": 3}, {"bits": 6}])
    >>> len(short.shown), short.pictures[0][8:12]
    (3, b'WEBP')
    """
    start = {name: control.value for name, control in explorer.controls.items()}  # to which film() returns
    controls = [_control(name, control) for name, control in explorer.controls.items()]
    reel = _Reel(explorer)
    for state in [{}, *(grid(explorer) if states is None else states)]:
        _put(explorer, state)
        reel.take()
    _put(explorer, start)
    return reel.developed(controls)


def grid(explorer: Explorer, most: int = MOST) -> list[dict]:
    """The states worth filming: those that the explorer names, else every combination of some stops of its controls.

    The longest sliders are thinned until at most so many states remain; where a control stands, and its two ends, stay.
    """
    if explorer.filmed is not None:
        return explorer.filmed
    stops = {name: _control(name, control).stops for name, control in explorer.controls.items()}
    counts = {name: len(found) for name, found in stops.items()}
    while math.prod(counts.values()) > most:
        counts[max(counts, key=counts.get)] -= 1
    return states(**{n: thinned(stops[n], counts[n], explorer.controls[n].value) for n in stops})


class _Reel:
    """What was shown so far."""

    def __init__(self, explorer: Explorer):
        self.explorer, self.shown = explorer, {}  # {values: (picture, text)}
        self.pictures, self.texts, self.first = {}, {}, None  # bytes and texts, numbered as they come

    def take(self) -> None:
        """Keep what the explorer shows now."""
        values = tuple(control.value for control in self.explorer.controls.values())
        if values in self.shown:
            return
        png, text = self.explorer.picture(), self.explorer.numbers()
        picture = self.pictures.setdefault(self._encoded(png), len(self.pictures))
        self.shown[values] = picture, self.texts.setdefault(text, len(self.texts))

    def _encoded(self, png: bytes) -> bytes:
        picture = Image.open(io.BytesIO(png)).convert("RGBA")
        pixels = np.asarray(picture).view(np.uint32)[..., 0]  # red, green, blue and alpha of a pixel as one number
        if self.first is None:
            self.first = pixels
            return _webp(picture.convert("RGB"))
        changed = np.where(pixels == self.first, np.uint32(0), pixels)  # 0: transparent
        return _webp(Image.fromarray(changed.view(np.uint8).reshape(*pixels.shape, 4)))

    def developed(self, controls: list[Control]) -> Film:
        """The film, in which controls keep only the stops at which they stood."""
        kept = []
        for control, stood in zip(controls, map(set, zip(*self.shown, strict=True)), strict=True):
            pairs = [(v, t) for v, t in zip(control.stops, control.texts, strict=True) if v in stood]
            stops, texts = map(list, zip(*pairs, strict=True))
            kept.append(Control(control.name, control.label, control.kind, stops, texts))
        shown = {
            tuple(control.stops.index(value) for control, value in zip(kept, values, strict=True)): what
            for values, what in self.shown.items()
        }
        return Film(kept, next(iter(shown)), self.first.shape[::-1], shown, list(self.pictures), list(self.texts))


def _webp(picture: Image.Image) -> bytes:
    """Quality 0: of so few colours as fast as it gets, and seldom a fifth larger."""
    out = io.BytesIO()
    picture.save(out, "webp", lossless=True, method=3, quality=0)
    return out.getvalue()


def _put(explorer: Explorer, state: dict) -> None:
    for name, value in state.items():
        explorer.controls[name].value = value


def _control(name: str, control: widgets.Widget) -> Control:
    """A control's values and their texts, all of them."""
    stops, kind = stops_of(control), "slider"
    if isinstance(control, widgets.Checkbox):
        kind, texts = "tick", ["off", "on"]
    elif hasattr(control, "options"):
        kind = "slider" if isinstance(control, widgets.SelectionSlider) else "choice"
        texts = [str(option[0] if isinstance(option, tuple) else option) for option in control.options]
    else:
        texts = [format(stop, control.readout_format) for stop in stops]
    return Control(name, control.description, kind, stops, texts)
