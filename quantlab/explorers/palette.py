"""The 256 colours of an explorer's pictures, chosen once: a picture of so few is encoded in a quarter of the time."""

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import Colormap, to_rgb
from matplotlib.image import AxesImage
from PIL import Image

from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

INKS = FLOAT, QUANTIZED, ERROR, CLIPPED, OTHER, "#E69F00", "#56B4E9", "black"
SHADES = 6  # of each ink on white, as the edge of a line has them
COMMON, RARE = 16, 48  # colours of the first picture: its commonest, and what stands for all others


def palette_of(first: Image.Image, moving: Sequence[Artist]) -> Image.Image:
    """Colours of the first picture, of lines that only later pictures may have, and of the moving heat maps."""
    maps = {artist.cmap.name: artist.cmap for artist in moving if isinstance(artist, AxesImage)}.values()
    own = [_with_white(part) for part in _of_picture(first, [_colours(cmap, cmap.N) for cmap in maps])]
    count = (256 - COMMON - RARE - len(_inks())) // max(1, len(maps))
    count -= 1 - count % 2  # an odd number has the colour in the middle, which stands for 0
    palette = Image.new("P", (1, 1))
    parts = [*own, _inks(), *(_colours(cmap, min(cmap.N, count)) for cmap in maps)]
    palette.putpalette(np.concatenate(parts).astype(np.uint8).ravel().tolist())
    return palette


def _of_picture(picture: Image.Image, without: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The commonest colours, and as few as stand for all, of a picture without the colours of its heat maps."""
    numbers, counts = np.unique(_numbered(np.reshape(picture, (-1, 3))), return_counts=True)
    other = ~np.isin(numbers, np.concatenate([numbers[:0], *map(_numbered, without)]))
    numbers = numbers[other][np.argsort(-counts[other])]
    colours = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], 1).astype(np.uint8)
    few = Image.fromarray(colours[None]).quantize(RARE)
    return colours[:COMMON], np.reshape(few.getpalette(), (-1, 3))


def _inks() -> np.ndarray:
    part = np.linspace(1, 0, SHADES, endpoint=False)[:, None]
    return np.concatenate([255 * (part * to_rgb(ink) + 1 - part) for ink in INKS])


def _colours(cmap: Colormap, count: int) -> np.ndarray:
    """Evenly spaced colours of a map."""
    return cmap(np.linspace(0, 1, count), bytes=True)[:, :3]


def _numbered(colours: np.ndarray) -> np.ndarray:
    return colours.astype(int) @ (1, 256, 65536)


def _with_white(colours: np.ndarray) -> np.ndarray:
    """Nearly white becomes white: Pillow takes the first colour that is near, which is grey beside a white page."""
    return np.where((colours >= 245).all(1, keepdims=True), 255, colours)
