"""Entries to learn from: one that has all the bytes and nothing in them, and one that has the same in fewer."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from quantlab.arguments import check_int, check_kind
from quantlab.capstone.recipes import Made
from quantlab.granularity import QTensor
from quantlab.lm.walk import with_codes


def shuffled(model, codes: Mapping, *, seed: int = 0) -> Made:
    """The same codes in another order within each matrix: every byte of the file is there, and says nothing."""
    random, dealt = torch.Generator().manual_seed(check_int(seed, "seed", 0, 2**63)), {}
    for name, q in _affine(codes).items():
        order = torch.randperm(q.codes.numel(), generator=random)
        dealt[name] = replace(q, codes=q.codes.flatten()[order].view_as(q.codes))
    return with_codes(model, dealt)


def _half(scale):
    """In float16, above 0: the smallest number there is 2^-24."""
    return scale.clamp(min=2.0**-24).half()


def with_half_scales(model, codes: Mapping) -> Made:
    """The same codes with their scales in float16: half the bytes of the scales, and weights that are off by 0.05%."""
    halved = {
        name: replace(q, qparams=replace(q.qparams, scale=_half(q.qparams.scale))) for name, q in _affine(codes).items()
    }
    return with_codes(model, halved)


def _affine(codes: Mapping) -> dict[str, QTensor]:
    of = check_kind(codes, "codes", Mapping, "a recipe gives")
    return {name: check_kind(q, f"codes[{name!r}]", QTensor, "quantize_tensor gives") for name, q in of.items()}
