"""How well a model predicts a text, how far it is from another model, and what it writes."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quantlab.arguments import (
    check_int,
    check_kind,
    check_model,
    check_number,
    check_tensor,
    kind,
    longest_context,
    text_config,
)
from quantlab.lm.texts import token_stream
from quantlab.metrics import kl_per_position
from quantlab.modules import check_finite, evaluating


class Perplexity(NamedTuple):
    """exp of the mean negative log-likelihood; stderr says how far another text of this length might be."""

    value: float
    stderr: float
    nll: float  # nats per token
    tokens: int  # predicted


class Divergence(NamedTuple):
    """How far a model's predictions are from a reference model's on the same text."""

    kl: float  # mean KL(reference || model), nats per token
    stderr: float
    top1: float  # fraction of positions where both would say the same token
    tokens: int


def perplexity(model, tokens: Tensor, *, window: int = 512, stride: int | None = None) -> Perplexity:
    """How surprised the model is by a text: exp of the mean negative log-likelihood of each token.

    The tokens are read in windows; a new one starts every `stride` (default: window, no overlap). Each token is
    predicted once, in the first window that reaches it, from the tokens before it in that window; the very first
    token of a window without overlap is context only, and so are begin tokens, which no text predicts (unless the
    model ends its texts with them). A smaller stride gives more context and costs more. The standard error takes
    the windows as independent samples (delta method for the exp).

    Shapes: tokens (n,), one stream. Raises: ValueError if n < 2, window < 2, or not 1 <= stride <= window.
    """
    window, stride = checked_windows(model, tokens, window, stride)
    read = _windows(model, tokens, window, stride)
    return _perplexity([_surprise(_logits(model, ids), ids, scored) for ids, scored in read])


def _logits(model, ids: Tensor) -> Tensor:
    """Of all tokens of each window but the last, which nothing follows."""
    with torch.no_grad(), evaluating(model):
        logits = model(ids.to(model.device), use_cache=False).logits[:, :-1].float().cpu()
    if logits.isnan().any():
        check_finite(model)
        raise ValueError("the model's predictions are NaN, though its weights are finite; has a layer overflowed?")
    return logits


def _surprise(logits: Tensor, ids: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Of each window: the nats of its tokens that count, and how many these are."""
    nll = _negative_log_likelihood(logits.flatten(0, 1), ids[:, 1:].flatten()).view_as(scored)
    return (nll * scored).sum(1), scored.sum(1)


def _perplexity(read: list[tuple]) -> Perplexity:
    sums, counts = (torch.cat(parts).double().tolist() for parts in zip(*read, strict=True))
    mean, stderr = ratio(sums, counts)
    value = math.exp(mean) if mean < 700 else math.inf  # a wrecked model may be this sure of the wrong token
    return Perplexity(value, value * stderr, mean, int(sum(counts)))


def _negative_log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of each token, in nats; float64, since float32's sum over 49,152 words is off in the fifth digit."""
    pairs = zip(logits.split(256), tokens.split(256), strict=True)
    return torch.cat([F.cross_entropy(some.double(), goal, reduction="none") for some, goal in pairs])


def divergence(reference, model, tokens: Tensor, *, window: int = 512, stride: int | None = None) -> Divergence:
    """KL(reference || model) and top-1 agreement over the same windows as perplexity; stderr over windows.

    Unlike a difference of perplexities it cannot cancel out, and its error bar is far smaller: both
    models read the same text.
    """
    read = _read_by_both(reference, model, tokens, window, stride)
    return _divergence([_distance(p, q, scored) for p, q, _, scored in read])


def perplexity_and_divergence(
    reference, model, tokens: Tensor, *, window: int = 512, stride: int | None = None
) -> tuple[Perplexity, Divergence]:
    """perplexity(model) and divergence(reference, model); each model reads the text once."""
    surprises, distances = [], []
    for p, q, ids, scored in _read_by_both(reference, model, tokens, window, stride):
        surprises.append(_surprise(q, ids, scored))
        distances.append(_distance(p, q, scored))
    return _perplexity(surprises), _divergence(distances)


def _read_by_both(reference, model, tokens: Tensor, window: int, stride: int | None) -> Iterator[tuple]:
    """The logits of both, the tokens, and which of them count, of some windows at a time."""
    window, stride = checked_windows(model, tokens, window, stride)
    window, stride = checked_windows(reference, tokens, window, stride)
    for ids, scored in _windows(reference, tokens, window, stride):
        yield _logits(reference, ids), _logits(model, ids), ids, scored


