"""Sliders around pictures, one file a subject.

All quantizing is the library's: a file here chooses settings, compares and counts what comes back, and draws it.
"""

from quantlab.explorers.accumulator import explore_accumulator
from quantlab.explorers.activations import explore_activations, loudness
from quantlab.explorers.awq import explore_scaling
from quantlab.explorers.base import Explorer
from quantlab.explorers.calibration import explore_calibration
from quantlab.explorers.capstone import explore_capstone
from quantlab.explorers.codebook import explore_codebook
from quantlab.explorers.floats import explore_float_format
from quantlab.explorers.gptq import explore_columns, explore_gptq
from quantlab.explorers.granularity import explore_groups
from quantlab.explorers.hunt import explore_hunt
from quantlab.explorers.kv import explore_cache, explore_kv
from quantlab.explorers.lora import explore_rank
from quantlab.explorers.mixed import explore_budget
from quantlab.explorers.model import explore_bits, explore_temperature
from quantlab.explorers.ranges import clipping_curves, explore_affine, explore_clipping
from quantlab.explorers.rotations import explore_angle, explore_blocks
from quantlab.explorers.shift import explore_shift
from quantlab.explorers.smoothing import explore_smoothing
from quantlab.explorers.speed import explore_speed
from quantlab.explorers.steps import explore_step
from quantlab.explorers.superblocks import explore_super_blocks
from quantlab.explorers.threshold import explore_threshold
from quantlab.explorers.training import explore_training

__all__ = [
    "Explorer",
    "clipping_curves",
    "explore_accumulator",
    "explore_activations",
    "explore_affine",
    "explore_angle",
    "explore_bits",
    "explore_blocks",
    "explore_budget",
    "explore_cache",
    "explore_calibration",
    "explore_capstone",
    "explore_clipping",
    "explore_codebook",
    "explore_columns",
    "explore_float_format",
    "explore_gptq",
    "explore_groups",
    "explore_hunt",
    "explore_kv",
    "explore_rank",
    "explore_scaling",
    "explore_shift",
    "explore_smoothing",
    "explore_speed",
    "explore_step",
    "explore_super_blocks",
    "explore_temperature",
    "explore_threshold",
    "explore_training",
    "loudness",
]
