"""What exercises and their notebooks work on: made-up layers and texts. Each is the same in every call."""

import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quantlab.hessian import Hessian
from quantlab.metrics import kl_divergence

# Two children's stories: one to calibrate on, one to measure on.
CHINESE = (
    "从前有一个小女孩，她每天都去森林里玩。有一天，她遇见了一只大熊。熊说：“你好！你想吃蜂蜜吗？”小女孩很高兴。"
    "她坐在大树下，和熊一起吃蜂蜜。太阳下山的时候，妈妈在门口等她回家。“明天我还想去看它。”她说。",
    "山上有一座小房子，里面住着一位老爷爷和他的狗。冬天来了，雪下得很大，他们没有木柴。狗跑到村子里，叫来了孩子们。"
    "孩子们带来了木柴，老爷爷给他们讲了一个很长的故事。",
)


def student_t(freedom: int, count: int, *, seed: int) -> Tensor:
    """Values of Student's t, (count,): a normal one over the root mean square of `freedom` others.

    >>> student_t(3, 100_000, seed=0).abs().median() < 1 < student_t(3, 100_000, seed=0).abs().max()
    tensor(True)
    """
    z = torch.randn(freedom + 1, count, generator=torch.Generator().manual_seed(seed))
    return z[0] / z[1:].square().mean(0).sqrt()


def layer_in_runs() -> tuple[Tensor, Tensor]:
    """(weight, x), (64, 384) and (512, 384): the columns of the weight come in runs of 64 of unequal size (3.6)."""
    random = torch.Generator().manual_seed(0)
    sizes = torch.exp(0.8 * torch.randn(64, 6, generator=random)).repeat_interleave(64, dim=1)
    weight = torch.randn(64, 384, generator=random) * 0.05 * sizes
    return weight, torch.randn(512, 384, generator=random) * torch.exp(0.7 * torch.randn(384, generator=random))


def layer_with_outliers() -> tuple[nn.Linear, Tensor]:
    """(layer, x), 128 -> 96 and (256, 128): four outlier channels of different size, ordinary ones beyond 6 (9.4)."""
    random = torch.Generator().manual_seed(7)
    layer = nn.Linear(128, 96, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.randn(96, 128, generator=random) * 0.05)
    x = 2.5 * torch.randn(256, 128, generator=random).clamp(-3.6, 3.6)
    for channel, size in ((5, 20.0), (40, 60.0), (77, 200.0), (101, 35.0)):
        x[:, channel] = size * torch.randn(256, generator=random).clamp(-2, 2)
    return layer, x


def correlated_layer(rows: int, columns: int, tokens: int) -> tuple[Tensor, Tensor]:
    """(weight, x), (rows, columns) and (tokens, columns): the columns of x are correlated (chapter 10)."""
    random = torch.Generator().manual_seed(3)
    basis = torch.randn(columns, columns, generator=random) / columns**0.5
    x = (torch.randn(tokens, columns, generator=random) * torch.arange(1, columns + 1) ** -0.7 * 3) @ basis
    weight = torch.randn(rows, columns, generator=random) * 0.05
    return weight, x + 0.05 * torch.randn(tokens, columns, generator=random)


def layer_with_hessian(*, fresh: bool = False) -> tuple[Tensor, Hessian]:
    """(weight, hessian), (256, 256) both, of correlated inputs; fresh: of 2048 other tokens of the same kind (10.5)."""
    weight, x = correlated_layer(256, 256, 4096)
    return weight, Hessian(256).add(x[2048:] if fresh else x[:2048])


def layer_with_peaks(seed: int = 11) -> tuple[Tensor, Tensor]:
    """(weight, x), (128, 256) and (2000, 256): loud channels, some hardly used, and channels of one rare peak (11.4).

    Which channels they are depends on the seed. float16 holds the weight exactly, so a column kept in float takes 16
    bits a weight.
    """
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(128, 256, generator=random) * 0.05
    x = torch.randn(2000, 256, generator=random)
    loud, unused, peaks = torch.randperm(256, generator=random)[:13].split((4, 3, 6))
    x[:, loud] *= torch.tensor([14.0, 18.0, 12.0, 16.0])
    x[:, unused] *= 25.0
    weight[:, unused] *= 0.001
    for column in peaks:
        x[torch.randint(2000, (2,), generator=random), column] = 90.0
    return weight.half().float(), x


def planted_layer(seed: int = 12) -> tuple[Tensor, Tensor]:
    """(weight, x), (128, 256) and (600, 256): six channels 100 times as loud, their weights a hundredth (11.5).

    Which channels they are depends on the seed.
    """
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(128, 256, generator=random) * 0.05
    x = torch.randn(600, 256, generator=random) * (0.3 * torch.randn(256, generator=random)).exp()
    channels = torch.randperm(256, generator=random)[:6]
    stretch = torch.ones(256).index_fill(0, channels, 100.0)
    return weight / stretch, x * stretch


