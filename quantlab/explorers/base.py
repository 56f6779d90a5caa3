"""What every explorer is made of: controls, a figure that is drawn once, and a line of numbers.

A moved slider redraws only the artists that changed (blitting). The picture is a plain image, so it also stands in a
notebook that has no kernel.
"""

import base64
import functools
import html
import io
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from quantlab.explorers.playing import Player, reset_button

KEPT = 200  # pictures of an explorer that are kept, of some 20 kB
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
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, 105) or [""]]
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


class Canvas:
    """A private figure on Agg: everything still is drawn once, the moving artists again for each picture."""

    def __init__(self, fig: Figure, moving: list, few_colours: bool):
        self.fig, self.moving, self.canvas, self.palette = fig, moving, FigureCanvasAgg(fig), None
        for artist in moving:
            artist.set_animated(True)
        with DRAWING:
            self.canvas.draw()
            self.still = self.canvas.copy_from_bbox(fig.bbox)
        if few_colours:  # lines and bars: 64 colours are enough, and a fifth of the time to encode
            self.palette = _with_white(self.picture().quantize(64))

    def picture(self) -> Image.Image:
        with DRAWING:
            self.canvas.restore_region(self.still)
            for artist in self.moving:
                self.fig.draw_artist(artist)
            return Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")

    def png(self) -> bytes:
        picture, out = self.picture(), io.BytesIO()
        if self.palette is not None:
            picture = picture.quantize(palette=self.palette, dither=Image.Dither.NONE)
        picture.save(out, "png", compress_level=1)
        return out.getvalue()


def _with_white(palette: Image.Image) -> Image.Image:
    """Nearly white becomes white: Pillow takes the first colour that is near, which is grey beside a white page."""
    colours = np.reshape(palette.getpalette(), (-1, 3))
    colours[(colours >= 245).all(1)] = 255
    palette.putpalette(colours.ravel().tolist())
    return palette


def bind(
    controls: dict, ax: Axes, moving: list, update: Callable[..., str], *,
    few_colours: bool = True, filmed: list[dict] | None = None,
) -> Explorer:  # fmt: skip
    """Bind controls to a figure: update(**values) moves the artists and returns the line of numbers (or more lines)."""
    update(**_values(controls))  # the colours of a first picture
    canvas, text = Canvas(ax.figure, moving, few_colours), [""]
    width = f"{ax.figure.bbox.width:.0f}px"  # wider it would blur
    image, line = widgets.Image(format="png", layout={"width": width, "max_width": "100%"}), widgets.HTML()

    @functools.lru_cache(KEPT)
    def picture_at(*_values) -> bytes:
        """What update() has made of these values."""
        return canvas.png()

    def draw(_change=None) -> None:
        values = _values(controls)
        text[0] = update(**values)
        image.value = picture_at(*values.values())
        line.value = f'<div style="white-space: pre-wrap; line-height: 1.4">{html.escape(text[0])}</div>'

    for control in controls.values():
        control.observe(draw, names="value")
    draw()
    buttons = Player(controls).button, reset_button(controls)
    row = widgets.HBox([*controls.values(), *buttons], layout={"flex_flow": "row wrap"})
    shown = (lambda: image.value), (lambda: text[0])
    return Explorer(View([row, image, line], *shown), controls, ax, shown[1], shown[0], filmed)


def _values(controls: dict) -> dict:
    return {name: control.value for name, control in controls.items()}


def figure(columns: int = 1, rows: int = 1, height: float = 3.4, **options):
    """A private figure, which pyplot never sees: no other thread and no backend can disturb it."""
    fig = Figure(figsize=(8.4, height), dpi=100)
    return fig, fig.subplots(rows, columns, **options)
