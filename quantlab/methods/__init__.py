"""The ways to quantize a model, one small object each: what it rounds, its settings, and what it needs for that.

A new method is a new file here: a frozen dataclass that is a WeightMethod (round) or an IntegerMethod (layer), and a
line in METHODS.
"""

from dataclasses import fields
from functools import partial

from quantlab.arguments import check_choice
from quantlab.methods.awq import AWQ
from quantlab.methods.base import IntegerMethod, Method, WeightMethod, plain
from quantlab.methods.gptq import GPTQ
from quantlab.methods.int8 import W4A4, W8A8, LLMInt8, SmoothQuant
from quantlab.methods.nf4 import NF4
from quantlab.methods.rtn import RTN

__all__ = [
    "AWQ", "GPTQ", "METHODS", "NF4", "RTN", "W4A4", "W8A8", "IntegerMethod", "LLMInt8", "Method", "SmoothQuant",
    "WeightMethod", "method_of", "plain", "settings_of",
]  # fmt: skip

# The short names, as quantize_lm(method="gptq", bits=3) takes them.
METHODS = {
    "rtn": RTN,
    "nf4": NF4,
    "gptq": GPTQ,
    "awq": AWQ,
    "w8a8_dynamic": W8A8,
    "w8a8_static": partial(W8A8, per="static"),
    "smoothquant": SmoothQuant,
    "w4a4": W4A4,
    "llm_int8": LLMInt8,
}


def settings_of(name: str) -> list[str]:
    """The settings that a method of this short name takes."""
    made = METHODS[check_choice(name, "method", METHODS)]
    fixed = getattr(made, "keywords", {})  # of a partial
    return [field.name for field in fields(getattr(made, "func", made)) if field.name not in fixed]


def method_of(name, **settings) -> Method:
    """The method of a short name with these settings; a Method as it is.

    Raises: ValueError for an unknown name, a setting that the method does not take, or a value that it refuses.

    >>> method_of("gptq", bits=3)
    GPTQ(bits=3, group_size=128, symmetric=False, act_order=False, damping=0.01)
    """
    if isinstance(name, Method):
        if settings:
            raise ValueError(f"{name!r} has its settings already; got {', '.join(sorted(settings))} besides")
        return name
    known = settings_of(name)
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise ValueError(f"{name} takes {', '.join(known)}; got {', '.join(unknown)}")
    method = METHODS[name](**settings)
    if method.name != name:  # per="static" makes W8A8 a w8a8_static
        raise ValueError(f"{name} with {', '.join(f'{k}={v!r}' for k, v in settings.items())} is {method.name}")
    return method
