"""LSQ: the step of the grid is learned together with the weights, by a gradient of its own."""

import math

import torch
from torch import Tensor, nn

from quantlab.arguments import check_real
from quantlab.blocks import block_sizes, from_blocks, mean_magnitude, to_blocks
from quantlab.granularity import Granularity, PerTensor, QTensor, code_range, symmetric_qtensor

TINY = torch.finfo(torch.float32).tiny  # the least scale, so that 1 / scale stays finite


class LSQ(nn.Module):
    """Learned step size: the scale of each block is a parameter with a gradient of its own (Esser et al. 2020).

        v̂ = s * round(clamp(v / s, qmin, qmax))      qmin = -2**(bits-1), qmax = 2**(bits-1) - 1
        ∂v̂/∂s = round(v / s) - v / s  inside, qmin or qmax where clamped                       eq. 3
        ∂v̂/∂v = 1  inside, 0 where clamped                                                     eq. 5

    The gradient of s is multiplied by g = 1 / sqrt(N qmax), N the weights that share it (sec. 2.2), and s starts at
    2 mean|v| / sqrt(qmax) (sec. 2.1).

    What is inside? mask="value", the paper: qmin < v / s < qmax. mask="code", torch's
    _fake_quantize_learnable_per_tensor_affine: qmin <= round(v / s) <= qmax. They differ in the half step beyond each
    end, and at the end itself. There the paper calls v clamped (∂v̂/∂s = qmax), torch calls it rounded (-0.5..0): two
    gradients of opposite sign from one value.

    x is the tensor to start from; per tensor, axis or group of it. A step that training drives below zero counts by
    its magnitude. Raises: ValueError if bits is not 2..8, x is not finite, or mask is another word.

    >>> lsq = LSQ(torch.tensor([-1.0, 0.25, 0.75, 4.0]), bits=2)
    >>> lsq.step.item(), lsq(torch.tensor([-1.0, 0.25, 0.75, 4.0])).tolist()
    (3.0, [-0.0, 0.0, 0.0, 3.0])
    """

    def __init__(self, x: Tensor, *, bits: int, granularity: Granularity | None = None, mask: str = "value"):
        super().__init__()
        check_real(x)
        self.bits, self.granularity, self.mask = bits, granularity or PerTensor(), mask
        self.qmin, self.qmax = code_range(bits, symmetric=True)
        if mask not in ("value", "code"):
            raise ValueError(f'mask must be "value" (the paper) or "code" (torch), got {mask!r}')
        start = 2 * mean_magnitude(x.detach(), self.granularity) / math.sqrt(self.qmax)
        keep = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.step = nn.Parameter(start.clamp(min=TINY).to(keep))
        sharing = block_sizes(x, self.granularity)
        self.register_buffer("gradient_scale", (sharing * self.qmax).rsqrt().to(keep))

    @property
    def scale(self) -> Tensor:
        """The steps in use, > 0, (blocks, 1)."""
        return self.step.abs().clamp(min=TINY)

    def forward(self, x: Tensor) -> Tensor:
        """x on the learned grid, as floats; gradients for x and for the steps."""
        blocks = self._blocks(x)
        ends = (self.qmin, self.qmax, self.mask == "code")
        rounded = _LearnedStep.apply(blocks, self.scale, self.gradient_scale, *ends)
        return from_blocks(rounded, self.granularity, x.shape)

    def quantized(self, x: Tensor) -> QTensor:
        """The same values as codes and scales."""
        scale = self.scale.detach().float()
        codes = torch.round(self._blocks(x.detach()) * (1 / scale)).clamp(self.qmin, self.qmax)
        return symmetric_qtensor(x, codes, scale, self.bits, self.granularity)

    def _blocks(self, x: Tensor) -> Tensor:
        check_real(x)
        blocks = to_blocks(x, self.granularity)
        if len(blocks) != len(self.step):
            raise ValueError(f"there are {len(self.step)} steps, and x has {len(blocks)} blocks")
        return blocks


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, gradient_scale, qmin, qmax, by_code):
        ratio = x * (1 / scale).to(x.dtype)
        codes = torch.round(ratio)
        if by_code:
            low, high = codes < qmin, codes > qmax
        else:
            low, high = ratio <= qmin, ratio >= qmax
        inside = ~(low | high)
        ctx.save_for_backward(inside, torch.where(inside, codes - ratio, qmin * low + qmax * high), gradient_scale)
        return (scale * codes.clamp(qmin, qmax)).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inside, of_scale, gradient_scale = ctx.saved_tensors
        into_scale = (grad * of_scale).sum(1, keepdim=True) * gradient_scale
        return grad * inside, into_scale, None, None, None, None
