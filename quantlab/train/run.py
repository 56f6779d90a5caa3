"""A training under way: its steps and measurements, when it should stop, and the checkpoints it goes on from."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.files import read_json, write_json, write_whole
from quantlab.modules import device_of, in_mode
from quantlab.storage import read_parts

PROGRESS = "progress.json"  # of a checkpoint's files the last one written, which makes the others count
SEED_STRIDE = 1_000_003  # a prime above any count of steps or epochs: no two pairs (seed, step) give the same sum
_HISTORY = {"losses": list, "held_out": list, "checked_at": list, "seconds": (int, float)}


@dataclass
class History:
    """What a training did. Losses are means over a batch, in nats per token, before the step they belong to."""

    losses: list[float] = field(default_factory=list)  # one for each step done
    held_out: list[float] = field(default_factory=list)  # the same loss on the held-out tokens
    checked_at: list[int] = field(default_factory=list)  # after how many steps each was measured; the first is 0
    seconds: float = 0.0  # of all runs that led here

    @property
    def steps(self) -> int:
        """How many steps were done: fewer than asked for if the training stopped early."""
        return len(self.losses)

    @property
    def best_step(self) -> int | None:
        """The number of steps after which the held-out loss was smallest; None if nothing was held out."""
        if not self.held_out:
            return None
        return self.checked_at[min(range(len(self.held_out)), key=self.held_out.__getitem__)]

    def save(self, path) -> None:
        """Write it as JSON, whole or not at all."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path) -> "History":
        """What save wrote. Raises: FileNotFoundError, ValueError that names the file if it is damaged."""
        content = read_json(path, _HISTORY)
        return cls(*(content[key] for key in _HISTORY))


