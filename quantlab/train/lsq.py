"""LSQ: the step of the grid is learned together with the weights, by a gradient of its own."""

import math

import torch
from torch import Tensor, nn

from quantlab.arguments import FLOAT32_MAX, check_choice, check_number, check_real
from quantlab.blocks import Granularity, PerTensor, block_sizes, from_blocks, mean_magnitude, to_blocks
from quantlab.granularity import QTensor, code_range, symmetric_qtensor
from quantlab.train.few_levels import SMALLEST_SCALE, in_steps
from quantlab.train.rounding import Rounding


class LSQ(Rounding):
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

    x is the tensor to start from; per tensor, axis or group of it. start multiplies the first steps. A step that
    training drives below zero counts by its magnitude.

    Raises: ValueError if bits is not 2..8, start is not above 0, x is not finite, or mask is another word.

    >>> lsq = LSQ(torch.tensor([-1.0, 0.25, 0.75, 4.0]), bits=2)
    >>> lsq.step.item(), lsq(torch.tensor([-1.0, 0.25, 0.75, 4.0])).tolist()
    (3.0, [-0.0, 0.0, 0.0, 3.0])
    """

    def __init__(
        self, x: Tensor, *, bits: int, granularity: Granularity | None = None, mask: str = "value", start: float = 1.0
    ):
        super().__init__()
        x = check_real(x).detach()
        self.granularity = PerTensor() if granularity is None else granularity
        self.mask = check_choice(mask, "mask", ("value", "code"))
        self.qmin, self.qmax = code_range(bits, symmetric=True)
        self.bits = self.qmax.bit_length() + 1
        start = (
            2
            * mean_magnitude(x, self.granularity)
            / math.sqrt(self.qmax)
            * check_number(start, "start", above=0, high=1000)
        )
        self.step = nn.Parameter(start.clamp(min=SMALLEST_SCALE).float())
        self.register_buffer("gradient_scale", (block_sizes(x, self.granularity) * self.qmax).rsqrt().float())

    @property
    def scale(self) -> Tensor:
        """The steps in use, > 0, (blocks, 1), float32 whatever the dtype of the parameter: as scales are stored."""
        return self.step.float().abs().clamp(min=SMALLEST_SCALE)

    def forward(self, x: Tensor) -> Tensor:
        """x on the learned grid, as floats; gradients for x and for the steps."""
        x = check_real(x)
        ends = (self.qmin, self.qmax, self.mask == "code")
        rounded = _LearnedStep.apply(self._blocks(x), self.scale, self.gradient_scale, *ends)
        return from_blocks(rounded, self.granularity, x.shape)

    def quantized(self, x: Tensor) -> QTensor:
        """The same values as codes and scales."""
        x, scale = check_real(x).detach(), self.scale.detach()
        codes = in_steps(self._blocks(x), scale).round().clamp(self.qmin, self.qmax)
        return symmetric_qtensor(x, codes, scale, self.bits, self.granularity)

    def _blocks(self, x: Tensor) -> Tensor:
        blocks = to_blocks(x, self.granularity)
        if len(blocks) != len(self.step):
            raise ValueError(f"there are {len(self.step)} steps, and x has {len(blocks)} blocks")
        return blocks


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, gradient_scale, qmin, qmax, by_code):
        ratio = in_steps(x, scale)
        codes = torch.round(ratio)
        if by_code:
            low, high = codes < qmin, codes > qmax
        else:
            low, high = ratio <= qmin, ratio >= qmax
        inside = ~(low | high)
        ctx.save_for_backward(inside, torch.where(inside, codes - ratio, qmin * low + qmax * high), gradient_scale)
        limit = min(torch.finfo(x.dtype).max, FLOAT32_MAX)  # a finite number must not become infinity
        return (scale * codes.float().clamp(qmin, qmax)).clamp(-limit, limit).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inside, of_scale, gradient_scale = ctx.saved_tensors
        into_scale = (grad * of_scale).sum(1, keepdim=True) * gradient_scale
        return grad * inside, into_scale, None, None, None, None