def layer_to_train() -> tuple[Tensor, Tensor, Tensor]:
    """(weight, x, fresh), (32, 64) and twice (1536, 64): inputs to train on, and inputs to be judged on (14.5)."""
    random = torch.Generator().manual_seed(14)
    mix = torch.randn(64, 64, generator=random) / 8 * torch.arange(1, 65) ** -0.6 * 4
    inputs = torch.randn(3072, 64, generator=random) @ mix + 0.1 * torch.randn(3072, 64, generator=random)
    return torch.randn(32, 64, generator=random) * 0.05, inputs[:1536], inputs[1536:]


def uniform(random: torch.Generator, low: float, high: float) -> float:
    """A number between two others.

    >>> 2 < uniform(torch.Generator().manual_seed(0), 2.0, 3.0) < 3
    True
    """
    return low + (high - low) * torch.rand(1, generator=random, dtype=torch.float64).item()


def whole(random: torch.Generator, low: int, high: int) -> int:
    """A whole number from low up to, but not including, high.

    >>> 2 <= whole(torch.Generator().manual_seed(0), 2, 5) < 5
    True
    """
    return int(torch.randint(low, high, (), generator=random))


def six_channels(width: int) -> list[int]:
    """The six channels of `width` that notebooks make loud: the first, and then each 5/32 of the width further on.

    >>> six_channels(256)
    [0, 40, 80, 120, 160, 200]
    """
    return [width * 5 // 32 * k for k in range(6)]


def off_ties(random: torch.Generator, count: int, low: int, high: int) -> Tensor:
    """Numbers (count,) that no right answer rounds differently: whole ones of low..high, up to 0.4 to either side.

    >>> off_ties(torch.Generator().manual_seed(0), 5, -1, 1).abs().max() <= 1.4
    tensor(True)
    """
    whole = torch.randint(low, high + 1, (count,), generator=random)
    return whole + 0.8 * torch.rand(count, generator=random) - 0.4


class Yardstick:
    """KL of many quantized models to one float model, whose logits are kept (chapter 16).

    tokens (n,) are read in windows of 128, and the calibration tokens too; n is a multiple of 128.
    """

    def __init__(self, model, tokens: Tensor, calibration: Tensor):
        self.model, self.tokens, self.calibration = model, tokens, calibration
        self.logits, self.known = self._read(model), {}

    def _read(self, model) -> Tensor:
        with torch.no_grad():
            return model(self.tokens.view(-1, 128), use_cache=False).logits.float()

    def quantized(self, method):
        """The model quantized by a method of quantlab.methods."""
        from quantlab.lm import quantize_lm  # here: most exercises need no language model, whose import takes seconds

        tokens = self.calibration if method.needs_data else None
        return quantize_lm(self.model, tokens, method, window=128, progress=False)[0]

    def kl(self, method, model=None, *, keep=()) -> float:
        """Mean KL after this method, measured once; model: what it gave already; keep: layers that stay float."""
        key = (method, *keep)
        if key not in self.known:
            model = self.quantized(method) if model is None else model
            for name in keep:
                model.set_submodule(name, self.model.get_submodule(name))
            self.known[key] = kl_divergence(self.logits, self._read(model))
        return self.known[key]


# Other kernels on our codes (chapter 7)

_KERNEL = """
import sys, torch
from safetensors.torch import load_file, save_file
from quantlab.linear import kernel_status
t = load_file(sys.argv[1])
rows = len(t["w"])
packed, ones, zeros = torch.ops.onednn.qlinear_prepack(t["w"], None), torch.ones(rows), torch.zeros(rows).int()
sums = torch.ops.onednn.qlinear_pointwise(
    t["x"], 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], "")
save_file({"sums": sums.int()}, sys.argv[1])
print(kernel_status())
"""


def kernel_sums(x_codes: Tensor, w_codes: Tensor, **environment: str) -> tuple[str, Tensor]:
    """(kernel_status(), sums) of oneDNN's u8 · s8 in a process of its own, with these environment variables (7.3)."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "codes.safetensors")
        save_file({"x": x_codes.to(torch.uint8), "w": w_codes.contiguous()}, path)
        done = subprocess.run(
            [sys.executable, "-c", _KERNEL, path], env=os.environ | environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        return done.stdout.strip(), load_file(path)["sums"]


def onnx_sums(x_codes: Tensor, w_codes: Tensor, w_zero: int) -> Tensor:
    """ONNX Runtime's MatMulInteger on our codes, of uint8 weights if w_zero is not 0, else of int8 ones."""
    import onnxruntime
    from onnx import TensorProto as T
    from onnx import helper

    a, y = (helper.make_tensor_value_info(n, t, None) for n, t in (("a", T.UINT8), ("y", T.INT32)))
    kind = T.UINT8 if w_zero else T.INT8
    w = helper.make_tensor("w", kind, w_codes.T.shape, w_codes.T.contiguous().numpy().tobytes(), raw=True)
    zeros = [helper.make_tensor(n, t, [], [v]) for n, t, v in (("az", T.UINT8, 0), ("wz", kind, w_zero))]
    node = helper.make_node("MatMulInteger", ["a", "w", "az", "wz"], ["y"])
    proto = helper.make_model(
        helper.make_graph([node], "g", [a], [y], [w, *zeros]),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 21)],
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"a": x_codes.to(torch.uint8).numpy()})[0])
