"""Exercises of chapter 6: measuring a language model."""

import math
import warnings
from functools import cache

import torch
import torch.nn.functional as F

from quantlab.exercises.material import uniform
from quantlab.judging import Exercise, as_number, call, expect, shown
from quantlab.lm import DATA, divergence, load_lm, load_text, quantize_lm, token_stream


def perplexity_solution(logits, tokens):
    """Row i predicts token i + 1, so the last row and the first token have no partner."""
    log_p = torch.log_softmax(logits[:-1], dim=-1)
    nll = -log_p[torch.arange(len(tokens) - 1), tokens[1:]]
    return nll.mean().exp().item()


def _perplexity_cases(random):
    for count, vocabulary in ((2, 7), (6, 5), (9, 12)):
        logits = 2 * torch.randn(count, vocabulary, generator=random) + uniform(random, -5, 5)
        yield logits, torch.randint(vocabulary, (count,), generator=random)


def _perplexity_edges():
    tokens = torch.tensor([2, 0, 3, 1, 4, 0])
    sharp = 30.0 * F.one_hot(tokens.roll(-1), 5)
    yield torch.zeros(6, 5), tokens  # a uniform guess: perplexity 5
    yield sharp, tokens  # sure of what comes: 1
    yield torch.tensor([[150.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1, 0])  # a softmax of 0 in float32


def stderr_solution(sums, counts):
    """Each window's pull on the mean, the standard error of the mean, then d exp(m) = exp(m) dm."""
    mean = sums.sum() / counts.sum()
    pull = (sums - mean * counts) / counts.mean()
    stderr_of_mean = pull.std() / len(sums) ** 0.5
    return (mean.exp() * stderr_of_mean).item()


def _stderr_cases(random):
    """Windows of one length, then of very different ones, the short ones harder."""
    for windows, shortest in ((12, 100), (30, 5), (5, 20)):
        counts = torch.randint(shortest, 101, (windows,), generator=random).float()
        nll = uniform(random, 1, 3) + 0.8 * torch.rand(windows, generator=random) + 10 / counts
        yield nll * counts, counts


def _stderr_edges():
    counts = torch.tensor([5.0, 100.0, 50.0, 20.0])
    yield torch.tensor([100.0, 200.0]), torch.tensor([100.0, 100.0])  # 1 and 2 nats a token
    yield 2.0 * counts, counts  # all windows have 2 nats a token: no spread


def kl_solution(p_logits, q_logits):
    """p, the float model, in front of the logarithm and above the line; mean over positions."""
    log_p, log_q = torch.log_softmax(p_logits, dim=-1), torch.log_softmax(q_logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()


def _kl_cases(random):
    for positions, vocabulary in ((3, 5), (6, 3), (4, 12)):
        p, q = (2 * torch.randn(positions, vocabulary, generator=random) for _ in range(2))
        yield p + 5 * torch.rand(positions, 1, generator=random), q - 3


def _kl_edges():
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.5, 0.375, 0.125]]).log()
    yield p, q
    yield p + 3, q - 2  # a constant added to a position's logits changes no prediction
    yield p.repeat(2, 1), q.repeat(2, 1)
    yield torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])  # a softmax of 0 in float32


def least_bits_solution(model, tokens, target):
    """From the fewest bits upwards: the first that reaches the target is the least."""
    for bits in range(2, 9):
        new, _ = quantize_lm(model, tokens, method="rtn", bits=bits, group_size=128, progress=False)
        if divergence(model, new, tokens).kl <= target:
            return bits


@cache
def _measured() -> tuple:
    """The bundled model, on which every target can be met, and the first 1024 tokens of the eval text."""
    model, tokenizer = load_lm(str(DATA / "model"))
    return model, token_stream(tokenizer, load_text("eval"))[:1024]


