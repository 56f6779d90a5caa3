"""Room 4: measuring. Bytes, perplexities, seconds."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from quantlab.hunt.case import Room, bug, fine
from quantlab.packing import pack


@bug("E1", chapter="03", title="Bytes of a matrix")
class EightTimesSmaller:
    """Bytes of a rows × columns matrix of `bits`-bit codes, packed, with one float32 scale for each row. (columns
    is a multiple of 8.)"""

    def program(rows, columns, bits):
        float32 = 4 * rows * columns
        return float32 // bits + 4 * rows

    def mended(rows, columns, bits):
        return rows * columns * bits // 8 + 4 * rows

    def mended_again(rows, columns, bits):
        packed = pack(torch.zeros(rows, columns, dtype=torch.int32), bits=bits)
        return packed.nbytes + torch.ones(rows).nbytes

    def demo(program):
        for bits in (8, 4):
            print(f"{bits} bits: {4 * 4096 * 4096 / program(4096, 4096, bits):.2f} times smaller than float32")

    def test(program):
        assert program(2, 16, 8) == 2 * 16 + 2 * 4

    hint = "How many bytes does one 8-bit code take?"
    story = (
        "Eight bits are one byte, a quarter of float32's four: 4 times smaller, a little less with the scales. "
        "Eight times is 4-bit; and what is not quantized (embeddings, norms) stays as large as it was."
    )


@fine(chapter="06", title="Two texts together")
class GeometricMean:
    """The perplexity on two texts read as one, from their perplexities and numbers of tokens."""

    def program(perplexity_a, tokens_a, perplexity_b, tokens_b):
        total = tokens_a * math.log(perplexity_a) + tokens_b * math.log(perplexity_b)
        return math.exp(total / (tokens_a + tokens_b))

    def tempting(perplexity_a, tokens_a, perplexity_b, tokens_b):
        return (perplexity_a * tokens_a + perplexity_b * tokens_b) / (tokens_a + tokens_b)

    def demo(program):
        print(f"perplexities 2 and 50 on 100 tokens each: together {program(2, 100, 50, 100):.1f}")

    def test(program):
        nll_a, nll_b = torch.tensor([0.5, 1.0]), torch.tensor([3.0, 4.0, 2.0, 5.0])
        a, b = nll_a.mean().exp().item(), nll_b.mean().exp().item()
        together = torch.cat([nll_a, nll_b]).mean().exp().item()
        assert abs(program(a, 2, b, 4) / together - 1) < 1e-5

    hint = "Start from losses of single tokens, a handful for each text, and compute it from all of them."
    story = (
        "Perplexity is the exponential of a mean loss. Losses are averaged, not perplexities, so two texts "
        "combine to a geometric mean: 10, not 26."
    )


@bug("E25", chapter="03", title="A layer in four bits")
class FakeQuantIsSmaller:
    """(layer, nbytes): a copy of an nn.Linear (without bias) with its weight rounded to 4 bits, one scale for each
    row; and the bytes that the tensors of this copy occupy, as they are."""

    def program(layer):
        copy = nn.Linear(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
        with torch.no_grad():
            copy.weight.copy_(scale * torch.round(layer.weight / scale))
        return copy, copy.weight.numel() * 4 // 8

    def mended(layer):
        copy = nn.Linear(layer.in_features, layer.out_features, bias=False)
        scale = layer.weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 7
        with torch.no_grad():
            copy.weight.copy_(scale * torch.round(layer.weight / scale))
        return copy, copy.weight.numel() * copy.weight.element_size()

    def mended_again(layer):
        weight = layer.weight.detach()
        scale = weight.abs().max(1, keepdim=True).values.clamp(min=1e-30) / 7
        copy = nn.Linear(layer.in_features, layer.out_features, bias=False)
        copy.load_state_dict({"weight": (weight / scale).round().clamp(-7, 7) * scale})
        return copy, sum(tensor.nbytes for tensor in copy.state_dict().values())

    def demo(program):
        layer = nn.Linear(256, 256, bias=False)
        copy, nbytes = program(layer)
        print(f"{len(copy.weight[0].unique())} different weights in a row; {layer.weight.nbytes:,} bytes before,"
              f" {nbytes:,} now")  # fmt: skip

    def test(program):
        copy, nbytes = program(nn.Linear(8, 4, bias=False))
        assert nbytes == sum(tensor.nbytes for tensor in copy.state_dict().values())

    hint = "Of what type is the new weight?"
    story = (
        "Rounded is not stored: the copy still holds float32 numbers, only fewer different ones. The bytes come "
        "down when codes are packed and the layer computes from them; count what is there, not what could be."
    )


@bug("E26", chapter="06", title="Perplexity")
class OwnWriting:
    """The perplexity of a model on `tokens`: model(tokens) gives a row of logits for each, and row i is its guess
    at token i + 1."""

    def program(model, tokens):
        logits = model(tokens)[:-1]
        written = logits.argmax(-1)  # what the model says comes next
        return F.cross_entropy(logits, written).exp().item()

    def mended(model, tokens):
        logits = model(tokens)[:-1]
        return F.cross_entropy(logits, tokens[1:]).exp().item()

    def mended_again(model, tokens):
        log_p = model(tokens).double().log_softmax(-1)
        losses = [-log_p[i, token].item() for i, token in enumerate(tokens[1:].tolist())]
        return math.exp(sum(losses) / len(losses))

    def demo(program):
        table = torch.eye(50).roll(1, 1) * 8  # after token i comes token i + 1
        print(f"50 tokens to choose from, perplexity {program(lambda tokens: table[tokens], torch.arange(50)):.2f}")

    def test(program):
        sure_and_wrong = torch.eye(10) * 20  # says that each token repeats itself
        assert program(lambda tokens: sure_and_wrong[tokens], torch.arange(10)) > 1000

    hint = "What should the perplexity of a model be that is sure, and always wrong?"
    story = (
        "It scores the model on its own continuation, on which any sure model shines; a broken one that repeats "
        "itself gets nearly 1. One fixed text that nobody chose for it, one tokenizer, one window, for all "
        "models."
    )


@bug("E27", chapter="02", title="The best clipping point")
class ChosenOnTest:
    """(clip, error): of 0.1, 0.2 … 1.0 times max|calibration|, the clip with the least mean squared error on the
    calibration data (codes -7..7); and the mean squared error that it has on the test data."""

    def program(calibration, test):
        found = []
        for clip in calibration.abs().max() * torch.arange(1, 11) / 10:
            step = clip / 7
            rounded = step * torch.round(test / step).clamp(-7, 7)
            found.append(((rounded - test).square().mean().item(), clip.item()))
        error, clip = min(found)
        return clip, error

    def mended(calibration, test):
        def error(clip, x):
            step = clip / 7
            return (step * torch.round(x / step).clamp(-7, 7) - x).square().mean().item()

        clips = (calibration.abs().max() * torch.arange(1, 11) / 10).tolist()
        best = min(clips, key=lambda clip: error(clip, calibration))
        return best, error(best, test)

    def mended_again(calibration, test):
        steps = calibration.abs().max() * torch.arange(1, 11)[:, None] / 70
        losses = [
            (steps * (x / steps).round().clamp(-7, 7) - x).pow(2).mean(1)
            for x in (calibration.flatten(), test.flatten())
        ]
        i = losses[0].argmin()
        return 7 * steps[i].item(), losses[1][i].item()

    def demo(program):
        random = torch.Generator().manual_seed(0)
        calibration, test = torch.randn(2000, generator=random), torch.randn(2000, generator=random)
        clip, error = program(calibration, test)
        print(f"clip at {clip:.2f}, largest calibration value {calibration.abs().max():.2f}, error {error:.4f}")

    def test(program):
        calibration = torch.linspace(-1, 1, 101)
        quiet, loud = (program(calibration, calibration * factor)[0] for factor in (0.2, 3.0))
        assert quiet == loud

    hint = "What must stay the same when only the test data change?"
    story = (
        "The clip is chosen on the test data, so the error that it reports is one that it was fitted to. "
        "Calibrate on one text, test once on another; a choice must not move when only the test data do."
    )


@fine(chapter="06", title="A very small error bar")
class PairedError:
    """The standard error of the difference between two models' mean losses on the same tokens (one loss a token
    each), from the spread of the differences."""

    def program(losses_a, losses_b):
        return ((losses_a - losses_b).std() / len(losses_a) ** 0.5).item()

    def tempting(losses_a, losses_b):
        return (losses_a.var() / len(losses_a) + losses_b.var() / len(losses_b)).sqrt().item()

    def demo(program):
        random = torch.Generator().manual_seed(0)
        a = torch.rand(1000, generator=random) * 8
        b = a + 0.1 * torch.randn(1000, generator=random)
        print(f"error of each mean {a.std() / 1000**0.5:.4f}, of their difference {program(a, b):.4f}")

    def test(program):
        a, b = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.5, 2.0, 3.5, 4.0])
        hard = torch.tensor([0.0, 50.0, 0.0, 90.0])  # a text with some hard tokens, for both
        assert abs(program(a, b) - 0.5 / 12**0.5) < 1e-6
        assert abs(program(a + hard, b + hard) - program(a, b)) < 1e-4

    hint = "Make some tokens much harder, for both models alike. Are you less sure which model is better?"
    story = (
        "Hard tokens are hard for both models, so their losses go up and down together and the difference hardly "
        "does. Adding the two variances would forget that, and hide a difference that is there."
    )


@bug("E24", chapter="12", title="Stars for memory")
class StarTable:
    """Which of "W4A16" and "W8A8" takes fewer bytes: weights in 4 or 8 bits plus activations in 16 or 8 bits."""

    def program(weights, activations):
        stars = {"W4A16": 2, "W8A8": 3}  # weights alone; weights and activations
        return max(stars, key=stars.get)

    def mended(weights, activations):
        nbytes = {"W4A16": weights / 2 + 2 * activations, "W8A8": weights + activations}
        return min(nbytes, key=nbytes.get)

    def mended_again(weights, activations):
        return "W4A16" if activations <= weights / 2 else "W8A8"

    def demo(program):
        print("a long text, 1e9 weights and 4e9 activations:", program(10**9, 4 * 10**9))

    def test(program):
        assert program(10**9, 10**6) == "W4A16"

    hint = "Count the bytes for a large model that reads one short text."
    story = (
        "Which is smaller depends on how many weights and activations there are: 4-bit weights are half of 8-bit "
        "ones, and with a short text the weights are nearly everything. Stars hide the batch and the length."
    )


@bug("E22", chapter="07", title="How many times faster")
class BytesAreTime:
    """How many times faster a layer runs over `tokens` tokens with weights in 4 bits instead of 16, computing in
    float16 all the same. Either way it takes the longer of two times: bytes moved (weights, and 2 bytes for
    each activation in and out) / bandwidth, and 2 · tokens · inputs · outputs / peak."""

    def program(tokens, inputs, outputs, bandwidth, peak):
        activations = 2 * tokens * (inputs + outputs)
        slow = (2 * inputs * outputs + activations) / bandwidth
        fast = (inputs * outputs / 2 + activations) / bandwidth
        return slow / fast

    def mended(tokens, inputs, outputs, bandwidth, peak):
        activations = 2 * tokens * (inputs + outputs)
        computing = 2 * tokens * inputs * outputs / peak
        slow = max((2 * inputs * outputs + activations) / bandwidth, computing)
        fast = max((inputs * outputs / 2 + activations) / bandwidth, computing)
        return slow / fast

    def mended_again(tokens, inputs, outputs, bandwidth, peak):
        def seconds(bits):
            moved = bits * inputs * outputs + 16 * tokens * inputs + 16 * tokens * outputs
            return sorted([moved / 8 / bandwidth, 2.0 * inputs * outputs * tokens / peak])[-1]

        return seconds(16) / seconds(4)

    def demo(program):
        print(f"one token, 4096 inputs and outputs: {program(1, 4096, 4096, 1e11, 1e13):.2f} times faster")

    def test(program):
        assert abs(program(4096, 4096, 4096, 1e11, 1e13) - 1) < 1e-6

    hint = "Which of the arguments is never used?"
    story = (
        "Fewer bytes help while the layer waits for memory: one token, decoding. With many tokens it waits for "
        "arithmetic, which is the same float16 as before, and the gain is gone (unpacking can even cost). "
        '"Faster" needs a shape and a kernel.'
    )


ROOM = Room(
    "measuring",
    "Measuring",
    (EightTimesSmaller, GeometricMean, FakeQuantIsSmaller, OwnWriting, ChosenOnTest, PairedError, StarTable,
     BytesAreTime),
)  # fmt: skip
