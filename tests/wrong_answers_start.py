"""Answers that learners really give, and a piece of what the check must say of it: {exercise: [(answer, message)]}."""

from torch import nn

from quantlab.lm import linear_layers


def table(model):
    return model.get_input_embeddings().weight


def everything(model):
    return sum(p.numel() for p in model.parameters())


def every_linear(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def sizes(layers, biases=False):
    return [p.numel() for m in layers for p in (m.parameters() if biases else [m.weight])]


def stored(model, *words):
    return sum(t.numel() for n, t in model.state_dict().items() if not words or any(w in n for w in words))


WRONG = {
    "0.1": [
        (lambda parameters, bits: parameters * bits, "How many bits are in a byte"),
        (lambda parameters, bits: parameters * bits / 8, "whole bytes"),
        (lambda parameters, bits: parameters * bits // 8, "round up"),
        (lambda parameters, bits: round(parameters * bits / 8), "not to the nearest"),
        (lambda parameters, bits: parameters * bits // 8 + 1, "no other is needed"),
        (lambda parameters, bits: parameters * 4, "those of 32 bits"),
        (lambda parameters, bits: parameters * (bits // 8), "not 0 bytes"),
        (lambda parameters, bits: parameters * -(-bits // 8), "share bytes"),
        (lambda parameters, bits: parameters * bits // 8 + parameters * bits % 2, "was expected"),
        (lambda parameters, bits: int(parameters * bits / 8 + 0.5), "was expected"),
    ],
    "0.2": [
        (lambda model: len(linear_layers(model)), "number of linear layers"),
        (everything, "every parameter"),
        (lambda model: sum(sizes(every_linear(model))), "lm_head"),
        (lambda model: sum(sizes(every_linear(model), biases=True)), "lm_head"),
        (lambda model: sum(sizes(linear_layers(model).values(), biases=True)), "biases"),
        (lambda model: sum(sum(m.weight.shape) for m in linear_layers(model).values()), "rows times columns"),
        (lambda model: sizes(linear_layers(model).values()), "Return one number"),
        (lambda model: 3_145_728, "was expected"),
        (lambda model: sum(sizes(linear_layers(model).values())[:6]), "was expected"),
        (lambda model: 4 * sum(sizes(linear_layers(model).values())), "bytes in float32"),
        (lambda model: sum(sizes(m for n, m in linear_layers(model).items() if ".0." in n)), "Every block counts"),
    ],
    "0.3": [
        (lambda model: 100 * table(model).numel() / everything(model), "percent"),
        (lambda model: everything(model) / table(model).numel(), "upside down"),
        (lambda model: table(model).numel() / stored(model), "count it twice"),
        (lambda model: stored(model, "embed", "head") / stored(model), "count it twice"),
        (lambda model: table(model).numel() / (everything(model) - table(model).numel()), "the other"),
        (lambda model: table(model).shape[0] / everything(model), "counted the rows"),
        (lambda model: table(model).numel() / stored(model, "layers"), "was expected"),
        (lambda model: table(model).numel() / sum(sizes(linear_layers(model).values())), "linear layers alone"),
        (
            lambda model: (
                sum(p.numel() for n, p in model.named_parameters() if "embed" in n or "head" in n) / everything(model)
            ),
            "a head of its own",
        ),
        (lambda model: 0.143, "was expected"),
    ],
}