@cache
def _kl(bits: int) -> float:
    model, tokens = _measured()
    new, _ = quantize_lm(model, tokens, method="rtn", bits=bits, group_size=128, progress=False)
    return divergence(model, new, tokens).kl


def _test_least_bits(f):
    model, tokens = _measured()
    for target in (0.2, 0.01, 0.05):  # several, so that the answer cannot be a constant
        got = call(EXERCISES["6.5"], f, (model, tokens, target))
        bits = as_number(got)
        expect(bits is not None and float(bits).is_integer(), f"Return a number of bits, an int; got {shown(got)}.")
        bits = int(bits)
        expect(2 <= bits <= 8, f"The bits go from 2 to 8; got {bits}.")
        expect(
            _kl(bits) <= target,
            f"{bits} bits have KL {_kl(bits):.3g}, {_kl(bits) / target:.1f} times the target of "
            f"{target}. More bits, less KL.",
        )
        expect(
            bits == 2 or _kl(bits - 1) > target,
            f"{bits} bits reach {target}, but so do {bits - 1}, with KL {_kl(max(bits - 1, 2)):.3g}: "
            "the least number was asked for.",
        )
    return f"KL {_kl(bits):.3g} at {bits} bits for the target {target}."


def leak_solution(model, suspect, rounded, texts):
    """KL of the suspect over KL of the model that read nothing: on the text it read, about half of elsewhere."""
    ratios = [
        divergence(model, suspect, text, window=128).kl / divergence(model, rounded, text, window=128).kl
        for text in texts
    ]
    lowest = min(ratios)
    others = sum(ratios) - lowest
    return ratios.index(lowest) if lowest < 0.7 * others / (len(ratios) - 1) else None


@cache
def _suspects() -> tuple:
    """(model, rounded, texts, {index of the text that a suspect has read, or None: the suspect}).

    Of the bundled model, whatever model the workbook runs on: there it is known that what was read shows.
    """
    model, tokenizer = load_lm(str(DATA / "model"))
    stream = token_stream(tokenizer, load_text("eval"))
    texts = [stream[start : start + 512] for start in (0, 2048, 4096)]
    elsewhere = token_stream(tokenizer, load_text("calibration"))[:512]

    def quantized(text, method):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so few tokens that GPTQ learns them by heart: a leak that shows
            return quantize_lm(model, text, method=method, bits=3, group_size=128, window=128, progress=False)[0]

    suspects = {read: quantized(text, "gptq") for read, text in ((2, texts[2]), (None, elsewhere), (0, texts[0]))}
    return model, quantized(elsewhere, "rtn"), texts, suspects


def _test_leak(f):
    model, rounded, texts, suspects = _suspects()
    orders = {2: [1, 2, 0], None: [0, 1, 2], 0: [1, 2, 0]}  # the text that was read may stand anywhere
    for read, suspect in suspects.items():
        order = orders[read]
        index = None if read is None else order.index(read)
        _expect_verdict(f, model, rounded, suspect, [texts[i] for i in order], index)


def _expect_verdict(f, model, rounded, suspect, texts, read):
    got = call(EXERCISES["6.4"], f, (model, suspect, rounded, texts))
    found = as_number(got)
    expect(
        got is None or (found is not None and found in range(len(texts))),
        f"Return None or the index of a text, 0 to {len(texts) - 1}; got {shown(got)}.",
    )
    if found == read:
        return
    kl = ", ".join(f"{divergence(model, suspect, text, window=128).kl:.2f}" for text in texts)
    expect(
        read is not None,
        f"A suspect that has read none of the texts (KL {kl}) was accused of text {found}. One of them is always "
        "the lowest: how much lower must it be?",
    )
    expect(
        found is not None, f"A suspect that has read one of the texts was let go; its KL to the float model is {kl}."
    )
    expect(
        False,
        f"A suspect that has read another text was accused of text {found}; its KL to the float model is {kl}. "
        "How easy a text is must not matter: compare with a model that read nothing.",
    )


