"""Exercises of chapter 0: start here."""

from types import SimpleNamespace

import torch
from torch import nn

from quantlab.judging import Exercise
from quantlab.lm import linear_layers


def bytes_solution(parameters, bits):
    """Bits over eight, rounded up: a file has whole bytes, and the last one may be part empty."""
    return -(-parameters * bits // 8)


def _bytes_cases(random):
    for bits in (1, 2, 3, 4, 5, 6, 7, 8, 16, 32):
        for most in (30, 1_000_000):
            yield int(torch.randint(1, most, (1,), generator=random)), bits


def _bytes_edges():
    for bits in (32, 16, 8, 4, 3):
        yield 1000, bits
    yield from ((3, 4), (5, 4), (5, 3), (3, 3), (1, 1), (9, 1), (7_000_000_000, 4))


def linear_solution(model):
    """The linear layers of the blocks, their weights without the biases."""
    return sum(layer.weight.numel() for layer in linear_layers(model).values())


def _models(random):
    for tied in (True, False):
        blocks, width, inner, words = (int(torch.randint(2, most, (1,), generator=random)) for most in (5, 9, 20, 30))
        yield (MadeUpModel(blocks, tied=tied, width=width, inner=inner + width, words=words),)


def _first_models():
    yield (MadeUpModel(2, tied=True),)
    yield (MadeUpModel(3, tied=False),)


def share_solution(model):
    """The embedding's parameters over all, each counted once: parameters() gives shared ones once."""
    return model.get_input_embeddings().weight.numel() / sum(p.numel() for p in model.parameters())


class MadeUpModel(nn.Module):
    """As small as a model can be that has an embedding, blocks with linear layers, norms and a head."""

    def __init__(self, blocks: int, *, tied: bool, width: int = 4, inner: int = 12, words: int = 10):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=blocks, tie_word_embeddings=tied)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(words, width)
        self.model.layers = nn.ModuleList([_block(width, inner) for _ in range(blocks)])
        self.model.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, words, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self):
        return self.model.embed_tokens


def _block(width: int, inner: int) -> nn.Module:
    block = nn.Module()
    block.self_attn, block.mlp, block.input_layernorm = nn.Module(), nn.Module(), nn.RMSNorm(width)
    block.self_attn.o_proj = nn.Linear(width, width)  # the one with a bias
    block.mlp.up_proj = nn.Linear(width, inner, bias=False)
    block.mlp.down_proj = nn.Linear(inner, width, bias=False)
    return block


def _all(model) -> int:
    return sum(p.numel() for p in model.parameters())


def _every_linear(model) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def _of_words(model, *words) -> int:
    """Parameters whose name in the file holds one of the words; a shared one as often as it has a name."""
    return sum(t.numel() for name, t in model.state_dict().items() if any(word in name for word in words))


_HEAD = "The head at the end (lm_head) is counted too. It is in no block, nor in linear_layers."
_TWICE = (
    "One matrix is embedding and head at once here, stored once, and you count it twice. model.parameters() gives it "
    "once, model.state_dict() twice."
)
_OWN_HEAD = "This model has a head of its own, another matrix than the embedding. It is not part of the embedding."

