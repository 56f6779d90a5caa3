"""Running the blocks of a model one by one: their inputs, and hooks on the layers inside."""

from collections.abc import Iterator
from contextlib import suppress

from torch import Tensor, nn

from quantlab.hessian import Hessian
from quantlab.lm.layers import blocks_of
from quantlab.modules import hooked, linears_in


class Stop(Exception):
    """Ends a forward pass once all that is asked of it is known."""


def block_inputs(model, tokens: Tensor, window: int) -> tuple[list[Tensor], list[dict]]:
    """The input of block 0 for each batch of windows, and for each block its other arguments (masks, positions).

    All batches have one shape, and those arguments depend on the shape alone, so one full pass shows them.
    """
    _, blocks = blocks_of(model)
    hidden, arguments = [], [{} for _ in blocks]

    def record(i):
        def hook(_block, inputs, keywords):
            arguments[i].update(keywords)
            if i == 0:
                hidden.append(inputs[0])
                if len(hidden) > 1:
                    raise Stop

        return hook

    with hooked({block: record(i) for i, block in enumerate(blocks)}, with_kwargs=True):
        for ids in whole_windows(tokens, window):
            with suppress(Stop):
                model(ids.to(model.device), use_cache=False)
    return hidden, arguments


def whole_windows(tokens: Tensor, window: int) -> Iterator[Tensor]:
    """(1, window) at a time; a tail that fills no window is left out, unless it is all there is."""
    count = len(tokens) // window
    return iter(tokens[: count * window].view(count, 1, window) if count else tokens[None, None])


def hidden_of(output) -> Tensor:
    """The hidden state that a block gives out; some blocks give a tuple."""
    return output[0] if isinstance(output, tuple) else output


def run(block, hidden: list[Tensor], arguments: dict) -> Iterator[Tensor]:
    """What the block gives out for each batch, one at a time."""
    for h in hidden:
        yield hidden_of(block(h, **arguments))


def advance(block, hidden: list[Tensor], arguments: dict) -> None:
    """hidden becomes what the block gives out, one batch after the other: two lists of them are never held."""
    for k, h in enumerate(hidden):
        hidden[k] = hidden_of(block(h, **arguments))


def input_hessians(block, hidden: list[Tensor], arguments: dict) -> list[tuple[dict[str, nn.Module], Hessian]]:
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


def _add_batches(block, hidden: list[Tensor], arguments: dict, hessians: dict[nn.Module, Hessian]) -> None:
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
                block(h, **arguments)
