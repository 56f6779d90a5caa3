"""A layer whose input has outlier channels: what the sliders of threshold.py and smoothing.py turn."""

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from quantlab.arguments import check_int
from quantlab.explorers.data import check_layer, evenly

FACTORS = (1, 3, 10, 30, 100, 300)
_TOKENS, _ROWS = 256, 512  # of the layer: the error of its output needs no more, and sliders must not wait


def stretched_layers(weight: Tensor, x: Tensor, channels) -> dict[tuple, tuple[Tensor, Tensor]]:
    """{(factor, planted): (weight, x)} for every place of the two controls, of at most 512 rows and 256 tokens.

    The columns `channels` of x are multiplied by the factor; planted ones of the weight are divided by it, so that the
    product stays. Raises: ValueError if weight and x do not fit together, or a channel does not exist.
    """
    weight, x = check_layer(weight, x)
    weight, x = evenly(weight, _ROWS), evenly(x, _TOKENS)
    channels = [check_int(channel, "a channel", 0, weight.shape[1] - 1) for channel in channels]
    layers = {}
    for planted in (True, False):
        for factor in FACTORS:
            stretch = torch.ones(weight.shape[1])
            stretch[channels] = float(factor)
            layers[factor, planted] = weight / stretch if planted else weight, x * stretch
    return layers


def measured(measure, layers: dict) -> dict:
    """{(factor, planted): measure(weight, x)}, with a bar of progress."""
    return {case: measure(*layer) for case, layer in tqdm(layers.items(), desc="quantizing", leave=False)}


def factor_controls(factor: int, planted: bool) -> tuple[widgets.SelectionSlider, widgets.Checkbox]:
    """The controls that choose a stretched layer."""
    return (
        widgets.SelectionSlider(options=FACTORS, value=factor, description="factor"),
        widgets.Checkbox(planted, description="planted: weights ÷ factor", indent=False),
    )


def positive_range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and the largest value above 0: what a logarithmic axis can show."""
    values = values[values > 0]
    return (values.min(), values.max()) if len(values) else (1.0, 1.0)
