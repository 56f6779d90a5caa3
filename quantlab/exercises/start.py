"""Exercises of chapter 0: start here."""

from types import SimpleNamespace

from torch import nn

from quantlab.checks import Exercise, expect
from quantlab.lm import linear_layers


def bytes_solution(parameters, bits):
    """Bits over eight, rounded up: a file has whole bytes, and the last one may be part empty."""
    return -(-parameters * bits // 8)


def _test_bytes(f):
    size = f(1000, 32)
    expect(size != 32_000, "1,000 weights of 32 bits are 32,000 bits. How many bits are in a byte?")
    expect(size == 4000, f"1,000 weights of 32 bits take 4,000 bytes; got {size}.")
    for bits, right in ((16, 2000), (8, 1000), (4, 500), (3, 375)):
        size = f(1000, bits)
        expect(
            size == right,
            f"The bits must count: at {bits} bits 1,000 weights take {right:,} bytes; got {size}. "
            "Packed weights share bytes, so no weight is rounded by itself.",
        )
    for parameters, bits, right in ((3, 4, 2), (5, 4, 3), (5, 3, 2)):
        size, all_bits = f(parameters, bits), parameters * bits
        expect(
            float(size).is_integer(),
            f"A file has whole bytes; for {parameters} weights of {bits} bits you gave {size}.",
        )
        expect(
            size == right,
            f"{parameters} weights of {bits} bits are {all_bits} bits and need {right} bytes; got {size}. "
            "The last byte may be part empty: round up.",
        )


def linear_solution(model):
    """The linear layers of the blocks, their weights without the biases."""
    return sum(layer.weight.numel() for layer in linear_layers(model).values())


def _test_linear(f):
    for blocks in (2, 3):
        model = _toy(blocks)
        count, right = f(model), blocks * (16 + 48 + 48)
        everything, head = sum(p.numel() for p in model.parameters()), model.lm_head.weight.numel()
        expect(isinstance(count, int), f"Return one whole number, an int; got {count!r}.")
        expect(count != 3 * blocks, f"{count} is the number of linear layers. How many weights does each of them hold?")
        expect(
            count != everything,
            "That is every parameter of the model. The embedding and the norms are no linear layers.",
        )
        expect(
            count not in (right + head, right + head + 4 * blocks),
            "The head at the end (lm_head) is counted too. It is in no block, nor in linear_layers.",
        )
        expect(count != right + 4 * blocks, "The biases are counted too. A layer's weights are layer.weight.")
        expect(
            count == right,
            f"A made-up model of {blocks} blocks has {right} weights in its linear layers; "
            f"you count {count}, {count / right:.2f} times as many. "
            "Every layer of every block, rows times columns?",
        )
    return "For the real model, compare with the attention row plus the MLP row of the table."


def share_solution(model):
    """The embedding's parameters over all, each counted once: parameters() gives shared ones once."""
    return model.get_input_embeddings().weight.numel() / sum(p.numel() for p in model.parameters())


def _test_share(f):
    for tied in (True, False):
        model = _toy(2, tied=tied)
        table, total = model.get_input_embeddings().weight.numel(), sum(p.numel() for p in model.parameters())
        share, rows = f(model), len(model.get_input_embeddings().weight)

        def is_not(other, message, share=share):
            expect(abs(share - other) > 1e-6, message)

        expect(0 <= share <= 1, f"A share lies between 0 and 1; got {share:.4g}. Is it in percent, or upside down?")
        if tied:
            twice = (
                "One matrix is embedding and head at once here, stored once, and you count it twice. "
                "model.parameters() gives it once, model.state_dict() twice."
            )
            is_not(table / (total + table), twice)
            is_not(2 * table / (total + table), twice)
            is_not(table / (total - table), "You divided by the other parameters. The whole has the embedding in it.")
            is_not(rows / total, "You counted the rows of the embedding, one a token. Each row holds several numbers.")
        else:
            is_not(
                2 * table / total,
                "This made-up model has a head of its own, another matrix than the embedding: "
                "it belongs to the whole, not to the part.",
            )
        expect(
            abs(share - table / total) < 1e-6,
            f"In a made-up model {table} of {total} parameters are in the embedding, a share of "
            f"{table / total:.4f}; got {share:.4f}.",
        )


class _Toy(nn.Module):
    """As small as a model can be that has an embedding, blocks with linear layers, norms and a head."""

    def __init__(self, blocks: int, tied: bool):
        super().__init__()
        self.config = SimpleNamespace(num_hidden_layers=blocks, tie_word_embeddings=tied)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(10, 4)
        self.model.layers = nn.ModuleList([_block() for _ in range(blocks)])
        self.model.norm = nn.RMSNorm(4)
        self.lm_head = nn.Linear(4, 10, bias=False)
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self):
        return self.model.embed_tokens


def _block() -> nn.Module:
    block = nn.Module()
    block.self_attn, block.mlp, block.input_layernorm = nn.Module(), nn.Module(), nn.RMSNorm(4)
    block.self_attn.o_proj = nn.Linear(4, 4)  # the one with a bias
    block.mlp.up_proj, block.mlp.down_proj = nn.Linear(4, 12, bias=False), nn.Linear(12, 4, bias=False)
    return block


def _toy(blocks: int, *, tied: bool = True) -> nn.Module:
    return _Toy(blocks, tied)


EXERCISES = {
    "0.1": Exercise(
        "bytes of a model",
        _test_bytes,
        (
            "How many bits are they all together? And how many bits has a byte?",
            "3 weights of 4 bits are 12 bits, or one byte and a half. Which whole number of bytes holds them?",
            "math.ceil(a / b) rounds up; so does -(-a // b), without leaving the integers.",
        ),
        bytes_solution,
    ),
    "0.2": Exercise(
        "weights in the linear layers",
        _test_linear,
        (
            "linear_layers(model) gives a dict of them: go over its values.",
            "layer.weight is a matrix; .numel() says how many numbers it holds.",
            "sum(... for layer in linear_layers(model).values())",
        ),
        linear_solution,
    ),
    "0.3": Exercise(
        "share of the embedding",
        _test_share,
        (
            "A share is a part over the whole, a number between 0 and 1.",
            "model.get_input_embeddings() is the embedding, and .weight its table.",
            "The whole is sum(p.numel() for p in model.parameters()).",
        ),
        share_solution,
    ),
}
