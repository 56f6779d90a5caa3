"""Exercises of chapter 6: measuring a language model."""

import copy
import math
from functools import cache

import torch

from quantlab.checks import Exercise, Wrong, expect
from quantlab.lm import divergence, load_lm, load_text, quantize_lm, token_stream


def _number(value, what: str) -> float:
    """The answer as a float; Wrong if it is not one number."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"Return one number, the {what}; got {_shown(value)}.") from None


def _shown(value) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if torch.is_tensor(value) else repr(value)


def _near(a: float, b: float, tolerance: float = 2e-3) -> bool:
    return math.isclose(a, b, rel_tol=tolerance)


def perplexity_solution(logits, tokens):
    """Row i predicts token i + 1, so the last row and the first token have no partner."""
    log_p = torch.log_softmax(logits[:-1], dim=-1)
    nll = -log_p[torch.arange(len(tokens) - 1), tokens[1:]]
    return nll.mean().exp().item()


def _test_perplexity(f):
    tokens = torch.tensor([2, 0, 3, 1, 4, 0])
    flat = _number(f(torch.zeros(6, 5), tokens), "perplexity")
    causes = (
        (math.log(5), "That is the mean negative log-likelihood; perplexity is its exp."),
        (2 ** math.log(5), "exp belongs to natural logarithms, 2** to log2."),
        (5.0**5, "exp of the mean, not of the sum: otherwise a longer text always looks worse."),
        (1.0, "Logits are no log-probabilities yet: log_softmax makes them."),
    )
    cause = next(
        (text for value, text in causes if _near(flat, value)),
        "Take -log p of each token that came, the mean of these, exp.",
    )
    expect(
        _near(flat, 5),
        f"Logits of 0 everywhere are a uniform guess over 5 tokens, so perplexity 5; got {flat:.4g}. {cause}",
    )
    sharp = torch.zeros(6, 5)
    sharp[torch.arange(5), tokens[1:]] = 30.0
    known = _number(f(sharp, tokens), "perplexity")
    expect(
        _near(known, 1),
        "A model whose row i is sure of token i + 1, which then comes, has perplexity 1; got "
        f"{known:.4g}. Which row predicts which token? Six tokens give five predictions: nothing "
        "predicts the first, nothing follows the last.",
    )
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 2
    right, got = perplexity_solution(logits, tokens), _number(f(logits.clone(), tokens), "perplexity")
    expect(
        _near(got, right),
        f"On random logits {right:.4g} was wanted, {got:.4g} came. Average the logarithms first, exp "
        "afterwards; the mean of 1/p is another number.",
    )
    far = torch.tensor([[150.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    got = _number(f(far, torch.tensor([0, 1, 0])), "perplexity")
    expect(
        math.isfinite(got),
        f"A token 150 logits below the best should give a large number; got {got}. Its softmax is 0 in "
        "float32; log_softmax does not go through it.",
    )


def stderr_solution(sums, counts):
    """Each window's pull on the mean, the standard error of the mean, then d exp(m) = exp(m) dm."""
    mean = sums.sum() / counts.sum()
    pull = (sums - mean * counts) / counts.mean()
    stderr_of_mean = pull.std() / len(sums) ** 0.5
    return (mean.exp() * stderr_of_mean).item()


def _windows(*, equal: bool) -> tuple:
    """60 windows: the sum of nll and the number of tokens of each."""
    counts = torch.full((60,), 100.0)
    if not equal:
        counts[:30] = 5.0
    return (2.0 + 0.8 * torch.randn(60, generator=torch.Generator().manual_seed(0))) * counts, counts


def _test_stderr(f):
    def error(sums, counts):
        got = _number(f(sums.clone(), counts.clone()), "standard error")
        expect(math.isfinite(got) and got >= 0, f"A standard error is finite and not negative; got {got}.")
        return got

    sums, counts = _windows(equal=True)
    once, four = error(sums, counts), error(sums.repeat(4), counts.repeat(4))
    expect(
        _near(four, once / 2, 0.03),
        f"Four times as many windows should halve the error bar; it went from {once:.4g} to "
        f"{four:.4g}. The spread of the windows does not shrink with their number; the error of their "
        "mean does, with its square root.",
    )
    raised = error(sums + math.log(2) * counts, counts)
    expect(
        _near(raised, 2 * once, 0.01),
        "log 2 more for every token doubles the perplexity, and its error bar with it; yours went "
        f"from {once:.4g} to {raised:.4g}. By how much does exp(m) move when m moves a little?",
    )
    uneven = torch.tensor([5.0, 100.0, 50.0, 20.0])
    steady = error(2.0 * uneven, uneven)
    expect(
        steady < 1e-4,
        "Windows of different length, all with 2 nats per token, have no spread: 0 was wanted, "
        f"{steady:.4g} came. A sum is large or small only beside m · count.",
    )
    causes = {
        True: "Is k the number of windows (not of tokens), and is exp taken last (not of each window)?",
        False: "A window of 5 tokens must count less than one of 100.",
    }
    for equal, cause in causes.items():
        sums, counts = _windows(equal=equal)
        right, got = stderr_solution(sums, counts), error(sums, counts)
        expect(_near(got, right, 0.03), f"{right:.4g} was wanted, {got:.4g} came. {cause}")


