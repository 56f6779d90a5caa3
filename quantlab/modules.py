"""The modules of a model, whatever library they come from: which are linear, their weights, hooks, modes.

A linear layer is an nn.Linear or GPT-2's Conv1D, which is told by its name, so that transformers need not be imported.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from quantlab.arguments import kind


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a float linear layer: nn.Linear, or transformers' Conv1D.

    A subclass is one if it gives one result, as Falcon's; the router of a mixture of experts gives two.
    """
    if not isinstance(module, nn.Linear):
        return type(module).__name__ == "Conv1D"
    weight = module.weight
    if type(module).forward is nn.Linear.forward or not weight.is_floating_point():
        return weight.is_floating_point()
    with torch.no_grad():
        return isinstance(module(weight.new_zeros(1, weight.shape[1])), Tensor)


def check_linear(layer) -> nn.Module:
    """layer; ValueError unless it is a float linear layer."""
    if not isinstance(layer, nn.Module) or not is_linear(layer):
        raise ValueError(f"need an nn.Linear or a Conv1D, got {kind(layer)}")
    return layer


def weight_of(layer: nn.Module) -> Tensor:
    """The weight as (out, in), sharing the layer's memory. Conv1D stores it the other way round."""
    weight = check_linear(layer).weight.detach()
    return weight if isinstance(layer, nn.Linear) else weight.T


def put_weight(layer: nn.Module, weight: Tensor) -> None:
    """Copy a weight (out, in) into a layer, in the layer's dtype."""
    weight_of(layer).copy_(weight)


def check_codes_fit(name: str, codes, weight: Tensor) -> None:
    """ValueError unless codes have the shape of the weight (out, in) of the layer of that name."""
    if codes.shape != weight.shape:
        raise ValueError(f"{name} is {tuple(weight.shape)}, its codes are {tuple(codes.shape)}")


def as_linear(layer: nn.Module) -> nn.Linear:
    """The layer as an nn.Linear that shares its memory."""
    if isinstance(layer, nn.Linear):
        return layer
    weight = weight_of(layer)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear


def linears_in(module: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a module, by their names in it; a mixture's routers are not among them."""
    return {name: m for name, m in module.named_modules() if is_linear(m) and not _is_router(module, name)}


def _is_router(module: nn.Module, name: str) -> bool:
    """Whether the layer of this name says which experts a token goes to: by its name, or as a gate beside experts."""
    parts = name.split(".")
    above = [module.get_submodule(".".join(parts[:i])) for i in (len(parts) - 1, len(parts) - 2) if i >= 0]
    gate = parts[-1] in ("gate", "wg", "shared_expert_gate") and any(hasattr(m, "experts") for m in above)
    return gate or any("router" in part for part in parts)


def check_finite(model: nn.Module) -> None:
    """ValueError that names the first parameter with NaN or infinity in it, if there is one."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite weights")


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies."""
    return next(model.parameters()).device


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode for a while, and then every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def evaluating(model: nn.Module):
    """Dropout off for a while, and then every module as it was."""
    return in_mode(model, training=False)


@contextmanager
def hooked(hooks: Mapping[nn.Module, Callable], *, after: bool = False, with_kwargs: bool = False) -> Iterator[None]:
    """Hooks before (or after) each of these modules runs, for a while."""
    register = "register_forward_hook" if after else "register_forward_pre_hook"
    handles = [getattr(module, register)(hook, with_kwargs=with_kwargs) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
