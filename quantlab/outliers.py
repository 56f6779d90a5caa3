"""Outlier channels of activations: planted without changing a model, smoothed into the weights, or kept in float."""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.affine import QParams
from quantlab.arguments import (
    FLOAT32_MAX,
    check_int,
    check_kind,
    check_list,
    check_model,
    check_number,
    check_real,
    longest_context,
    text_config,
)  # fmt: skip
from quantlab.linear import Int8Linear
from quantlab.modules import device_of, evaluating, hooked, is_linear, weight_of


def plant_outliers(model, *, channels, factor: float):
    """A new model with the same outputs, in which these channels are `factor` times as large where linear layers read.

    The gain (and bias) of each norm is multiplied, and the columns of the linear layers that read it are divided:
    x' = x · d and W' = W / d give x' W'ᵀ = x Wᵀ for any d > 0. Large language models grow such channels by themselves
    (Dettmers et al. 2022, LLM.int8()); a small one needs them planted to show what they do.

    channels: indices into the hidden state. Raises: ValueError if one does not exist, factor is not a positive number,
    or the model's norms are read by more than linear layers, so that its outputs would change.
    """
    factor = check_number(factor, "factor", above=0, high=FLOAT32_MAX)
    new = copy.deepcopy(check_model(model)).eval()
    readers = norm_readers(new)
    width = len(readers[0][0].weight)
    channels = [check_int(c, "a channel", 0, width - 1) for c in check_list(channels, "channels")]
    stretch = torch.ones(width, dtype=torch.float32)
    stretch[channels] = factor
    for norm, layers in readers:
        _move(norm, layers, stretch)
    return check_same_outputs(model, new)


def smooth(model, activation_scales: dict[str, Tensor], *, alpha: float = 0.5):
    """SmoothQuant: a new model with the same outputs, its activations' outliers moved into the weights.

        s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),   X' = X / s,   W' = W · s       Xiao et al. 2023, eq. 4

    1 / s goes into the norm before the layers, so nothing more is computed; layers that read one norm (q, k, v; gate,
    up) share one s, with the largest |W_j| of them all. Layers that no norm feeds (o, down) stay as they are.

    activation_scales: max|x| of each input channel, (in,), by layer name: quantlab.lm.activation_scales.
    Raises: ValueError if alpha is not in 0..1, or the scales of a layer are missing or of another width.
    """
    alpha = check_number(alpha, "alpha", low=0, high=1)
    check_kind(activation_scales, "activation_scales", Mapping, "quantlab.lm.activation_scales gives")
    new = copy.deepcopy(check_model(model)).eval()
    names = {module: name for name, module in new.named_modules()}
    for norm, layers in norm_readers(new):
        name = next((names[layer] for layer in layers if names[layer] in activation_scales), names[layers[0]])
        if not any(part.isdecimal() for part in name.split(".")):
            continue  # no number of a block in its name: what the final norm feeds stays a float
        if name not in activation_scales:
            raise ValueError(f"no activation scales for {name!r}; quantlab.lm.activation_scales gives them all")
        _move(norm, layers, 1 / smoothing_scales(activation_scales[name], layers, alpha))
    return check_same_outputs(model, new)


def smoothing_scales(largest_x: Tensor, layers: list[nn.Module], alpha: float) -> Tensor:
    """SmoothQuant's s for layers that read one input, (in,), float32; 1 where the channel is silent or unused."""
    largest_x = check_real(largest_x, "the activation scales")
    alpha, layers = check_number(alpha, "alpha", low=0, high=1), check_list(layers, "layers")
    if not layers:
        raise ValueError("no layers to smooth the input of")
    largest_w = torch.stack([weight_of(layer).abs().amax(0) for layer in layers]).amax(0).float()
    if largest_x.shape != largest_w.shape:
        raise ValueError(f"{largest_x.numel()} activation scales for {len(largest_w)} input channels")
    s = largest_x.float() ** alpha / largest_w ** (1 - alpha)
    return torch.where((largest_x > 0) & (largest_w > 0), s, torch.ones_like(s)).clamp(1e-5, 1e5)


