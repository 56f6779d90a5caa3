"""A small training loop: a model learns a text or another model's predictions; a run can be stopped and resumed."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.arguments import check_int
from quantlab.lm.checkpoint import hash_tensors
from quantlab.lm.measuring import checked_windows, divergence, perplexity
from quantlab.modules import device_of, evaluating, in_mode


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
        """The number of steps after which the held-out loss was least; None if nothing was held out."""
        if not self.held_out:
            return None
        return self.checked_at[min(range(len(self.held_out)), key=self.held_out.__getitem__)]

    def save(self, path) -> None:
        """Write it as JSON, whole or not at all."""
        _write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path) -> "History":
        """What save wrote."""
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))


def finetune(
    model: nn.Module,
    tokens: Tensor,
    *,
    steps: int,
    batch: int = 8,
    window: int = 128,
    learning_rate: float = 1e-3,
    warmup: int | None = None,
    teacher: nn.Module | None = None,
    held_out: Tensor | None = None,
    check_every: int | None = None,
    patience: int | None = None,
    seed: int = 0,
    folder=None,
    progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Train, in place, the parameters of a language model that have requires_grad; returns what happened.

        loss = mean over the predicted tokens of -log p(next token), or, with a teacher, of KL(teacher || model)
        AdamW (Loshchilov and Hutter 2019) with betas 0.9 and 0.95 and no weight decay; the norm of all gradients
        together is clipped to 1; rate = learning_rate * min((step + 1) / warmup, (steps - step) / (steps - warmup))

    tokens are one stream (n,), cut into windows, or rows (sequences, length), used whole; ids, int64. Each epoch deals
    them out in a new order. A batch depends on (seed, step) alone, and so does dropout. warmup is a tenth of the steps
    unless given. held_out, (n,) or rows, is measured before the first step, every check_every steps (default: a tenth)
    and after the last, with the model in eval mode. With patience, training stops when that many measurements in a row
    were no better than the best before them, and the model ends with the weights of the best one; without, with the
    last ones.

    folder keeps a checkpoint (weights, optimizer and history; safetensors and JSON), written at every check_every
    steps; the same call goes on from there, and on the CPU ends with the same bits as a run that was never cut off.
    A resumed run calls on_step(step, loss), which is called after each step, for the steps that are left.

    The model is trained in train mode, on its own device, and given back in the modes it came in; random numbers
    elsewhere stay as they would have been.

    Raises: ValueError if nothing is trainable, the tokens do not suit the model or the window, a number is out of its
    range, patience has nothing to look at, the loss or its gradients are no longer finite, or the folder holds a run
    of other settings, texts or frozen weights.
    """
    began, folder = time.perf_counter(), None if folder is None else Path(folder)
    _check_texts(model, tokens, held_out, window)
    if teacher is model:
        raise ValueError("teacher must be another model than the one that is trained")
    if patience is not None and held_out is None:
        raise ValueError("patience looks at the held-out loss: pass held_out too")
    settings = _settings(steps, batch, window, learning_rate, warmup, check_every, patience, seed)
    run = _Run(model, settings)
    fingerprint = None if folder is None else _fingerprint(model, tokens, held_out, teacher)
    if folder is not None and (folder / "progress.json").is_file():
        run.load(folder, fingerprint)
    began -= run.history.seconds
    with ExitStack() as stack:
        stack.enter_context(in_mode(model, training=True))
        stack.enter_context(nullcontext() if teacher is None else evaluating(teacher))
        stack.callback(model.zero_grad)
        if held_out is not None and not run.history.held_out:
            run.check(_held_out_loss(model, teacher, held_out, window))
        left = range(run.history.steps, 0 if run.tired() else steps)
        bar = tqdm(left, initial=run.history.steps, total=steps, leave=False, disable=not progress)
        for step in bar:
            loss = run.step(batch_at(tokens, step, batch=batch, window=window, seed=seed), teacher)
            if (step + 1) % settings["check_every"] == 0 or step + 1 == steps:
                if held_out is not None:
                    run.check(_held_out_loss(model, teacher, held_out, window))
                if folder is not None:
                    run.history.seconds = time.perf_counter() - began
                    run.save(folder, fingerprint)
            bar.set_postfix_str(run.summary(), refresh=False)
            if on_step is not None:
                on_step(step, loss)
            if run.tired():
                break
    if patience is not None:
        _put(model, run.best)
    run.history.seconds = time.perf_counter() - began
    return run.history