class Run:
    """A training under way. Its state is the model, its optimizers, the history and the best weights so far.

    rate(step) is the learning rate of all optimizers, loss(ids) what a step lowers. Random numbers in the model
    (dropout) depend on (seed, step) alone.
    """

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], *, rate, loss, seed: int = 0):
        self.model, self.optimizers, self.rate, self.loss, self.seed = model, optimizers, rate, loss, seed
        self.trainable, self.history = trainable_of(model), History()
        self.best: dict[str, Tensor] = {}  # the weights of the best measurement, if patience needs them

    def go(
        self, batch_of: Callable[[int], Tensor], steps: int, check_every: int, patience: int | None = None,
        measure: Callable[[], float] | None = None, *, folder=None, about: dict | None = None, progress: bool = True,
        on_step: Callable[[int, float], None] | None = None,
    ) -> History:  # fmt: skip
        """Go on to `steps` steps, from a checkpoint in the folder if there is one of a run about the same."""
        folder, began = None if folder is None else Path(folder), time.perf_counter()
        if folder is not None and (folder / PROGRESS).is_file():
            self.load(folder, about or {})
        began -= self.history.seconds
        with _training(self.model):
            if measure is not None and not self.history.held_out:
                self.check(measure(), keep=patience is not None)
            left = range(self.history.steps, 0 if self.should_stop(patience) else steps)
            bar = tqdm(left, initial=self.history.steps, total=steps, leave=False, disable=not progress)
            for step in bar:
                loss = self.step(batch_of(step))
                if (step + 1) % check_every == 0 or step + 1 == steps:
                    if measure is not None:
                        self.check(measure(), keep=patience is not None)
                    self.history.seconds = time.perf_counter() - began
                    if folder is not None:
                        self.save(folder, about or {})
                bar.set_postfix_str(self.summary(), refresh=False)
                if on_step is not None:
                    on_step(step, loss)
                if self.should_stop(patience):
                    break
        if patience is not None:
            _put(self.model, self.best)
        self.history.seconds = time.perf_counter() - began
        return self.history

    def step(self, ids: Tensor) -> float:
        """One step of the optimizers on ids (batch, tokens); returns the loss before it."""
        step, device = self.history.steps, device_of(self.model)
        self.model.zero_grad()
        with _random_of(device, self.seed * SEED_STRIDE + step):
            loss = self.loss(ids.to(device))
            loss.backward()
        norm, value = nn.utils.clip_grad_norm_(self.trainable.values(), 1.0), loss.detach()
        if not (torch.isfinite(value) and torch.isfinite(norm)):
            raise ValueError(
                f"the loss of step {step} is {value.item()} and the norm of its gradients {norm.item()}; "
                "a smaller learning_rate or a longer warmup may help"
            )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(step)
            optimizer.step()
        self.history.losses.append(value.item())
        return value.item()

    def check(self, held_out_loss: float, *, keep: bool) -> None:
        """Note a measurement, and keep the weights if it is the best so far."""
        self.history.held_out.append(held_out_loss)
        self.history.checked_at.append(self.history.steps)
        if keep and self.history.best_step == self.history.steps:
            self.best = {name: t.detach().clone() for name, t in _changing(self.model).items()}

    def should_stop(self, patience: int | None) -> bool:
        """Whether the last `patience` measurements were no better than the best before them."""
        if patience is None:
            return False
        best = self.history.checked_at.index(self.history.best_step)
        return len(self.history.held_out) - 1 - best >= patience

    def summary(self) -> str:
        """The last loss, and the last measurement, for a progress bar."""
        measured = f", held out {self.history.held_out[-1]:.3f}" if self.history.held_out else ""
        return f"loss {self.history.losses[-1]:.3f}{measured}"

    def save(self, folder: Path, about: dict) -> None:
        """Weights and optimizer state under the number of the step, then progress.json, which makes them count.

        Each file is written whole and renamed: a run that is cut off goes on from the last complete checkpoint.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = {f"now.{name}": t for name, t in _changing(self.model).items()}
        parts |= {f"best.{name}": t for name, t in self.best.items()}
        states = {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}
        for name, parameter in self.trainable.items():
            parts |= {f"optimizer.{name}.{key}": t for key, t in states[parameter].items()}
        parts = {name: t.detach().cpu().contiguous().clone() for name, t in parts.items()}
        new = folder / f"step_{self.history.steps}.safetensors"
        write_whole(new, partial(save_file, parts))
        write_json(folder / PROGRESS, {"about": about} | asdict(self.history))
        for old in folder.glob("step_*.safetensors"):
            if old != new:
                old.unlink()

    def load(self, folder: Path, about: dict) -> None:
        """Put a checkpoint of a run about the same in place. Raises: ValueError that names the file, or the folder."""
        kept = read_json(folder / PROGRESS, {"about": dict} | _HISTORY)
        _check_same(folder, kept["about"], about)
        path = folder / f"step_{len(kept['losses'])}.safetensors"
        _, parts = read_parts(path)
        now, best, states = (_under(parts, prefix) for prefix in ("now", "best", "optimizer"))
        by_parameter = {parameter: _under(states, name) for name, parameter in self.trainable.items()}
        if not _fits(self.model, now) or (best and not _fits(self.model, best)) or not all(by_parameter.values()):
            raise ValueError(f"{path} does not hold the weights and the optimizer's state of this model")
        _put(self.model, now)
        self.best, self.history = best, History(*(kept[key] for key in _HISTORY))
        for optimizer in self.optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                state = by_parameter[parameter].items()  # torch keeps the count of steps on the CPU
                optimizer.state[parameter] = {k: t if k == "step" else t.to(parameter.device) for k, t in state}


def _check_same(folder: Path, kept: dict, about: dict) -> None:
    for key, value in about.items():
        if kept.get(key) != value:
            what = f"{key}={kept.get(key)!r}, this one has {value!r}"
            what = "of another model, teacher or text" if key == "data" else f"with {what}"
            raise ValueError(f"{folder} holds a run {what}; take another folder, or delete that one")


def trainable_of(model) -> dict[str, nn.Parameter]:
    """The parameters with requires_grad by name. Raises: ValueError if there are none."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "the model has no parameter with requires_grad; is it quantized, or are all its parameters frozen?"
        )
    return found


def _changing(model) -> dict[str, Tensor]:
    """What training may change: the trainable parameters, and the buffers that belong to a checkpoint."""
    kept = model.state_dict()
    return trainable_of(model) | {name: b for name, b in model.named_buffers() if name in kept}


@torch.no_grad()
def _put(model, values: dict[str, Tensor]) -> None:
    for name, tensor in _changing(model).items():
        tensor.copy_(values[name])


def _fits(model, values: dict[str, Tensor]) -> bool:
    """Whether these are the names and shapes of all that training may change."""
    return {n: t.shape for n, t in _changing(model).items()} == {n: t.shape for n, t in values.items()}


def _under(parts: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): t for name, t in parts.items() if name.startswith(f"{prefix}.")}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Train mode for a while, and then every module as it was, and no gradients left."""
    try:
        with in_mode(model, training=True):
            yield
    finally:
        model.zero_grad()


@contextmanager
def _random_of(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers that depend on the seed alone, for a while, and then as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.random.default_generator.manual_seed(seed)
        for one in devices:
            torch.cuda.default_generators[one.index].manual_seed(seed)
        yield