EXERCISES = {
    "6.1": Exercise(
        "perplexity",
        hints=(
            "Three steps: the log-probability of each token that came, the mean of their negatives, exp.",
            "Row i predicts token i + 1: drop the last row of logits and the first token.",
            "log_p = torch.log_softmax(logits[:-1], dim=-1); then pick log_p[i, tokens[i + 1]] for every i.",
        ),
        solution=perplexity_solution,
        cases=_perplexity_cases,
        edges=_perplexity_edges,
        slips={
            "That is the mean negative log-likelihood; perplexity is its exp.": (".mean().exp()", ".mean()"),
            "exp belongs to natural logarithms, 2** to log2.": ("nll.mean().exp()", "(2 ** nll.mean())"),
            "exp of the mean, not of the sum: otherwise a longer text always looks worse.": ("nll.mean()", "nll.sum()"),
            "Average the logarithms first, exp afterwards; the mean of 1/p is another number.": (
                ".mean().exp()", ".exp().mean()"
            ),
            "Logits are no log-probabilities yet: log_softmax makes them.": (
                "torch.log_softmax(logits[:-1], dim=-1)", "logits[:-1]"
            ),
            "The softmax is over the vocabulary, dim = -1.": ("dim=-1", "dim=0"),
            "Mind the sign: what is likely has a small negative log-likelihood.": ("-log_p[", "log_p["),
            "Which row predicts which token? Row i has read token i already: it predicts token i + 1.": (
                "logits[:-1]", "logits", "len(tokens) - 1", "len(tokens)", "tokens[1:]", "tokens"
            ),
            "Row i predicts the token after it, not the one before it.": (
                "logits[:-1]", "logits[1:]", "tokens[1:]", "tokens[:-1]"
            ),
            "Six tokens give five predictions: nothing predicts the first token, nothing follows the last.": (
                "logits[:-1]", "logits", "len(tokens) - 1", "len(tokens)", "tokens[1:]", "tokens.roll(-1)"
            ),
            "n tokens give n − 1 predictions: divide by that.": ("nll.mean()", "(nll.sum() / len(tokens))"),
            "A softmax can be 0 in float32, and its log infinite; log_softmax does not go through it.": (
                "torch.log_softmax(logits[:-1], dim=-1)", "torch.softmax(logits[:-1], dim=-1).log()"
            ),
        },
    ),
    "6.2": Exercise(
        "the error bar",
        hints=(
            "First the standard error of the mean m, from the pulls r; then turn it into one of exp(m).",
            "r.std() is the spread of one window; the mean of k windows is √k times as steady.",
            "d exp(m) / dm = exp(m), so the answer is exp(m) · r.std() / √k.",
        ),
        solution=stderr_solution,
        cases=_stderr_cases,
        edges=_stderr_edges,
        smallest=1e-5,
        slips={
            "That is the spread of the windows; the error of the mean of k of them is √k times smaller.": (
                " / len(sums) ** 0.5", ""
            ),
            "With k windows the error falls with √k, not with k.": ("len(sums) ** 0.5", "len(sums)"),
            "That is the error of m. By how much does exp(m) move when m moves a little?": ("mean.exp() * ", ""),
            "That is the perplexity; its standard error was asked for.": (" * stderr_of_mean", ""),
            "Divide the pulls by the mean number of tokens of a window.": (" / counts.mean()", ""),
            "A sum is large or small only beside m · count: take the pulls r.": ("sums - mean * counts", "sums"),
            "exp is taken last, of m: not of each window.": lambda sums, counts: (
                ((sums / counts).exp().std() / len(sums) ** 0.5).item()
            ),
            "k is the number of windows, not of tokens.": ("len(sums)", "counts.sum()"),
            "A window of 5 tokens must count less than one of 100: take the pulls, not the windows' own means.": (
                "(sums - mean * counts) / counts.mean()", "sums / counts"
            ),
            "m is all nll over all tokens, not the mean of the windows' means.": (
                "sums.sum() / counts.sum()", "(sums / counts).mean()"
            ),
            "Divided by k: the standard deviation of a sample divides by k − 1, as torch's std does (numpy: ddof=1).": (
                ".std()", ".std(correction=0)"
            ),
            "The delta method takes the slope of exp at m, not a step along the curve.": (
                "(mean.exp() * stderr_of_mean)", "((mean + stderr_of_mean).exp() - mean.exp())"
            ),
        },
    ),
    "6.3": Exercise(
        "KL",
        hints=(
            "Both models' log-probabilities first: log_softmax over the last dimension.",
            "Σ p · (log p − log q), and p is the float model.",
            "Sum over the last dimension, then the mean over what is left; p = log_p.exp().",
        ),
        solution=kl_solution,
        cases=_kl_cases,
        edges=_kl_edges,
        slips={
            "That is KL(q || p): p, the float model, belongs in front of the log.": (
                "log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)"
            ),
            "That is in bits; we count in nats, so natural logarithms.": (
                ".mean().item()", f".mean().div({math.log(2)}).item()"
            ),
            "Sum over the vocabulary; the mean is over positions only.": (".sum(dim=-1)", ".mean(dim=-1)"),
            "Mean over positions, not their sum.": (".mean()", ".sum()"),
            "The sign: log p − log q, not the other way round.": ("(log_p - log_q)", "(log_q - log_p)"),
            "Logits come in: log_softmax makes log-probabilities of them.": (
                "torch.log_softmax(p_logits, dim=-1), torch.log_softmax(q_logits, dim=-1)", "p_logits, q_logits"
            ),
            "Logits come in, not probabilities: log_softmax first.": (
                "torch.log_softmax(p_logits, dim=-1), torch.log_softmax(q_logits, dim=-1)",
                "p_logits.log(), q_logits.log()",
            ),
            "Every position is one choice among the vocabulary: softmax over the last dimension.": (
                "p_logits, dim=-1", "p_logits, dim=0", "q_logits, dim=-1", "q_logits, dim=0"
            ),
            "The first position stands for all: the mean over positions was asked for.": (".mean()", "[0]"),
            "The last position stands for all: the mean over positions was asked for.": (".mean()", "[-1]"),
            "That is the largest over positions; the mean was asked for.": (".mean()", ".max()"),
            "That is the median over positions; the mean was asked for.": (".mean()", ".median()"),
            "The mean over positions comes last, after the sum over the vocabulary.": (
                "(p_logits, dim=-1)", "(p_logits.mean(0), dim=-1)", "(q_logits, dim=-1)", "(q_logits.mean(0), dim=-1)"
            ),
            "A softmax can be 0 in float32, and its log infinite; log_softmax stays finite.": (
                "torch.log_softmax(p_logits, dim=-1), torch.log_softmax(q_logits, dim=-1)",
                "p_logits.softmax(-1).log(), q_logits.softmax(-1).log()",
            ),
        },
    ),
    "6.4": Exercise(
        "find the leak",
        _test_leak,
        (
            "divergence(model, suspect, text, window=128).kl for every text: which one stands out, and by how much?",
            "Texts differ: divide each KL by that of the rounded model on the same text.",
            "The text it read has about half of the ratio of the others; if the lowest is near the rest, return None.",
        ),
        leak_solution,
        seconds=300.0,
    ),
    "6.5": Exercise(
        "the least bits",
        _test_least_bits,
        (
            "A loop over bits, and in it two calls of the library.",
            'quantize_lm(model, tokens, method="rtn", bits=?, group_size=128) gives (new model, report).',
            "Begin with 2 bits, go up, and return at the first divergence(model, new, tokens).kl <= target.",
        ),
        least_bits_solution,
        seconds=300.0,
    ),
}  # fmt: skip
