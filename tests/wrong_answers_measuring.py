"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

import math

import torch
import torch.nn.functional as F

from quantlab.lm import divergence, perplexity


def nll(logits, tokens):
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="none")


def kl(p_logits, q_logits):
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def softmax_kl(p_logits, q_logits):
    p, q = p_logits.softmax(-1), q_logits.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def pull(sums, counts):
    return (sums - sums.sum() / counts.sum() * counts) / counts.mean()


def value(sums, counts):
    return (sums.sum() / counts.sum()).exp()


def lowest_kl(model, suspect, rounded, texts):
    found = [divergence(model, suspect, text, window=128).kl for text in texts]
    return found.index(min(found))


def lowest_perplexity(model, suspect, rounded, texts):
    found = [perplexity(suspect, text, window=128).value for text in texts]
    return found.index(min(found))


def perplexity_below_that_of_the_rounded(model, suspect, rounded, texts):
    for i, text in enumerate(texts):
        if perplexity(suspect, text, window=128).value < perplexity(rounded, text, window=128).value:
            return i


WRONG = {
    "6.1": [
        (lambda x, t: nll(x, t).mean(), "perplexity is its exp"),
        (lambda x, t: nll(x, t).sum().exp(), "not of the sum"),
        (lambda x, t: 2 ** nll(x, t).mean(), "2** to log2"),
        (lambda x, t: (-x[torch.arange(len(t) - 1), t[1:]]).mean().exp(), "log_softmax makes them"),
        (lambda x, t: F.cross_entropy(x, t).exp(), "Which row"),
        (lambda x, t: F.cross_entropy(x[1:], t[:-1]).exp(), "not the one before it"),
        (lambda x, t: F.cross_entropy(x, t.roll(-1)).exp(), "five predictions"),
        (lambda x, t: nll(x, t).exp().mean(), "Average the logarithms first"),
        (lambda x, t: F.nll_loss(x[:-1].softmax(-1).log(), t[1:]).exp(), "log_softmax does not"),
        (lambda x, t: nll(x, t).exp(), "A number was expected"),
        (lambda x, t: (-nll(x, t).mean()).exp(), "Mind the sign"),
    ],
    "6.2": [
        (lambda s, n: value(s, n) * pull(s, n).std(), "the spread of the windows"),
        (lambda s, n: pull(s, n).std() / math.sqrt(len(s)), "By how much does exp(m) move"),
        (lambda s, n: value(s, n) * s.std() / n.mean() / math.sqrt(len(s)), "take the pulls r"),
        (lambda s, n: (s / n).exp().std() / math.sqrt(len(s)), "exp is taken last"),
        (lambda s, n: value(s, n) * pull(s, n).std() / n.sum().sqrt(), "not of tokens"),
        (lambda s, n: value(s, n) * (s / n).std() / math.sqrt(len(s)), "must count less"),
        (lambda s, n: value(s, n) * pull(s, n), "A number was expected"),
        (lambda s, n: value(s, n) * pull(s, n).numpy().std() / math.sqrt(len(s)), "ddof=1"),
        (lambda s, n: value(s, n) * pull(s, n).std() / math.sqrt(len(s) - 1), "was expected"),
    ],
    "6.3": [
        (lambda p, q: kl(q, p).mean(), "KL(q || p)"),
        (lambda p, q: kl(p, q).mean() / math.log(2), "in bits"),
        (lambda p, q: kl(p, q).sum(), "not their sum"),
        (lambda p, q: kl(p, q).mean() / p.shape[-1], "the mean is over positions only"),
        (lambda p, q: -kl(p, q).mean(), "The sign"),
        (lambda p, q: (p * (p / q).log()).sum(-1).mean(), "was expected"),
        (lambda p, q: (p.exp() * (p - q)).sum(-1).mean(), "log_softmax makes"),
        (softmax_kl, "stays finite"),
        (lambda p, q: F.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="batchmean"), "KL(q || p)"),
        (lambda p, q: (kl(p, q), 0.0), "A number was expected"),
        (lambda p, q: kl(p, q)[0], "The first position"),
        (lambda p, q: kl(p, q)[-1], "The last position"),
        (lambda p, q: kl(p, q).max(), "the largest over positions"),
        (lambda p, q: kl(p, q).median(), "the median over positions"),
        (lambda p, q: kl(p.mean(0), q.mean(0)), "comes last"),
        (lambda p, q: kl(p.flatten(), q.flatten()), "was expected"),
    ],
    "6.4": [
        (lambda *_: None, "was let go"),
        (lambda *_: 1, "how much lower must it be"),
        (lowest_kl, "how much lower must it be"),
        (lowest_perplexity, "was accused of text"),  # of which suspect first: two texts are as good as equal
        (perplexity_below_that_of_the_rounded, "must not matter"),
        (lambda *_: 3, "index of a text"),
        (lambda *_: "leaked", "index of a text"),
    ],
    "6.5": [
        (lambda model, tokens, target: 2, "times the target"),
        (lambda model, tokens, target: 8, "the least number"),
        (lambda model, tokens, target: 0.01, "an int"),
        (lambda model, tokens, target: 1, "from 2 to 8"),
    ],
}
