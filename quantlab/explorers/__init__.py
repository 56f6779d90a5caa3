"""Sliders around pictures, one file a subject. Nothing here computes what it shows beyond calling the library."""

from quantlab.explorers.base import Explorer
from quantlab.explorers.calibration import explore_calibration
from quantlab.explorers.codebook import explore_codebook
from quantlab.explorers.floats import explore_float_format
from quantlab.explorers.gptq import explore_columns, explore_gptq
from quantlab.explorers.granularity import explore_groups
from quantlab.explorers.integers import explore_accumulator, explore_speed
from quantlab.explorers.model import explore_bits, explore_temperature
from quantlab.explorers.outliers import explore_smoothing, explore_threshold
from quantlab.explorers.ranges import clipping_curves, explore_affine, explore_clipping
from quantlab.explorers.shift import explore_shift

__all__ = [
    "Explorer",
    "clipping_curves",
    "explore_accumulator",
    "explore_affine",
    "explore_bits",
    "explore_calibration",
    "explore_clipping",
    "explore_codebook",
    "explore_columns",
    "explore_float_format",
    "explore_gptq",
    "explore_groups",
    "explore_shift",
    "explore_smoothing",
    "explore_speed",
    "explore_temperature",
    "explore_threshold",
]