def norm_readers(model) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Each norm inside the model with the linear layers that read its output, found by running some tokens.

    Works for any decoder whose linear layers read the norm's tensor itself (Llama, Qwen, OPT, GPT-2 ...). A head that
    shares its weight with the embedding is left out: its columns cannot be changed.

    Raises: ValueError if no norm is read by linear layers alone.
    """
    written: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    read: dict[nn.Module, list[nn.Module]] = {}

    def record_output(module, _inputs, output):
        written[id(output)] = (module, output)

    def record_input(module, inputs):
        if id(inputs[0]) in written:
            read.setdefault(written[id(inputs[0])][0], []).append(module)

    head = check_model(model).get_output_embeddings()
    linears = [m for m in model.modules() if is_linear(m) and m is not head]
    norms = [m for m in model.modules() if not is_linear(m) and getattr(getattr(m, "weight", None), "ndim", 0) == 1]
    before, after = dict.fromkeys(linears, record_input), dict.fromkeys(norms, record_output)
    with hooked(before), hooked(after, after=True):
        _logits(model)
    width = text_config(model).hidden_size
    found = [(norm, layers) for norm, layers in read.items() if len(norm.weight) == width]
    if not found:
        raise ValueError(f"no norm of {type(model).__name__} is read by linear layers")
    return found


class LLMInt8Linear(Int8Linear):
    """LLM.int8() (Dettmers et al. 2022): 8-bit integers, but the input columns with outliers stay in float.

    A column is an outlier if any |x| in it reaches the threshold (6.0 in the paper). The others are quantized vector by
    vector, each token and each row of the weight to -127..127 by its largest magnitude. The float part multiplies
    the outlier columns with those of the dequantized weight: no float copy of the weight is kept.
    """

    def __init__(self, linear: nn.Linear, *, threshold: float = 6.0):
        super().__init__(linear)
        self.threshold = check_number(threshold, "threshold", above=0, infinite=True)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, threshold: float = 6.0) -> "LLMInt8Linear":
        """A new layer with linear's weight in int8; linear itself is not changed."""
        return cls(linear, threshold=threshold)

    @staticmethod
    def quantized_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
        check_real(weight, "the weight")
        largest = weight.float().abs().amax(1).clamp(min=4e-37)  # 127 / 4e-37 is still a float32
        codes = torch.round(weight.float() * (127 / largest)[:, None])
        return codes.to(torch.int8), largest / 127

    def outlier_columns(self, x: Tensor) -> Tensor:
        """Which input columns of x (..., in) stay in float: (in,) bool."""
        return (x.abs() >= self.threshold).reshape(-1, x.shape[-1]).any(0)

    def input_qparams(self, x: Tensor) -> QParams:
        largest = x.abs().amax(1, keepdim=True)
        scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
        return QParams(scale, torch.full_like(scale, 128, dtype=torch.int32), 1, 255)

    def _one_map(self, x: Tensor) -> None:
        return None

    def _layer(self, x: Tensor, way) -> Tensor:
        return super()._layer(x, lambda flat: self._split(flat, way))

    def _split(self, x: Tensor, way) -> Tensor:
        check_real(x)
        columns = self.outlier_columns(x)
        if not columns.any():
            return way(x)
        weight = self.weight_scale[:, None] * self.codes[:, columns]
        return way(x.masked_fill(columns, 0.0)) + F.linear(x[:, columns], weight)


def _move(norm: nn.Module, layers: list[nn.Module], stretch: Tensor) -> None:
    """Multiply a norm's channels and divide the columns that read them, in place (they belong to a new model)."""
    with torch.no_grad():
        for parameter in (norm.weight, getattr(norm, "bias", None)):
            if parameter is not None:
                parameter.mul_(stretch.to(parameter))
        for layer in layers:
            weight_of(layer).div_(stretch.to(layer.weight))


def check_same_outputs(model, new):
    """The new model, if it computes what the old one does."""
    before, after = _logits(model), _logits(new)
    # Of a whole model, relative to its largest output.
    rounding = max(1e-4, 16 * torch.finfo(before.dtype).eps)
    off = ((before - after).abs().max() / before.abs().max()).item()
    if not off <= rounding:  # NaN too
        raise ValueError(
            f"the outputs of {type(model).__name__} would change by {off:.1%}: something besides linear layers "
            "reads its norms, or a norm does not multiply by its weight alone"
        )
    return new


def _logits(model) -> Tensor:
    """What the model says after some tokens of its vocabulary, without dropout; the model is left as it was."""
    config = text_config(model)
    count = min(64, config.vocab_size, longest_context(model))
    ids = torch.linspace(0, config.vocab_size - 1, count, dtype=torch.float64, device=device_of(model)).long()
    with torch.no_grad(), evaluating(model):
        return model(ids[None], use_cache=False).logits
