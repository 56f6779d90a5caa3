"""Rotations: an outlier is a matter of basis. Hadamard matrices, a model turned without changing it, a learned turn.

Row vectors throughout: x, (..., n), becomes x R, and what reads it, W (out, n), becomes W R: (x R)(W R)ᵀ = x Wᵀ.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantlab.arguments import (
    check_flag,
    check_int,
    check_list,
    check_model,
    check_number,
    check_real,
    kind,
    text_config,
)  # fmt: skip
from quantlab.hadamard import hadamard, hadamard_transform, random_hadamard, random_orthogonal, transform  # fmt: skip
from quantlab.modules import device_of, is_linear, put_weight, weight_of
from quantlab.outliers import check_same_outputs

__all__ = [
    "OnlineHadamard", "cayley", "fold_norms", "hadamard", "hadamard_transform", "learn_rotation", "random_hadamard",
    "random_orthogonal", "rotate", "rounding_error",
]  # fmt: skip


class OnlineHadamard(nn.Module):
    """hadamard_transform as a layer, for a turn that no weight can take in: there is a product of two inputs before."""

    def forward(self, x: Tensor) -> Tensor:
        return transform(x)


def fold_norms(model):
    """A new model with the same outputs whose RMSNorms have no gains: x̂ · g goes into W as W diag(g).

    Without gains RMSNorm commutes with a rotation: ‖x R‖ = ‖x‖. A head tied to the embedding becomes a matrix of its
    own, since it takes in the last norm's gain.

    Raises: ValueError if the norms subtract a mean, add a bias or add one to their gain, or the model's blocks are not
    named as Llama's.
    """
    new = copy.deepcopy(check_model(model)).eval()
    _check_norms(new)
    blocks, head = _llama_blocks(new), new.get_output_embeddings()
    if head.weight is new.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        new.config.tie_word_embeddings = text_config(new).tie_word_embeddings = False
    with torch.no_grad():
        _fold(new.get_decoder().norm, [head])
        for block in blocks:
            _fold(block["input_layernorm"], [block[f"self_attn.{name}_proj"] for name in "qkv"])
            _fold(block["post_attention_layernorm"], [block["mlp.gate_proj"], block["mlp.up_proj"]])
    return check_same_outputs(model, new)


def rotate(model, residual: Tensor | None = None, *, heads: bool = True, online: bool = True, seed: int = 0):
    """A new model with the same outputs, in whose new bases no channel is large: QuaRot (Ashkboos et al. 2024).

    residual turns the stream between the blocks (R1), (hidden, hidden), orthogonal; None: random_hadamard(hidden).
    heads: values and what reads them are turned too, head by head (R2). Both are taken in by weights and cost nothing.
    online: so is what down_proj reads (R4), while the model runs: OnlineHadamard stands before it, and the layer is
    then called down_proj.linear.

    Raises: ValueError as fold_norms does, if residual is not orthogonal, or if a width has no Hadamard matrix.
    """
    heads, online = check_flag(heads, "heads"), check_flag(online, "online")
    new = fold_norms(model)
    width = text_config(new).hidden_size
    matrix = random_hadamard(width, seed=seed) if residual is None else _orthogonal(residual, width, "residual")
    blocks, embedding = _llama_blocks(new), new.get_input_embeddings()
    with torch.no_grad():
        embedding.weight.copy_(_by(matrix)(embedding.weight))
        _turn_reader(new.get_output_embeddings(), _by(matrix))
        for block in blocks:
            _turn_block(block, _by(matrix))
            if heads:
                _turn_heads(block)
            if online:
                _turn_online(block)
    return check_same_outputs(model, new)


def rounding_error(x: Tensor, *, bits: int) -> Tensor:
    """‖x - x̂‖² / ‖x‖² where each row of x is rounded on a symmetric grid of its own, as W4A4 rounds tokens and rows.

    Differentiable: rounding passes gradients straight through, so what is left is the gradient of the step, which the
    row's largest value sets. Shapes: x (rows, n); the result is a number, ().
    """
    x = check_real(x)
    x = x / x.detach().abs().max().clamp(min=torch.finfo(x.dtype).tiny)  # a ratio: squares of large numbers overflow
    most = 2 ** (check_int(bits, "bits", 2, 8) - 1)
    scale = (x.abs().amax(-1, keepdim=True) / (most - 0.5)).clamp(min=torch.finfo(x.dtype).tiny)
    steps = x / scale
    codes = steps + (steps.round().clamp(-most, most - 1) - steps).detach()
    return (scale * codes - x).square().sum() / x.square().sum().clamp(min=torch.finfo(x.dtype).tiny)


def learn_rotation(
    rows, *, bits: int = 4, start: Tensor | None = None, steps: int = 200, learning_rate: float = 0.01
) -> Tensor:
    """The rotation R, (n, n), float32, in whose basis the rows lose least by rounding: SpinQuant's idea (Liu et al.
    2024) on the mean rounding_error of x R.

    R = start · (I + A)⁻¹(I - A) with A = -Aᵀ is orthogonal whatever A is (Cayley); Adam moves A. The best R seen is
    given back, which is start itself if nothing was better.

    rows: a list of matrices (rows, n), such as what layers read and their weights, which count alike.
    Raises: ValueError if they are not of one width, or start is not orthogonal.
    """
    rows = [check_real(x, "rows").detach().float() for x in check_list(rows, "rows")]
    if not rows or any(x.ndim != 2 or x.shape[1] != rows[0].shape[1] for x in rows):
        raise ValueError(f"rows must be matrices of one width, got {[tuple(x.shape) for x in rows]}")
    width, steps = rows[0].shape[1], check_int(steps, "steps", 0, 100_000)
    best = start = random_hadamard(width) if start is None else _orthogonal(start, width, "start")
    free, least = torch.zeros(width, width, dtype=torch.float32, requires_grad=True), math.inf
    adam = torch.optim.Adam([free], lr=check_number(learning_rate, "learning_rate", above=0, high=1e3))
    for step in range(steps + 1):
        with torch.enable_grad():
            matrix = start @ cayley(free)
            loss = torch.stack([rounding_error(x @ matrix, bits=bits) for x in rows]).mean()
        if loss.item() < least:
            best, least = matrix.detach(), loss.item()
        if step < steps:
            adam.zero_grad()
            loss.backward()
            adam.step()
    return best


def cayley(free: Tensor) -> Tensor:
    """(I + A)⁻¹(I - A) of the skew-symmetric A = (free - freeᵀ)/2: an orthogonal matrix (n, n), the identity at 0."""
    if check_real(free, "free").ndim != 2 or free.shape[0] != free.shape[1]:
        raise ValueError(f"free must be a square matrix, got {tuple(free.shape)}")
    skew, one = (free - free.T) / 2, torch.eye(len(free), dtype=free.dtype, device=free.device)
    return torch.linalg.solve(one + skew, one - skew)


def _check_norms(model) -> None:
    """ValueError unless every norm over the hidden state is an RMSNorm, weight · x / rms(x)."""
    width = text_config(model).hidden_size
    x = 1 + torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for name, norm in model.named_modules():
        weight = getattr(norm, "weight", None)
        if is_linear(norm) or getattr(weight, "shape", None) != (width,):
            continue
        given = x.to(device_of(model), weight.dtype)
        unit, gain = given / given.square().mean(-1, keepdim=True).sqrt(), weight.detach()
        with torch.no_grad():
            off = [((norm(given) - unit * g).abs().max() / unit.abs().max()).item() for g in (gain, 1 + gain)]
        rounding = max(1e-3, 16 * torch.finfo(weight.dtype).eps)
        if not off[0] <= rounding:
            why = "adds one to its gain" if off[1] <= rounding else "subtracts the mean or adds a bias, as LayerNorm"
            raise ValueError(f"{name} ({type(norm).__name__}) {why}; a rotation needs RMSNorms: gain · x / rms(x)")


_LLAMA = ["input_layernorm", "post_attention_layernorm", *(f"self_attn.{name}_proj" for name in "qkvo")]
_LLAMA += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def _llama_blocks(model) -> list[dict[str, nn.Module]]:
    """The modules of each block by name. Raises ValueError unless they are those of Llama, Qwen2, Qwen3, Mistral."""
    name, decoder = type(model).__name__, model.get_decoder()
    if any(isinstance(module, OnlineHadamard) for module in model.modules()):
        raise ValueError(f"this {name} is rotated online already; rotate the model that it was made of")
    blocks = [dict(block.named_modules()) for block in getattr(decoder, "layers", [])]
    missing = [part for part in _LLAMA if not all(part in block for block in blocks)]
    if missing or not blocks or not hasattr(decoder, "norm") or model.get_output_embeddings() is None:
        lacks = f"a block without {missing[0]}" if missing else "no layers, no last norm or no head"
        raise ValueError(f"rotations are for models built as Llama, Qwen2, Qwen3, Mistral are; {name} has {lacks}")
    return blocks


def _orthogonal(matrix: Tensor, width: int, name: str) -> Tensor:
    matrix = check_real(matrix, name).detach()
    if matrix.shape != (width, width):
        raise ValueError(f"{name} must be a matrix ({width}, {width}), got {kind(matrix)}")
    off = (matrix.double() @ matrix.double().T).sub_(torch.eye(width, device=matrix.device)).abs().max().item()
    if off > 1e-4:
        raise ValueError(f"{name} must be orthogonal, R Rᵀ = I; here R Rᵀ - I reaches {off:.2g}")
    return matrix.float()


def _fold(norm: nn.Module, readers: list[nn.Module]) -> None:
    for layer in readers:
        put_weight(layer, weight_of(layer) * norm.weight)
    norm.weight.fill_(1)


def _by(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: (x.float() @ matrix.to(x.device)).to(x.dtype)


def _turn_reader(layer: nn.Module, turn: Callable[[Tensor], Tensor]) -> None:
    """The layer will read turn(x), and give out what it gave."""
    put_weight(layer, turn(weight_of(layer)))


def _turn_writer(layer: nn.Module, turn: Callable[[Tensor], Tensor]) -> None:
    """The layer will give out turn(y)."""
    put_weight(layer, turn(weight_of(layer).T).T)
    if layer.bias is not None:
        layer.bias.copy_(turn(layer.bias))


def _turn_block(block: dict, turn: Callable[[Tensor], Tensor]) -> None:
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        _turn_reader(block[name], turn)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        _turn_writer(block[name], turn)


def _turn_heads(block: dict) -> None:
    """Values head by head: attention only mixes tokens, so its output is turned as they are."""
    size = _with_hadamard(block["self_attn"].head_dim, "heads")

    def turn(x: Tensor) -> Tensor:
        return transform(x.unflatten(-1, (-1, size))).flatten(-2)

    _turn_writer(block["self_attn.v_proj"], turn)
    _turn_reader(block["self_attn.o_proj"], turn)


def _with_hadamard(width: int, option: str) -> int:
    try:
        transform(torch.zeros(width))
    except ValueError as error:
        raise ValueError(f"{error}; pass {option}=False") from error
    return width


def _turn_online(block: dict) -> None:
    down = block["mlp.down_proj"]
    _with_hadamard(weight_of(down).shape[1], "online")
    _turn_reader(down, transform)
    block["mlp"].down_proj = nn.Sequential(OrderedDict(rotation=OnlineHadamard(), linear=down))
