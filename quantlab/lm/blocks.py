"""Running the blocks of a model one by one: their inputs, and hooks on the layers inside."""

from collections.abc import Iterator

from torch import Tensor, nn

from quantlab.gptq import Hessian
from quantlab.lm.layers import blocks_of
from quantlab.modules import hooked, linears_in


class Stop(Exception):
    """Ends a forward pass once the first block's input is known."""


def block_inputs(model, tokens: Tensor, window: int) -> tuple[list[Tensor], list[dict]]:
    """The input of block 0 for each batch of windows, and for each block its other arguments (masks, positions).

    All batches have one shape, and those arguments depend on the shape alone, so one full pass shows them.
    """
    _, blocks = blocks_of(model)
    hidden, arguments = [], [{} for _ in blocks]

    def remember(i):
        def hook(_block, inputs, keywords):
            arguments[i].update(keywords)
            if i == 0:
                hidden.append(inputs[0])
                if len(hidden) > 1:
                    raise Stop

        return hook

    hooks = [b.register_forward_pre_hook(remember(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for ids in whole_windows(tokens, window):
            try:
                model(ids.to(model.device), use_cache=False)
            except Stop:
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, arguments


def whole_windows(tokens: Tensor, window: int) -> Iterator[Tensor]:
    """(1, window) at a time; a tail that fills no window is left out, unless it is all there is."""
    count = len(tokens) // window
    return iter(tokens[: count * window].view(count, 1, window) if count else tokens[None, None])


def first(output):
    return output[0] if isinstance(output, tuple) else output


def run(block, hidden: list[Tensor], arguments: dict) -> Iterator[Tensor]:
    """What the block gives out for each batch, one at a time."""
    for h in hidden:
        yield first(block(h, **arguments))


def advance(block, hidden: list[Tensor], arguments: dict) -> None:
    """hidden becomes what the block gives out, one batch after the other: two lists of them are never held."""
    for k, h in enumerate(hidden):
        hidden[k] = first(block(h, **arguments))


def input_hessians(block, hidden: list[Tensor], arguments: dict) -> list[tuple[dict[str, nn.Module], Hessian]]:
    """One (layers, Hessian) for each distinct input in the block: layers handed the same tensor share it."""
    layers = linears_in(block)
    seen: dict[int, tuple[Tensor, list[str]]] = {}  # the tensor is kept, so that its id stays its own

    def look(name):
        return lambda _module, inputs: seen.setdefault(id(inputs[0]), (inputs[0], []))[1].append(name)

    with hooked({m: look(name) for name, m in layers.items()}):
        list(run(block, hidden[:1], arguments))
    groups = [(names, Hessian(x.shape[-1])) for x, names in seen.values()]
    seen.clear()

    def add(hessian, last):
        def hook(_module, inputs):
            hessian.add(inputs[0])
            if last:
                raise Stop  # nobody needs what the last layer makes of it

        return hook

    ordered = {layers[names[0]]: add(hessian, names is groups[-1][0]) for names, hessian in groups}
    with hooked(ordered):
        for h in hidden:
            try:
                block(h, **arguments)
            except Stop:
                pass
    return [({name: layers[name] for name in names}, hessian) for names, hessian in groups]
