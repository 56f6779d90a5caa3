"""The colours of an explorer's pictures, 256 at most, chosen once: so few are encoded in a quarter of the time."""

from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.colors import Colormap, to_rgb
from matplotlib.image import AxesImage
from PIL import Image

from quantlab.plots import CLIPPED, ERROR, FLOAT, OTHER, QUANTIZED

INKS = FLOAT, QUANTIZED, ERROR, CLIPPED, OTHER, "#E69F00", "#56B4E9", "black", "#B396A6"  # the last: CLIPPED over FLOAT
SHADES = 6  # of each ink on white, as the edge of a line has them
COMMON = 16  # the commonest colours of the first picture are kept as they are
RARE = 48  # and so many stand for its others


def palette_of(first: Image.Image, moving: Sequence[Artist]) -> Image.Image:
    """Colours of the first picture, of lines that only later pictures may have, and of the moving heat maps."""
    maps = []
    for artist in moving:
        if isinstance(artist, AxesImage) and artist.cmap not in maps:
            maps.append(artist.cmap)
    most = (256 - COMMON - RARE - SHADES * len(INKS)) // max(1, len(maps))
    most -= 1 - most % 2  # an odd number has the colour in the middle, which stands for 0
    own = _of_picture(first, [_colours(cmap, cmap.N) for cmap in maps])
    parts = [own, _inks(), *(_colours(cmap, min(cmap.N, most)) for cmap in maps)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.concatenate(parts).astype(np.uint8).ravel().tolist())
    return palette


def _of_picture(first: Image.Image, heat: list[np.ndarray]) -> np.ndarray:
    """Colours of the first picture, without those of its heat maps and their colour bars."""
    pixels = _with_white(np.reshape(first, (-1, 3))).astype(int)
    numbers, counts = np.unique(pixels @ (1, 256, 65536), return_counts=True)
    colours = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], 1)
    for each in heat:  # a colour bar is drawn in nearly the colours of its map
        other = abs(colours[:, None] - each.astype(int)).max(2).min(1) > 4
        colours, counts = colours[other], counts[other]
    colours = colours[np.argsort(-counts)].astype(np.uint8)
    common, others = colours[:COMMON], colours[COMMON:]
    if len(others) > RARE:
        others = np.reshape(Image.fromarray(others[None]).quantize(RARE).getpalette(), (-1, 3))
    return np.concatenate([common, others])


def _inks() -> np.ndarray:
    part = np.linspace(1, 0, SHADES, endpoint=False)[:, None]
    return np.rint(np.concatenate([255 * (part * to_rgb(ink) + 1 - part) for ink in INKS]))


def _colours(cmap: Colormap, count: int) -> np.ndarray:
    """Evenly spaced colours of a map."""
    return cmap(np.linspace(0, 1, count), bytes=True)[:, :3]


def _with_white(colours: np.ndarray) -> np.ndarray:
    """Nearly white becomes white: Pillow compares colours rounded down to multiples of 4; a grey of 250 might win."""
    return np.where((colours >= 245).all(1, keepdims=True), 255, colours)
