"""What training keeps in memory: weights, gradients and the optimizer, and what waits for the backward pass."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quantlab.lm.measuring import checked_windows


@dataclass(frozen=True)
class Memory:
    """What training a model with AdamW keeps in memory all the time, in bytes; activations come on top."""

    weights: int  # parameters and buffers
    gradients: int  # one for each trainable parameter
    optimizer: int  # AdamW: two averages for each trainable parameter, and a step count for each tensor

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def training_memory(model: nn.Module) -> Memory:
    """Counted from shapes and dtypes; the model may be on the meta device.

    >>> training_memory(nn.Linear(10, 3))
    Memory(weights=132, gradients=132, optimizer=272)
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    return Memory(weights, gradients, 2 * gradients + 4 * len(trained))


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Bytes that a forward pass over ids (batch, tokens) leaves waiting for the backward pass, weights not counted.

    Measured: autograd hands over each tensor that it saves; tensors that share memory count once.
    """
    checked_windows(model, ids.flatten(), ids.shape[-1], None)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    saved = {}

    def record(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        model(ids, use_cache=False)
    return sum(saved.values())