def _distance(p: Tensor, q: Tensor, scored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each window: the KL of its positions that count, how many these are, and at how many both say the same."""
    kl = torch.cat([kl_per_position(*some) for some in zip(p.split(64, 1), q.split(64, 1), strict=True)], dim=1)
    return (kl * scored).sum(1), scored.sum(1), ((p.argmax(-1) == q.argmax(-1)) * scored).sum(1)


def _divergence(read: list[tuple]) -> Divergence:
    sums, counts, agreed = (torch.cat(parts).double().tolist() for parts in zip(*read, strict=True))
    mean, stderr = ratio(sums, counts)
    return Divergence(mean, stderr, sum(agreed) / sum(counts), int(sum(counts)))


SMALL = 8e6  # parameters: on models up to here the workbook reads all the tokens that its text speaks of


def budget(model, tokens: int, *, least: int = 1024) -> int:
    """How many of so many tokens a notebook reads on this model: all on one of the bundled one's size, fewer on a
    larger one in proportion, but at least `least` (or all, if there are not so many).
    """
    parameters = sum(p.numel() for p in check_model(model).parameters())
    share = int(check_int(tokens, "tokens", 1) * min(1.0, SMALL / parameters))
    return max(share, min(check_int(least, "least", 1), tokens))


def checked_windows(model, tokens: Tensor, window: int, stride: int | None) -> tuple[int, int]:
    """Window and stride; a window that is longer than the model can read is cut to that."""
    check_model(model)
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or len(tokens) < 2:
        raise ValueError(f"need one row of at least 2 tokens, got {kind(tokens)}")
    if check_tensor(tokens, "tokens").dtype != torch.int64:
        raise ValueError(f"tokens must be integers, int64, got {tokens.dtype}")
    least, most, vocabulary = int(tokens.min()), int(tokens.max()), text_config(model).vocab_size
    if least < 0 or most >= vocabulary:
        raise ValueError(f"token ids lie in 0..{vocabulary - 1}, got {least}..{most}; is it another model's tokenizer?")
    window = min(check_int(window, "window", 2), longest_context(model))
    stride = window if stride is None else check_int(stride, "stride")
    if not 1 <= stride <= window:
        raise ValueError(f"need 1 <= stride <= window, got stride={stride}, window={window}")
    return window, stride


LOGITS = 2**25  # held at once: 134 MB in float32, eight windows of a small vocabulary or one of a large one


def _windows(model, tokens: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows (batch, window), and which of their predictions count, (batch, window - 1), as 0 or 1."""
    batch = max(1, min(8, LOGITS // (window * text_config(model).vocab_size)))
    rows, reached = [], 1  # tokens predicted so far; the first has nothing before it
    for start in range(0, max(1, len(tokens) - 1), stride):
        ids = tokens[start : start + window]
        if len(ids) < 2 or start + len(ids) <= reached:
            break
        scored = ((torch.arange(start + 1, start + len(ids)) >= reached) & predicted(model, ids)).long()
        rows.append((ids, scored))
        reached = start + len(ids)
    for i in range(0, len(rows), batch):
        full = [r for r in rows[i : i + batch] if len(r[0]) == window]
        if full:
            yield torch.stack([r[0] for r in full]), torch.stack([r[1] for r in full])
        for ids, scored in rows[i + len(full) : i + batch]:  # the last one may be shorter
            yield ids[None], scored[None]


def predicted(model, ids: Tensor) -> Tensor:
    """Which tokens after the first a text predicts, bool (..., window - 1): all but begin tokens, which are context.

    A model that also ends its texts with the begin token does predict it.
    """
    config = text_config(model)
    begin, end = getattr(config, "bos_token_id", None), getattr(config, "eos_token_id", None)
    only_context = -1 if begin is None or begin in (end if isinstance(end, list) else [end]) else begin
    return ids[..., 1:] != only_context


def ratio(sums: list, counts: list) -> tuple[float, float]:
    """Mean per token, and its standard error from the spread between windows."""
    s, n = torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64)
    mean = s.sum() / n.sum()
    # A short last window has next to no residual, and would make the spread look small. Most windows are usual: with
    # overlap the first predicts many more tokens than the others.
    whole = n >= n.quantile(0.5) / 2
    if whole.sum() < 2:
        return mean.item(), math.nan
    residual = ((s - mean * n) / n.mean())[whole]
    return mean.item(), (residual.std() / math.sqrt(len(s))).item()


def generate(model, tokenizer, prompt: str = "", *, tokens: int = 120, temperature: float = 0.0, seed: int = 0) -> str:
    """The prompt and how the model goes on, until it ends the text or `tokens` are written.

    temperature divides the logits before sampling: 0 always takes the likeliest token, 1 samples from the
    model's own distribution. The same seed gives the same text.

    Raises: ValueError if temperature < 0, tokens < 1, there is no token to start from, or prompt and tokens together
    are longer than the model can read.
    """
    temperature, tokens = check_number(temperature, "temperature", low=0), check_int(tokens, "tokens", 1)
    random = torch.Generator().manual_seed(check_int(seed, "seed", 0, 2**63))
    start, longest = token_stream(tokenizer, check_kind(prompt, "prompt", str)), longest_context(check_model(model))
    if len(start) + tokens > longest:
        raise ValueError(f"{len(start)} tokens of prompt and {tokens} more are over the {longest} that the model reads")
    if len(start) == 0:
        raise ValueError("the prompt has no token, and this tokenizer no begin token; write a word of it")
    ends = end_tokens(model, tokenizer)
    written, cache, ids = [], None, start[None].to(model.device)
    with torch.no_grad(), evaluating(model):
        for _ in range(tokens):
            out = model(ids, past_key_values=cache, use_cache=True)
            logits, cache = out.logits[0, -1].float().cpu(), out.past_key_values
            token = _choose(logits, temperature, random)
            if token in ends:
                break
            written.append(token)
            ids = torch.tensor([[token]], device=model.device)
    return tokenizer.decode(start.tolist() + written, skip_special_tokens=True)


def answer(model, tokenizer, question: str, *, tokens: int = 40) -> str:
    """What a model says to a question, greedily: in its chat template if its tokenizer has one, else by going on.

    Raises: ValueError as generate does.
    """
    prompt = check_kind(question, "question", str)
    if getattr(tokenizer, "chat_template", None):
        said = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    whole = generate(model, tokenizer, prompt, tokens=tokens)
    before = tokenizer.decode(token_stream(tokenizer, prompt).tolist(), skip_special_tokens=True)
    return whole.removeprefix(before).strip()


def end_tokens(model, tokenizer) -> set[int]:
    """The ids that end a text: the tokenizer's, and those of the model's generation settings."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def _choose(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    chance = torch.softmax((logits - logits.max()) / temperature, dim=0)
    return int(torch.multinomial(chance, 1, generator=random))
