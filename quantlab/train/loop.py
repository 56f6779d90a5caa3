"""The training loop: a model learns a text or another model's predictions; a run can be stopped and resumed."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from quantlab.arguments import check_int, check_number, kind, longest_context, text_config
from quantlab.lm.checkpoint import hash_tensors
from quantlab.lm.measuring import checked_windows, divergence, perplexity
from quantlab.modules import device_of, evaluating
from quantlab.train.run import SEED_STRIDE, History, Run, trainable_of


def finetune(
    model: nn.Module, tokens: Tensor, *, steps: int, batch: int = 8, window: int = 128, learning_rate: float = 1e-3,
    warmup: int | None = None, teacher: nn.Module | None = None, held_out: Tensor | None = None,
    check_every: int | None = None, patience: int | None = None, seed: int = 0, folder=None, progress: bool = True,
    on_step: Callable[[int, float], None] | None = None,
) -> History:  # fmt: skip
    """Train, in place, the parameters of a language model that have requires_grad; returns what happened.

        loss = mean over the predicted tokens of -log p(next token), or, with a teacher, of KL(teacher || model)
        AdamW (Loshchilov and Hutter 2019), betas 0.9 and 0.95, no weight decay; the norm of all gradients clipped to 1
        rate = learning_rate * min((step + 1) / warmup, (steps - step) / (steps - warmup))

    tokens are one stream (n,), cut into windows, or rows (sequences, length), used whole; int64. A batch, and dropout,
    depend on (seed, step) alone. warmup, and check_every, are a tenth of the steps unless given. held_out, (n,) or
    rows, is measured in eval mode before the first step, every check_every steps and after the last. With patience,
    training stops when so many measurements in a row were no better than the best before, whose weights come back.

    folder keeps a checkpoint, written every check_every steps; the same call goes on from there, and on the CPU ends
    with the same bits as a run that was never cut off. on_step(step, loss) is called after each step (that is left).
    The model comes back in the modes it had; random numbers elsewhere stay as they would have been.

    Raises: ValueError if nothing is trainable, the tokens do not suit the model or the window, a number is out of its
    range, the loss or its gradients are no longer finite, or the folder is damaged or holds another run.
    """
    settings = _Settings(steps, batch, window, learning_rate, warmup, check_every, patience, seed)
    _check_data(model, tokens, teacher, held_out, settings)
    rate = partial(rate_at, peak=settings.learning_rate, steps=settings.steps, warmup=settings.warmup)
    adamw = torch.optim.AdamW(trainable_of(model).values(), betas=(0.9, 0.95), weight_decay=0.0)
    run = Run(model, [adamw], rate=rate, loss=partial(loss_on, model, teacher=teacher), seed=settings.seed)
    measure = None if held_out is None else partial(_held_out_loss, model, teacher, held_out, settings.window)
    about = {} if folder is None else asdict(settings) | {"data": _fingerprint(model, tokens, held_out, teacher)}
    batch_of = partial(batch_at, tokens, batch=settings.batch, window=settings.window, seed=settings.seed)
    numbers = settings.steps, settings.check_every, settings.patience
    with nullcontext() if teacher is None else evaluating(teacher):
        return run.go(batch_of, *numbers, measure, folder=folder, about=about, progress=progress, on_step=on_step)


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
        random = torch.Generator().manual_seed(seed * SEED_STRIDE + epoch)
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


def loss_on(model, ids: Tensor, teacher=None) -> Tensor:
    """Mean over the tokens after the first of -log p(token), or of KL(teacher || model) before them; (), in nats.

    Shapes: ids (batch, tokens), on the model's device; a teacher may be on another.
    """
    logits = model(ids, use_cache=False).logits[:, :-1].float().flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad():
        target = teacher(ids.to(device_of(teacher)), use_cache=False).logits[:, :-1].float().flatten(0, 1)
    log_p, log_q = target.to(logits.device).log_softmax(-1), logits.log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) / len(logits)


def sample_text_tokens(
    model, count: int, length: int, *, start: int | None = None, temperature: float = 1.0, batch: int = 64,
    seed: int = 0, progress: bool = True,
) -> Tensor:  # fmt: skip
    """Texts that the model writes itself, (count, length) ids, int64, on the CPU: to distill without data.

    Each row begins with the token `start` (default: the model's begin token) and goes on with samples from the
    model's own distribution, its logits divided by temperature; after an end token the next document follows in the
    same row, as in a stream. `batch` rows are written at once with one KV cache. LLM-QAT trains on such texts (Liu et
    al. 2023, sec. 3.1). The same seed and batch give the same rows.

    Raises: ValueError if there is no begin token and no start, temperature is not above 0, or length is more than the
    model can read.
    """
    start = getattr(text_config(model), "bos_token_id", None) if start is None else start
    if start is None:
        raise ValueError("the model has no begin token: say which token each row starts with (start=...)")
    start = check_int(start, "start", 0, text_config(model).vocab_size - 1)
    length = check_int(length, "length", 1, longest_context(model))
    temperature = check_number(temperature, "temperature", above=0)
    count, batch = check_int(count, "count", 1), check_int(batch, "batch", 1)
    random, rows = torch.Generator().manual_seed(check_int(seed, "seed", 0, 2**40)), []
    for first in tqdm(range(0, count, batch), desc="texts", leave=False, disable=not progress):
        begin = torch.full((min(batch, count - first), 1), start)
        rows.append(_continue(model, begin, length, temperature, random))
    return torch.cat(rows)


@torch.no_grad()
def _continue(model, ids: Tensor, length: int, temperature: float, random: torch.Generator) -> Tensor:
    """Rows that begin with ids, (rows, 1), and go on with samples: (rows, length)."""
    written, cache = [ids], None
    with evaluating(model):
        while len(written) < length:
            out = model(ids.to(device_of(model)), past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float().cpu()
            ids = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)
            written.append(ids)
    return torch.cat(written, dim=1)


@dataclass(frozen=True)
class _Settings:
    """The numbers of a run, checked, as JSON holds them."""

    steps: int
    batch: int
    window: int
    learning_rate: float
    warmup: int | None
    check_every: int | None
    patience: int | None
    seed: int

    def __post_init__(self):
        steps, rate = check_int(self.steps, "steps", 1), check_number(self.learning_rate, "learning_rate", above=0)
        tenth, patience = max(1, steps // 10), self.patience
        vars(self).update(
            steps=steps,
            batch=check_int(self.batch, "batch", 1),
            window=check_int(self.window, "window", 2),
            learning_rate=float(rate),
            warmup=tenth if self.warmup is None else check_int(self.warmup, "warmup", 1, steps),
            check_every=tenth if self.check_every is None else check_int(self.check_every, "check_every", 1),
            patience=patience if patience is None else check_int(patience, "patience", 1),
            seed=check_int(self.seed, "seed", 0, 2**40),
        )


def _check_data(model, tokens: Tensor, teacher, held_out: Tensor | None, settings: _Settings) -> None:
    _check_text("tokens", tokens, model, settings.window)
    if held_out is not None:
        _check_text("held_out", held_out, model, settings.window)
    if teacher is model:
        raise ValueError("teacher must be another model than the one that is trained")
    if settings.patience is not None and held_out is None:
        raise ValueError("patience looks at the held-out loss: pass held_out too")


def _check_text(name: str, ids: Tensor, model, window: int) -> None:
    if not isinstance(ids, Tensor) or ids.ndim not in (1, 2) or ids.numel() == 0:
        raise ValueError(f"{name} must be one stream (n,) or rows (sequences, length) of ids, got {kind(ids)}")
    length = window if ids.ndim == 1 else ids.shape[1]
    longest, _ = checked_windows(model, ids.flatten(), max(2, length), None)
    if longest != length:
        raise ValueError(f"{name} come in pieces of {length} tokens; the model reads 2..{longest}")
    if ids.numel() < length:
        raise ValueError(f"{name} must fill at least one window of {length}, got {len(ids)} tokens")


def _held_out_loss(model, teacher, held_out: Tensor, window: int) -> float:
    window = window if held_out.ndim == 1 else held_out.shape[1]
    if teacher is None:
        return perplexity(model, held_out.flatten(), window=window).nll
    return divergence(teacher, model, held_out.flatten(), window=window).kl


def _fingerprint(model, tokens: Tensor, held_out: Tensor | None, teacher) -> str:
    """A hash of all that a run reads and does not change: texts, frozen weights, codes in 8 bits, the teacher."""
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    frozen |= {n: b for n, b in model.named_buffers() if b.dtype in (torch.uint8, torch.int8)}
    parts = {"tokens": tokens, "held_out": held_out} | {f"model.{n}": t for n, t in frozen.items()}
    parts |= {} if teacher is None else {f"teacher.{n}": p for n, p in teacher.named_parameters()}
    shapes = [(n, tuple(p.shape)) for n, p in trainable_of(model).items()]
    return hash_tensors(parts, about=repr(shapes))
