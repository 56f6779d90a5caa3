"""What a public function asks of its arguments: each check names the rule that broke and the value that broke it.

A check returns what the function should go on with: numpy's and torch's whole numbers become an int, a float8 tensor
becomes float32 (torch does not compute in 8 bits).
"""

import math
import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

FLOAT32_MAX = torch.finfo(torch.float32).max


def check_int(value, name: str, low: int | None = None, high: int | None = None) -> int:
    """The value as an int; ValueError unless it is a whole number (no bool, no float) in low..high."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: a tensor on the meta device has no value
        number = None
    if number is None or (isinstance(value, Tensor) and (value.dtype == torch.bool or value.ndim)):
        raise ValueError(f"{name} must be an int, got {kind(value)}")
    if (low is not None and number < low) or (high is not None and number > high):
        if high is None:
            raise ValueError(f"{name} must be at least {low}, got {number}")
        raise ValueError(f"{name} must be {low}..{high}, got {number}")
    return number


def check_number(
    value, name: str, *, above: float | None = None, low: float = -math.inf, high: float = math.inf,
    infinite: bool = False,
):  # fmt: skip
    """The value as an int or float; ValueError unless it is a number (no bool) above `above`, in low..high.

    It must be finite, unless infinite, which lets infinity through.
    """
    is_scalar = getattr(value, "ndim", None) == 0 and not _is_meta(value)  # numpy's or torch's
    number = value.item() if is_scalar else value
    known = isinstance(number, int | float) and not isinstance(number, bool) and not math.isnan(number)
    if not known or (math.isinf(number) and not infinite):
        raise ValueError(f"{name} must be a {'' if infinite else 'finite '}number, got {kind(value)}")
    if (above is not None and not number > above) or not low <= number <= high:
        parts = [f"above {above:g}"] if above is not None else []
        parts += [f"at least {low:g}"] if low > -math.inf else []
        parts += [f"at most {high:g}"] if high < math.inf else []
        raise ValueError(f"{name} must be {' and '.join(parts)}, got {number!r}")
    return number


def check_choice(value, name: str, choices) -> str:
    """The value; ValueError unless it is one of these words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {kind(value)}")
    return value


def check_flag(value, name: str) -> bool:
    """The value as a bool; ValueError unless it is True or False (numpy's count)."""
    if type(value).__name__ not in ("bool", "bool_"):  # bool_: numpy 1's
        raise ValueError(f"{name} must be True or False, got {kind(value)}")
    return bool(value)


def check_tensor(x, name: str = "x") -> Tensor:
    """x; ValueError unless it is a dense tensor whose values are in memory."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} must be a tensor, got {kind(x)}")
    if x.layout != torch.strided or x.is_quantized:
        raise ValueError(f"{name} must be a dense tensor, got {x.dtype} of layout {x.layout}; pass x.to_dense()")
    if _is_meta(x):
        raise ValueError(f"{name} is on the meta device: it has a shape {tuple(x.shape)} and no values")
    return x


def check_real(x, name: str = "x") -> Tensor:
    """x, float8 as float32; ValueError unless it is a tensor of finite numbers within float32, at least one."""
    check_tensor(x, name)
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.numel() == 0:
        raise ValueError(f"{name} is empty, shape {tuple(x.shape)}")
    x = x.float() if x.element_size() == 1 else x
    low, high = (bound.item() for bound in torch.aminmax(x.detach()))  # a tenth of the time that isfinite takes
    if not math.isfinite(low + high) and not torch.isfinite(x).all():
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite values")
    if max(-low, high) > FLOAT32_MAX:
        raise ValueError(f"{name} must fit into float32, in which scales are kept; got {low:.4g}..{high:.4g}")
    return x


def check_codes(codes, name: str = "codes") -> Tensor:
    """codes; ValueError unless they are a tensor of whole numbers."""
    check_tensor(codes, name)
    if codes.is_floating_point() or codes.is_complex():
        raise ValueError(f"{name} must be integers, got {codes.dtype}; did you pass x instead of its codes?")
    return codes


def check_kind(value, name: str, of: type, such_as: str = ""):
    """value; ValueError unless it is an object of this class (with an example, such_as, in the message)."""
    if not isinstance(value, of):
        raise ValueError(f"{name} must be a {of.__name__}{such_as and f', such as {such_as}'}, got {kind(value)}")
    return value


def check_function(value, name: str, of: str) -> Callable:
    """The value; ValueError unless it can be called, and is no module (which can, but with a model's own inputs)."""
    if not callable(value) or isinstance(value, nn.Module):
        raise ValueError(f"{name} must be a function of {of}, got {kind(value)}")
    return value


def check_list(values, name: str) -> list:
    """The values as a list; ValueError unless they can be gone through one by one (a word, or no values, cannot)."""
    dense = not isinstance(values, Tensor) or (values.ndim and values.layout == torch.strided and not values.is_meta)
    if isinstance(values, str | bytes) or not isinstance(values, Iterable) or not dense:
        raise ValueError(f"{name} must be a list, got {kind(values)}")
    return values.tolist() if hasattr(values, "tolist") else list(values)


def check_path(path, name: str = "path") -> Path:
    """The path as a Path; ValueError unless it is a text or a Path."""
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"{name} must be a path, a text or a Path, got {kind(path)}")
    return Path(path).expanduser()


def check_file(path, name: str = "path") -> Path:
    """The path of a file that is there; ValueError unless it is a path, FileNotFoundError if there is no such file."""
    path = check_path(path, name)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return path


def check_model(model, name: str = "model", *, values: bool = True) -> nn.Module:
    """model; ValueError unless it is a language model of transformers itself, not its name; on meta if no values."""
    if isinstance(model, str):
        raise ValueError(f"{name} must be a model, got the name {model!r}; pass load_lm({model!r})[0]")
    if isinstance(model, tuple):
        raise ValueError(f"{name} must be a model, got a tuple; model, tokenizer = load_lm() gives both")
    if not isinstance(model, nn.Module) or not hasattr(text_config(model), "num_hidden_layers"):
        raise ValueError(f"{name} must be a language model of transformers, got {kind(model)}")
    if values and next(model.parameters()).is_meta:
        raise ValueError(f"{name} is on the meta device: its parameters have no values")
    return model


def text_config(model):
    """The configuration of a model's text part: its own, unless it reads pictures too. None if it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def longest_context(model) -> int:
    """How many tokens a model can read at once; 2**31 where its configuration names no limit (Bloom)."""
    config = text_config(model)
    names = ("max_position_embeddings", "max_seq_len", "seq_length")
    return next((n for n in (getattr(config, name, None) for name in names) if isinstance(n, int) and n > 0), 2**31)


def kind(value) -> str:
    """What a message says of a value: a tensor's dtype and shape, a short value itself, else its type.

    >>> kind(torch.zeros(2, 3)), kind(None), kind([0] * 99)
    ('a tensor (2, 3) of torch.float32', 'None', 'list')
    """
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    text = repr(value) if isinstance(value, str | int | float | bool | tuple | list | dict | None) else ""
    return text if 0 < len(text) <= 60 else type(value).__name__


def _is_meta(x) -> bool:
    return isinstance(x, Tensor) and x.is_meta