def kl_solution(p_logits, q_logits):
    """p, the float model, in front of the logarithm and above the line; mean over positions."""
    log_p, log_q = torch.log_softmax(p_logits, dim=-1), torch.log_softmax(q_logits, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item()


def _test_kl(f):
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.5, 0.375, 0.125]]).log()
    right, one = kl_solution(p, q), _number(f(p.clone(), q.clone()), "mean KL")
    causes = (
        (kl_solution(q, p), "That is KL(q || p): p, the float model, belongs in front of the log."),
        (right / math.log(2), "That is in bits; we count in nats, so natural logarithms."),
        (right / 3, "Sum over the vocabulary; the mean is over positions only."),
        (-right, "The sign: log p − log q, not the other way round."),
    )
    cause = next(
        (text for value, text in causes if _near(one, value)),
        "Sum p · (log p − log q) over the vocabulary; logits come in, so log_softmax first.",
    )
    expect(
        _near(one, right),
        f"p = [1/2, 1/4, 1/4] and q = [1/2, 3/8, 1/8] should give {right:.4f}; got {one:.4f}. {cause}",
    )
    moved = _number(f(p + 3, q - 2), "mean KL")
    expect(
        _near(moved, right),
        "A constant added to all logits of a position changes no prediction, so KL should stay "
        f"{right:.4f}; got {moved:.4f}. Logits become log-probabilities by log_softmax.",
    )
    two = _number(f(p.repeat(2, 1), q.repeat(2, 1)), "mean KL")
    expect(
        _near(two, right),
        f"The same position twice should give the same {right:.4f}; got {two:.4f}. Mean over positions, not their sum.",
    )
    far = _number(f(torch.tensor([[200.0, 0.0]]), torch.tensor([[0.0, 200.0]])), "mean KL")
    expect(
        _near(far, 200),
        f"Two models that are sure of different tokens, 200 logits apart, have KL 200; got {far}. The "
        "softmax is 0 in float32 there, and its log infinite; log_softmax stays finite.",
    )


def least_bits_solution(model, tokens, target):
    """From the fewest bits upwards: the first that reaches the target is the least."""
    for bits in range(2, 9):
        new, _ = quantize_lm(model, tokens, method="rtn", bits=bits, group_size=128, progress=False)
        if divergence(model, new, tokens).kl <= target:
            return bits


@cache
def _measured() -> tuple:
    """The bundled model, and the first 1024 tokens of the eval text."""
    model, tokenizer = load_lm()
    return model, token_stream(tokenizer, load_text("eval"))[:1024]


@cache
def _kl(bits: int) -> float:
    model, tokens = _measured()
    new, _ = quantize_lm(model, tokens, method="rtn", bits=bits, group_size=128, progress=False)
    return divergence(model, new, tokens).kl


def _test_least_bits(f):
    model, tokens = _measured()
    for target in (0.2, 0.01):  # two, so that the answer cannot be a constant
        bits = f(copy.deepcopy(model), tokens.clone(), target)
        expect(isinstance(bits, int), f"Return a number of bits, an int; got {_shown(bits)}.")
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
    """(model, rounded, texts, {index of the text that a suspect has read, or None: the suspect})."""
    model, tokenizer = load_lm()
    stream = token_stream(tokenizer, load_text("eval"))
    texts = [stream[start : start + 512] for start in (0, 2048, 4096)]
    elsewhere = token_stream(tokenizer, load_text("calibration"))[:512]

    def quantized(text, method):
        return quantize_lm(model, text, method=method, bits=3, group_size=128, window=128, progress=False)[0]

    suspects = {read: quantized(text, "gptq") for read, text in ((2, texts[2]), (None, elsewhere), (0, texts[0]))}
    return model, quantized(elsewhere, "rtn"), texts, suspects


def _test_leak(f):
    model, rounded, texts, suspects = _suspects()
    for read, suspect in suspects.items():
        found = f(model, suspect, rounded, [text.clone() for text in texts])
        expect(
            found is None or (isinstance(found, int) and 0 <= found < len(texts)),
            f"Return None or the index of a text, 0 to {len(texts) - 1}; got {_shown(found)}.",
        )
        if found == read:
            continue
        kl = ", ".join(f"{divergence(model, suspect, text, window=128).kl:.2f}" for text in texts)
        expect(
            read is not None,
            f"A suspect that has read none of the texts (KL {kl}) was accused of text {found}. One of them is always "
            "the lowest: how much lower must it be?",
        )
        expect(
            found is not None,
            f"A suspect that has read one of the texts was let go; its KL to the float model is {kl}.",
        )
        raise Wrong(
            f"A suspect that has read another text was accused of text {found}; its KL to the float model is {kl}. "
            "How easy a text is must not matter: compare with a model that read nothing."
        )


EXERCISES = {
    "6.1": Exercise(
        "perplexity",
        _test_perplexity,
        (
            "Three steps: the log-probability of each token that came, the mean of their negatives, exp.",
            "Row i predicts token i + 1: drop the last row of logits and the first token.",
            "log_p = torch.log_softmax(logits[:-1], dim=-1); then pick log_p[i, tokens[i + 1]] for every i.",
        ),
        perplexity_solution,
    ),
    "6.2": Exercise(
        "the error bar",
        _test_stderr,
        (
            "First the standard error of the mean m, from the pulls r; then turn it into one of exp(m).",
            "r.std() is the spread of one window; the mean of k windows is √k times as steady.",
            "d exp(m) / dm = exp(m), so the answer is exp(m) · r.std() / √k.",
        ),
        stderr_solution,
    ),
    "6.3": Exercise(
        "KL",
        _test_kl,
        (
            "Both models' log-probabilities first: log_softmax over the last dimension.",
            "Σ p · (log p − log q), and p is the float model.",
            "Sum over the last dimension, then the mean over what is left; p = log_p.exp().",
        ),
        kl_solution,
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
    ),
}