EXERCISES = {
    "0.1": Exercise(
        "bytes of a model",
        hints=(
            "How many bits are they all together? And how many bits has a byte?",
            "3 weights of 4 bits are 12 bits, or one byte and a half. Which whole number of bytes holds them?",
            "math.ceil(a / b) rounds up; so does -(-a // b), without leaving the integers.",
        ),
        solution=bytes_solution,
        cases=_bytes_cases,
        edges=_bytes_edges,
        slips={
            "How many bits are in a byte?": ("-(-parameters * bits // 8)", "parameters * bits"),
            "A byte has 8 bits: divide by 8.": ("// 8)", "* 8)"),
            "A file has whole bytes: round up.": ("-(-parameters * bits // 8)", "parameters * bits / 8"),
            "The last byte may be part empty: round up, not down.": (
                "-(-parameters * bits // 8)", "parameters * bits // 8"
            ),
            "The last byte may be part empty: round up, not to the nearest.": (
                "-(-parameters * bits // 8)", "round(parameters * bits / 8)"
            ),
            "Where the last byte is full, no other is needed.": (
                "-(-parameters * bits // 8)", "parameters * bits // 8 + 1"
            ),
            "The bits must count: 4 bytes are those of 32 bits.": ("-(-parameters * bits // 8)", "4 * parameters"),
            "The bits must count, below a byte as well: 4 bits are not 0 bytes.": (
                "-(-parameters * bits // 8)", "parameters * (bits // 8)"
            ),
            "Packed weights share bytes: round up once, for all of them, not each by itself.": (
                "-(-parameters * bits // 8)", "parameters * -(-bits // 8)"
            ),
        },
    ),
    "0.2": Exercise(
        "weights in the linear layers",
        hints=(
            "linear_layers(model) gives a dict of them: go over its values.",
            "layer.weight is a matrix; .numel() says how many numbers it holds.",
            "sum(... for layer in linear_layers(model).values())",
        ),
        solution=linear_solution,
        cases=_models,
        edges=_first_models,
        slips={
            "That is the number of linear layers. How many weights does each of them hold?": lambda model: len(
                linear_layers(model)
            ),
            "That is every parameter of the model. The embedding and the norms are no linear layers.": _all,
            _HEAD: lambda model: sum(m.weight.numel() for m in _every_linear(model)),
            f"{_HEAD} And the biases are.": lambda model: sum(
                p.numel() for m in _every_linear(model) for p in m.parameters()
            ),
            "The biases are counted too. A layer's weights are layer.weight.": lambda model: sum(
                p.numel() for m in linear_layers(model).values() for p in m.parameters()
            ),
            "A matrix holds rows times columns numbers, not rows plus columns.": lambda model: sum(
                sum(m.weight.shape) for m in linear_layers(model).values()
            ),
            "Return one number: the sum over the layers.": (
                "sum(layer.weight.numel() for layer in linear_layers(model).values())",
                "[layer.weight.numel() for layer in linear_layers(model).values()]",
            ),
            "Every block counts, not the first alone.": (
                "linear_layers(model).values()",
                "[layer for name, layer in linear_layers(model).items() if '.0.' in name]",
            ),
            "That is the number of bytes in float32: weights were asked for.": ("sum(", "4 * sum("),
        },
    ),
    "0.3": Exercise(
        "share of the embedding",
        hints=(
            "A share is a part over the whole, a number between 0 and 1.",
            "model.get_input_embeddings() is the embedding, and .weight its table.",
            "The whole is sum(p.numel() for p in model.parameters()).",
        ),
        solution=share_solution,
        cases=_models,
        edges=_first_models,
        slips={
            "A share lies between 0 and 1: this is in percent.": ("return ", "return 100 * "),
            "A share lies between 0 and 1: the part over the whole; this is upside down.": lambda model: (
                1 / share_solution(model)
            ),
            _TWICE: lambda model: _of_words(model, "embed") / _of_words(model, ""),
            f"{_TWICE} Do not count it as the part twice, either.": lambda model: (
                _of_words(model, "embed", "head") / _of_words(model, "")
            ),
            "You divided by the other parameters. The whole has the embedding in it.": lambda model: (
                _of_words(model, "embed") / (_all(model) - _of_words(model, "embed"))
            ),
            "You counted the rows of the embedding, one a token. Each row holds several numbers.": (
                "weight.numel()", "weight.shape[0]"
            ),
            _OWN_HEAD: lambda model: (
                sum(p.numel() for n, p in model.named_parameters() if "embed" in n or "head" in n) / _all(model)
            ),
            "You divided by the linear layers alone. The whole is every parameter, each once.": lambda model: (
                _of_words(model, "embed") / linear_solution(model)
            ),
        },
    ),
}  # fmt: skip
