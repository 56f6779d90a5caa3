"""Sliders around pictures, one file a subject. Nothing here computes what it shows beyond calling the library."""

from quantlab.explorers.base import Explorer
from quantlab.explorers.gptq import explore_columns, explore_gptq
from quantlab.explorers.model import explore_bits, explore_temperature
from quantlab.explorers.ranges import clipping_curves, explore_affine, explore_clipping

__all__ = [
    "Explorer",
    "clipping_curves",
    "explore_affine",
    "explore_bits",
    "explore_clipping",
    "explore_columns",
    "explore_gptq",
    "explore_temperature",
]
