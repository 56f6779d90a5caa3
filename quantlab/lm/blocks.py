"""Running the blocks of a model one by one: their inputs, and hooks on the layers inside."""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantlab.hessian import Hessian
from quantlab.lm.layers import blocks_of
from quantlab.modules import hooked, linears_in


class Stop(Exception):
    """Ends a forward pass once all that is asked of it is known."""


class Arguments(NamedTuple):
    """What a block is given besides its input: masks, positions ..., by place and by name."""

    placed: tuple
    named: dict


def block_inputs(model, tokens: Tensor, window: int) -> tuple[list[Tensor], list[Arguments]]:
    """The input of block 0 for each batch of windows, and for each block its other arguments.

    All batches have one shape, and those arguments must depend on the shape alone: the first batch shows them, and
    with them the blocks, run one after the other, must make of the last batch what the model makes of it.
    Raises: ValueError where they do not.
    """
    _, blocks = blocks_of(model)
    windows, (first, arguments, end) = list(whole_windows(tokens, window)), ([], [None] * len(blocks), None)

    def record(i):
        def hook(_block, inputs, named):
            named = dict(named)
            x, *placed = inputs or (named.pop("hidden_states"),)
            arguments[i] = arguments[i] or Arguments(tuple(placed), named)
            if i == 0:
                first.append(x)
                if 1 < len(first) < len(windows):
                    raise Stop

        return hook

    def keep_end(_block, _inputs, output):
        nonlocal end
        end = hidden_of(output)

    before = {block: record(i) for i, block in enumerate(blocks)}
    with hooked(before, with_kwargs=True), hooked({blocks[-1]: keep_end}, after=True):
        for ids in windows:
            with suppress(Stop):
                model(ids.to(model.device), use_cache=False)
    _check_chain(type(model).__name__, blocks, first[-1], arguments, end)
    return first, arguments


def _check_chain(name: str, blocks: nn.ModuleList, x: Tensor, arguments: list, end: Tensor) -> None:
    """ValueError unless the blocks, one after the other, lead from x to where they led inside the model."""
    for block, own in zip(blocks, arguments, strict=True):
        x = run_block(block, x, own)
    # The worst token, each by its own length: one huge value elsewhere must not hide it.
    apart, length = (x - end).float().norm(dim=-1), end.float().norm(dim=-1)
    off = (apart / length.clamp(min=torch.finfo(torch.float32).tiny)).max().item()
    if not off <= max(1e-3, 16 * torch.finfo(x.dtype).eps):
        raise ValueError(
            f"the blocks of {name} cannot be run one after the other: their last output is off by {off:.1%}. "
            "Methods that need no data (RTN, NF4) quantize it"
        )


def whole_windows(tokens: Tensor, window: int) -> Iterator[Tensor]:
    """(1, window) at a time; a tail that fills no window is left out, unless it is all there is."""
    count = len(tokens) // window
    return iter(tokens[: count * window].view(count, 1, window) if count else tokens[None, None])


def hidden_of(output) -> Tensor:
    """The hidden state that a block gives out; some blocks give a tuple, GPT-1's a list."""
    return output[0] if isinstance(output, tuple | list) else output


def run_block(block, x: Tensor, arguments: Arguments) -> Tensor:
    """What the block gives out for one batch."""
    return hidden_of(block(x, *arguments.placed, **arguments.named))


def run(block, hidden: list[Tensor], arguments: Arguments) -> Iterator[Tensor]:
    """What the block gives out for each batch, one at a time."""
    for x in hidden:
        yield run_block(block, x, arguments)


def advance(block, hidden: list[Tensor], arguments: Arguments) -> None:
    """hidden becomes what the block gives out, one batch after the other: two lists of them are never held."""
    for k, x in enumerate(hidden):
        hidden[k] = run_block(block, x, arguments)


def input_hessians(block, hidden: list[Tensor], arguments: Arguments) -> list[tuple[dict[str, nn.Module], Hessian]]:
    """One (layers, Hessian) for each distinct input in the block: layers handed the same tensor share it.

    The first batch shows which layers share an input; of the others only the first layer of each group is asked.
    """
    layers, groups = linears_in(block), {}  # by the id of the tensor, which is kept so that its id stays its own

    def join(name):
        def hook(_module, inputs):
            x = inputs[0]
            if id(x) not in groups:
                groups[id(x)] = x, {}, Hessian(x.shape[-1]).add(x)
            groups[id(x)][1][name] = layers[name]

        return hook

    with hooked({layer: join(name) for name, layer in layers.items()}):
        list(run(block, hidden[:1], arguments))
    found = [(some, hessian) for _, some, hessian in groups.values()]
    groups.clear()
    _add_batches(block, hidden[1:], arguments, {next(iter(some.values())): hessian for some, hessian in found})
    return found


def _add_batches(block, hidden: list[Tensor], arguments: Arguments, hessians: dict[nn.Module, Hessian]) -> None:
    """Count in what these layers read in further batches."""
    last = list(hessians.values())[-1]

    def add(hessian):
        def hook(_module, inputs):
            hessian.add(inputs[0])
            if hessian is last:
                raise Stop  # nobody needs what the last layer makes of it

        return hook

    with hooked({layer: add(hessian) for layer, hessian in hessians.items()}):
        for h in hidden:
            with suppress(Stop):
                run_block(block, h, arguments)