def batch_at(tokens: Tensor, step: int, *, batch: int, window: int, seed: int = 0) -> Tensor:
    """The batch of a step, a function of (seed, step) alone: (batch, window) of a stream, or whole rows of rows.

    Each epoch cuts the stream at a new random offset into windows and deals them, or the rows, out in a new random
    order; a batch may span two epochs.

    >>> batch_at(torch.arange(12), 0, batch=2, window=4).diff(dim=1).tolist()
    [[1, 1, 1], [1, 1, 1]]
    """
    per_epoch = len(tokens) if tokens.ndim == 2 else max(1, (len(tokens) - window + 1) // window)
    numbers, rows = range(step * batch, (step + 1) * batch), []
    for epoch in range(numbers[0] // per_epoch, numbers[-1] // per_epoch + 1):
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(per_epoch, generator=random)
        if tokens.ndim == 1:
            room = min(window - 1, len(tokens) - per_epoch * window)
            order = order * window + torch.randint(room + 1, (1,), generator=random)
        rows += [order[k % per_epoch] for k in numbers if k // per_epoch == epoch]
    first = torch.stack(rows)
    return tokens[first] if tokens.ndim == 2 else tokens[first[:, None] + torch.arange(window)]


def rate_at(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """The learning rate of a step: up in a line over the warm-up, then down in a line, never quite to 0.

    >>> [rate_at(step, peak=1.0, steps=10, warmup=2) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.125]
    """
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / max(1, steps - warmup))


@torch.no_grad()
def sample_text_tokens(
    model,
    count: int,
    length: int,
    *,
    start: int | None = None,
    temperature: float = 1.0,
    batch: int = 64,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """Texts that the model writes itself, (count, length) ids, int64, on the CPU: to distill without data.

    Each row begins with the token `start` (default: the model's begin token) and goes on with samples from the
    model's own distribution, its logits divided by temperature; after an end token the next document follows in the
    same row, as in a stream. `batch` rows are written at once with one KV cache. LLM-QAT trains on such texts (Liu et
    al. 2023, sec. 3.1). The same seed and batch give the same rows.

    Raises: ValueError if there is no begin token and no start, temperature is not above 0, or length is more than the
    model can read.
    """
    start = getattr(model.config, "bos_token_id", None) if start is None else start
    if start is None:
        raise ValueError("the model has no begin token: say which token each row starts with (start=...)")
    check_int(start, "start", 0, model.config.vocab_size - 1)
    check_int(length, "length", 1, getattr(model.config, "max_position_embeddings", None))
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")
    random, rows = torch.Generator().manual_seed(seed), []
    left = range(0, check_int(count, "count", 1), check_int(batch, "batch", 1))
    with evaluating(model):
        for first in tqdm(left, desc="texts", leave=False, disable=not progress):
            ids, cache = torch.full((min(batch, count - first), 1), start), None
            said = [ids]
            while len(said) < length:
                out = model(ids.to(device_of(model)), past_key_values=cache, use_cache=True)
                cache, logits = out.past_key_values, out.logits[:, -1].float().cpu()
                ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
                said.append(ids)
            rows.append(torch.cat(said, dim=1))
    return torch.cat(rows)


# --- one training -----------------------------------------------------------------------------------------------


class _Run:
    """A training under way: everything that a checkpoint keeps."""

    def __init__(self, model: nn.Module, settings: dict):
        self.model, self.settings, self.trainable = model, settings, _trainable(model)
        self.optimizer = torch.optim.AdamW(self.trainable.values(), betas=(0.9, 0.95), weight_decay=0.0)
        self.history = History()
        self.best: dict[str, Tensor] = {}  # the weights of the best measurement, if patience needs them

    def step(self, ids: Tensor, teacher) -> float:
        """One step of the optimizer; returns the loss before it."""
        step, device, settings = self.history.steps, device_of(self.model), self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(
                step, peak=settings["learning_rate"], steps=settings["steps"], warmup=settings["warmup"]
            )
        self.model.zero_grad()
        with _random_of(device, settings["seed"] * 1_000_003 + step):
            loss = loss_on(self.model, ids.to(device), teacher)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trainable.values(), 1.0)
        value = loss.item()
        if not math.isfinite(value) or not torch.isfinite(norm):
            raise ValueError(
                f"the loss of step {step} is {value} and the norm of its gradients {norm.item()}; "
                "a smaller learning_rate or a longer warmup may help"
            )
        self.optimizer.step()
        self.history.losses.append(value)
        return value

    def check(self, held_out_loss: float) -> None:
        """Note a measurement, and keep the weights if it is the best so far."""
        self.history.held_out.append(held_out_loss)
        self.history.checked_at.append(self.history.steps)
        if self.settings["patience"] is not None and self.history.best_step == self.history.steps:
            self.best = {name: t.detach().clone() for name, t in _changing(self.model).items()}

    def tired(self) -> bool:
        """Whether the last `patience` measurements were no better than the best before them."""
        if self.settings["patience"] is None:
            return False
        since = len(self.history.held_out) - 1 - self.history.checked_at.index(self.history.best_step)
        return since >= self.settings["patience"]

    def summary(self) -> str:
        measured = f", held out {self.history.held_out[-1]:.3f}" if self.history.held_out else ""
        return f"loss {self.history.losses[-1]:.3f}{measured}"

    def save(self, folder: Path, fingerprint: str) -> None:
        """Weights and optimizer state under the number of the step, then progress.json, which makes them count.

        Each file is written whole and renamed: a run that is cut off goes on from the last complete checkpoint.
        """
        folder.mkdir(parents=True, exist_ok=True)
        parts = {f"now.{name}": t for name, t in _changing(self.model).items()}
        parts |= {f"best.{name}": t for name, t in self.best.items()}
        for name, parameter in self.trainable.items():
            parts |= {f"adam.{key}.{name}": t for key, t in self.optimizer.state[parameter].items()}
        name = f"step_{self.history.steps}.safetensors"
        save_file({key: t.detach().cpu().contiguous().clone() for key, t in parts.items()}, folder / f"{name}.part")
        _rename(folder / f"{name}.part", folder / name)
        kept = {"settings": self.settings, "fingerprint": fingerprint, "history": asdict(self.history)}
        _write_json(folder / "progress.json", kept)
        for old in folder.glob("step_*.safetensors"):
            if old.name != name:
                old.unlink()

    def load(self, folder: Path, fingerprint: str) -> None:
        """Put a checkpoint of the same run in place."""
        kept = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        for key, value in self.settings.items():
            if kept["settings"][key] != value:
                raise ValueError(
                    f"{folder} holds a run with {key}={kept['settings'][key]!r}, this one has {value!r}; "
                    "take another folder, or delete that one"
                )
        if kept["fingerprint"] != fingerprint:
            raise ValueError(
                f"{folder} holds a run of another model, teacher or text; take another folder, or delete that one"
            )
        self.history = History(**kept["history"])
        parts = load_file(folder / f"step_{self.history.steps}.safetensors")
        _put(self.model, {name: parts[f"now.{name}"] for name in _changing(self.model)})
        self.best = {key.removeprefix("best."): t for key, t in parts.items() if key.startswith("best.")}
        for name, parameter in self.trainable.items():
            state = {key: parts[f"adam.{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                key: t if key == "step" else t.to(parameter.device) for key, t in state.items()
            }


def loss_on(model, ids: Tensor, teacher=None) -> Tensor:
    """Mean over the tokens after the first of -log p(token), or of KL(teacher || model) before them; (), in nats.

    Shapes: ids (batch, tokens), on the model's device; a teacher may be on another.
    """
    logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad():
        said = teacher(ids.to(device_of(teacher)), use_cache=False).logits[:, :-1].float().flatten(0, 1)
    log_p, log_q = said.to(logits.device).log_softmax(-1), logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(logits)


def _held_out_loss(model, teacher, held_out: Tensor, window: int) -> float:
    window = window if held_out.ndim == 1 else held_out.shape[1]
    if teacher is None:
        return perplexity(model, held_out.flatten(), window=window).nll
    return divergence(teacher, model, held_out.flatten(), window=window).kl


def _settings(steps, batch, window, learning_rate, warmup, check_every, patience, seed) -> dict:
    """The settings of a run, checked, as JSON holds them."""
    steps, rate = check_int(steps, "steps", 1), learning_rate
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
        raise ValueError(f"learning_rate must be above 0 and finite, got {rate!r}")
    tenth = max(1, steps // 10)
    return {
        "steps": steps,
        "batch": check_int(batch, "batch", 1),
        "window": check_int(window, "window", 2),
        "learning_rate": float(rate),
        "warmup": tenth if warmup is None else check_int(warmup, "warmup", 1, steps),
        "check_every": tenth if check_every is None else check_int(check_every, "check_every", 1),
        "patience": patience if patience is None else check_int(patience, "patience", 1),
        "seed": check_int(seed, "seed", 0, 2**40),
    }


def _check_texts(model, tokens: Tensor, held_out: Tensor | None, window: int) -> None:
    for name, ids in {"tokens": tokens, "held_out": held_out}.items():
        if ids is None and name == "held_out":
            continue
        if not isinstance(ids, Tensor) or ids.ndim not in (1, 2) or ids.numel() == 0:
            what = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{name} must be one stream (n,) or rows (sequences, length) of ids, got {what}")
        length = check_int(window, "window", 2) if ids.ndim == 1 else ids.shape[1]
        longest, _ = checked_windows(model, ids.flatten(), max(2, length), None)
        if longest != length:
            raise ValueError(f"{name} come in pieces of {length} tokens; the model reads 2..{longest}")
        if ids.numel() < length:
            raise ValueError(f"{name} must fill at least one window of {length}, got {len(ids)} tokens")


def _trainable(model) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(
            "the model has no parameter with requires_grad; is it quantized, or are all its parameters frozen?"
        )
    return found


def _changing(model) -> dict[str, Tensor]:
    """What training may change: the trainable parameters, and the buffers that belong to a checkpoint."""
    kept = model.state_dict()
    return _trainable(model) | {name: b for name, b in model.named_buffers() if name in kept}


@torch.no_grad()
def _put(model, values: dict[str, Tensor]) -> None:
    for name, tensor in _changing(model).items():
        tensor.copy_(values[name])


def _fingerprint(model, tokens: Tensor, held_out: Tensor | None, teacher) -> str:
    """A hash of all that a run reads and does not change: texts, frozen weights, codes in 8 bits, the teacher."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= {n: b for n, b in model.named_buffers() if b.dtype in (torch.uint8, torch.int8)}
    parts = {"tokens": tokens, "held_out": held_out} | {f"model.{n}": t for n, t in frozen.items()}
    parts |= {} if teacher is None else {f"teacher.{n}": p for n, p in teacher.named_parameters()}
    shapes = [(n, tuple(p.shape)) for n, p in _trainable(model).items()]
    return hash_tensors(parts, about=repr(shapes))


# --- small things -----------------------------------------------------------------------------------------------


@contextmanager
def _random_of(device: torch.device, seed: int) -> Iterator[None]:
    """Random numbers that depend on the seed alone, for a while, and then as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.random.default_generator.manual_seed(seed)
        for one in devices:
            torch.cuda.default_generators[one.index].manual_seed(seed)
        yield


def _write_json(path: Path, what: dict) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(what) + "\n", encoding="utf-8")
    _rename(part, path)


def _rename(part: Path, path: Path) -> None:
    """Reach the disk, then take the place of an older file: nobody ever sees half a file."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
