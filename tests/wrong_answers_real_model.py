"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""


def _errors(x, bits, share):
    scale = x.abs().amax(share, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((x / scale).round() * scale - x).square().sum() / x.square().sum()


def _shared(x, bits, shares=((0, 1), 1, 0), change=lambda error: error):
    names = ("tensor", "token", "channel")
    return {name: change(_errors(x, bits, share)) for name, share in zip(names, shares, strict=True)}


WRONG = {
    "16.1": [
        (lambda weight, group_size: len(weight.unique()), "each group has a scale of its own"),
        (lambda weight, group_size: len(weight.reshape(-1, group_size)[0].unique()), "the first group alone"),
        (lambda weight, group_size: group_size, "was expected"),
        (lambda weight, group_size: weight.reshape(-1, group_size).unique(), "A number was expected"),
        (lambda weight, group_size: min(len(g.unique()) for g in weight.reshape(-1, group_size)), "the fullest group"),
    ],
    "16.2": [
        (lambda x, bits: _shared(x, bits, ((0, 1), 0, 1)), "swapped"),
        (lambda x, bits: _shared(x, bits, change=lambda error: error**0.5), "you took its root"),
        (lambda x, bits: _shared(x, 8), "The bits are an argument"),
        (lambda x, bits: tuple(_shared(x, bits).values()), "A dict was expected"),
        (lambda x, bits: _shared(x, bits) | {"none": 0.0}, "Keys"),
    ],
}
