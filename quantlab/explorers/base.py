"""What every explorer is made of: controls, a figure that is drawn once, and a line of numbers.

A moved slider redraws only the artists that changed (blitting). Once it rests, the picture is drawn again with twice
the pixels, for dense screens. It is a plain image, so it also stands in a notebook that has no kernel.
"""

import base64
import functools
import html
import io
import re
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from quantlab.explorers.palette import palette_of
from quantlab.explorers.playing import Player, Rest, reset_button

KEPT = 200  # pictures of an explorer that are kept, of some 20 kB
FINE = 2  # pixels of a picture at rest for each pixel of one that moves, in each direction
# Callbacks may come on a second thread, and matplotlib's font cache is one for the whole process.
DRAWING = threading.RLock()


@dataclass(frozen=True)
class Explorer:
    """What a test needs: set a control's value, then look at ax and numbers(). A cell displays it."""

    view: widgets.Widget
    controls: dict[str, widgets.Widget]
    ax: Axes
    numbers: Callable[[], str]  # the line under the picture
    picture: Callable[[], bytes]  # PNG
    filmed: list[dict] | None = None  # {control: value} of the states worth drawing ahead; None: a grid of them

    def _repr_mimebundle_(self, **options):
        return self.view._repr_mimebundle_(**options)


class View(widgets.VBox):
    """Controls, picture and numbers; without a kernel a reader gets the picture, and nbval compares the numbers."""

    def __init__(self, children, png: Callable[[], bytes], text: Callable[[], str]):
        super().__init__(children)
        self._png, self._text = png, text

    def _repr_mimebundle_(self, **options):
        bundle = super()._repr_mimebundle_(**options)
        bundle["image/png"] = base64.b64encode(with_caption(self._png(), self._text())).decode()
        bundle["text/plain"] = self._text()
        return bundle


def with_caption(png: bytes, text: str) -> bytes:
    """The picture with the text under it, for readers who have no kernel."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    lines = [part for line in text.splitlines() for part in in_phrases(line, 105)]
    fig = Figure(figsize=(picture.width / 100, 0.19 * len(lines) + 0.1), dpi=100)
    canvas = FigureCanvasAgg(fig)
    fig.text(0.01, 0.98, "\n".join(lines), va="top", fontsize=10, parse_math=False)
    with DRAWING:
        canvas.draw()
    caption, out = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), io.BytesIO()
    both = Image.new("RGB", (picture.width, picture.height + caption.height), "white")
    both.paste(picture, (0, 0))
    both.paste(caption, (0, picture.height))
    both.save(out, "png", optimize=True)
    return out.getvalue()


def in_phrases(line: str, width: int) -> list[str]:
    """A line of numbers as lines of this width, broken where two spaces part its phrases; a longer phrase, at a word.

    >>> in_phrases("rounding 3.1e-04   clipping 0.0e+00", 30)
    ['rounding 3.1e-04', 'clipping 0.0e+00']
    """
    lines = [""]
    for gap, phrase in re.findall(r"( *)(\S+(?: \S+)*)", line):
        if len(lines[-1] + gap + phrase) <= width:
            lines[-1] += gap + phrase
        else:
            lines = [*filter(None, lines), *textwrap.wrap(phrase, width)]
    return lines


class Canvas:
    """A private figure on Agg: everything still is drawn once, the moving artists again for each picture.

    seldom: moving artists that lie under the others and change with one control alone. They are drawn again only when
    picture() is given another state, which is the value of that control.
    fineness: pixels for each pixel of the figure, in each direction. Several canvases can share a figure.
    """

    def __init__(
        self, fig: Figure, moving: list, palette: Image.Image | None = None, fineness: int = 1, seldom: Sequence = ()
    ):
        self.fig, self.moving, self.palette, self.dpi = fig, moving, palette, fineness * fig.dpi
        self.seldom, self.state = seldom, object()
        self.canvas = FigureCanvasAgg(fig)
        for artist in [*moving, *seldom]:
            artist.set_animated(True)
        with self._in_use():
            self.canvas.draw()
            self.still = self.background = self.canvas.copy_from_bbox(fig.bbox)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """The figure is drawn by this canvas, at its fineness."""
        with DRAWING:
            dpi = self.fig.dpi
            self.fig.set_canvas(self.canvas)
            self.fig.set_dpi(self.dpi)
            try:
                yield
            finally:
                self.fig.set_dpi(dpi)

    def picture(self, state: object = None) -> Image.Image:
        with self._in_use():
            if self.seldom and state != self.state:
                self._draw(self.still, self.seldom)
                self.background, self.state = self.canvas.copy_from_bbox(self.fig.bbox), state
            self._draw(self.background, self.moving)
            return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")

    def _draw(self, background, artists: Sequence) -> None:
        self.canvas.restore_region(background)
        for artist in artists:
            self.fig.draw_artist(artist)

    def png(self, state: object = None) -> bytes:
        picture, out = self.picture(state), io.BytesIO()
        if self.palette is not None:
            picture = picture.quantize(palette=self.palette, dither=Image.Dither.NONE)
        picture.save(out, "png", compress_level=1)
        return out.getvalue()


def bind(
    controls: dict, ax: Axes, moving: list, update: Callable[..., str], *,
    filmed: list[dict] | None = None, seldom: Sequence = (), of: str = "",
) -> Explorer:  # fmt: skip
    """Bind controls to a figure: update(**values) moves the artists and returns the line of numbers (or more lines).

    seldom: artists under the moving ones that change with one control alone, and `of` its name.
    """
    update(**_values(controls))  # the colours of a first picture
    canvas, png, text, state = Canvas(ax.figure, moving, seldom=seldom), [b""], [""], [None]
    canvas.palette = palette_of(canvas.picture(), [*moving, *seldom])
    fine = functools.cache(lambda: Canvas(ax.figure, moving, canvas.palette, fineness=FINE, seldom=seldom))
    width = f"{ax.figure.bbox.width:.0f}px"  # wider it would blur
    image, line = widgets.Image(format="png", layout={"width": width, "max_width": "100%"}), widgets.HTML()

    @functools.lru_cache(KEPT)
    def picture_at(*_values) -> bytes:
        """What update() has made of these values."""
        return canvas.png(state[0])

    def draw(_change=None) -> None:
        values = _values(controls)
        text[0], state[0] = update(**values), values[of] if seldom else None
        png[0] = image.value = picture_at(*values.values())
        rest.begin()
        line.value = f'<div style="white-space: pre-wrap; line-height: 1.4">{html.escape(text[0])}</div>'

    def sharpen() -> None:
        image.value = fine().png(state[0])

    rest = Rest(sharpen)
    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    buttons = Player(controls).button, reset_button(controls)
    row = widgets.HBox([*controls.values(), *buttons], layout={"flex_flow": "row wrap"})
    shown = (lambda: png[0]), (lambda: text[0])
    return Explorer(View([row, image, line], *shown), controls, ax, shown[1], shown[0], filmed)


def _values(controls: dict) -> dict:
    return {name: control.value for name, control in controls.items()}


def figure(columns: int = 1, rows: int = 1, height: float = 3.4, **options):
    """A private figure, which pyplot never sees: no other thread and no backend can disturb it."""
    fig = Figure(figsize=(8.4, height), dpi=100)
    return fig, fig.subplots(rows, columns, **options)
