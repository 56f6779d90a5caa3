"""A linear layer whose weight stays packed, whatever kind of quantized tensor it is, and is decoded in each call."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlab.arguments import check_kind, check_real, check_tensor
from quantlab.blocks import Granularity, PerGroup
from quantlab.granularity import quantize_tensor
from quantlab.modules import check_linear, weight_of
from quantlab.quantized import Quantized


class KeepsScales(nn.Module):
    """A module whose float buffers stay float32 under .half(), .to(dtype): a rounded scale would be another grid."""

    def _apply(self, fn, *arguments, **options):
        floats = {name: b for name, b in self.named_buffers(recurse=False) if b.is_floating_point()}
        super()._apply(fn, *arguments, **options)
        for name, value in floats.items():
            setattr(self, name, value.to(getattr(self, name).device))
        return self


class PackedLinear(KeepsScales):
    """y = x Ŵᵀ + b, where Ŵ, (out, in), is kept as the packed parts of a quantized tensor, and decoded in every call.

    It is smaller, and by itself no faster: each call unpacks and writes the whole float weight. On the way back
    dL/dx = dL/dy Ŵ, where Ŵ is decoded a second time rather than kept; the weight itself has no gradient.

    Raises: ValueError if q is no quantized matrix, or an input is not floats of in_features.

    >>> layer = PackedLinear.from_linear(nn.Linear(256, 8), bits=4)
    >>> layer.nbytes, layer(torch.zeros(2, 256)).shape      # 1,024 bytes of codes, 64 of scales, 8 of zero points
    (1096, torch.Size([2, 8]))
    """

    def __init__(self, q: Quantized, bias: Tensor | None = None):
        super().__init__()
        if len(check_kind(q, "q", Quantized, "quantize_tensor gives").shape) != 2:
            raise ValueError(f"need a quantized weight (out, in), got shape {tuple(q.shape)}")
        bias = bias if bias is None else check_real(bias, "bias")
        if bias is not None and bias.shape != q.shape[:1]:
            raise ValueError(f"a bias {tuple(bias.shape)} does not fit a weight {tuple(q.shape)}")
        self.out_features, self.in_features = q.shape
        self._of, self._settings, self._names = type(q), q.settings(), {}
        for part, value in q.parts().items():
            self._names[part] = part.replace(".", "_")  # a buffer's name has no dot
            self.register_buffer(self._names[part], value.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, bits: int = 4, granularity: Granularity | None = None, symmetric: bool = False
    ) -> "PackedLinear":
        """A new layer with linear's weight rounded to nearest (default: groups of 128); linear is not changed."""
        weight = weight_of(check_linear(linear)).contiguous()
        q = quantize_tensor(
            weight, bits=bits, granularity=PerGroup(128) if granularity is None else granularity, symmetric=symmetric
        )
        return cls(q, linear.bias)

    @property
    def q(self) -> Quantized:
        """The quantized weight, unpacked: codes and what stands beside them."""
        return self._of.from_parts({part: getattr(self, name) for part, name in self._names.items()}, self._settings)

    @property
    def weight(self) -> Tensor:
        """Ŵ, (out, in), as floats: decoded anew each time."""
        return self.q.dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored weight: packed codes, and all that stands beside them."""
        return sum(getattr(self, name).nbytes for name in self._names.values())

    def forward(self, x: Tensor) -> Tensor:
        if not check_tensor(x).is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise ValueError(f"x must be floats of {self.in_features} features, got {x.dtype} {tuple(x.shape)}")
        return _Decoding.apply(x, self, self.bias)

    def to_linear(self) -> nn.Linear:
        """The same layer with its decoded weight as floats, frozen."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self._of.__name__}, {8 * self.nbytes} bits"


WeightOnlyLinear = PackedLinear  # the public name of the same layer


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """The packed layers of a model by full name."""
    of = check_kind(model, "model", nn.Module)
    return {name: m for name, m in of.named_modules() if isinstance(m, PackedLinear)}


class _Decoding(torch.autograd.Function):
    """x Ŵᵀ + bias that decodes Ŵ again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: PackedLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ ctx.layer.weight.to(grad.dtype), None, None
