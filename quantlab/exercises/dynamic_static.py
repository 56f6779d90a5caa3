"""Exercises of chapter 8: dynamic or static?"""

import copy
from functools import cache

import torch

from quantlab.exercises.material import CHINESE, off_ties, uniform, whole
from quantlab.judging import Exercise, as_tensor, call, expect, shown
from quantlab.linear import StaticInt8Linear
from quantlab.lm import capture_inputs, chosen_model, divergence, linear_layers, load_lm, load_text, token_stream
from quantlab.observers import Percentile


def _weight(random, outputs: int, features: int):
    """Codes of a weight, and the scale of each row."""
    codes = torch.randint(-127, 128, (outputs, features), generator=random, dtype=torch.int8)
    return codes, torch.rand(outputs, generator=random) * 0.01 + 0.001


def static_solution(x, w_codes, w_scale, scale, zero_point):
    """Codes on the fixed grid, cut to 0..255; whole numbers multiplied and added; both scales at the end."""
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
    sums = (codes - zero_point) @ w_codes.to(codes.dtype).T
    return sums * scale * w_scale


def _static_cases(random):
    """Inside the grid, then beyond both ends; the second layer is square, so that rows and columns mix up."""
    for beyond, zero_point, (tokens, outputs, features) in (
        (0, 100, (5, 7, 12)),
        (300, 30, (8, 8, 8)),
        (90, 250, (4, 3, 6)),
    ):
        scale = uniform(random, 0.01, 0.5)
        codes = off_ties(random, tokens * features, -zero_point - beyond, 255 - zero_point + beyond)
        yield scale * codes.view(tokens, features), *_weight(random, outputs, features), scale, zero_point


def _static_edges():
    """A token of ordinary values, then one of zeros: it gives zeros, and exactly those."""
    weight = torch.tensor([[1, 2, 3], [-4, 5, 127]], dtype=torch.int8), torch.tensor([0.1, 0.2])
    yield torch.tensor([[0.5, -0.334, 0.108]]), *weight, 0.02, 100
    yield torch.zeros(2, 3), *weight, 0.02, 100


def _own_grid(x, w_codes, w_scale, scale, zero_point):
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    own = ((high - low) / 255).clamp(min=1e-30)
    return static_solution(x, w_codes, w_scale, own, torch.round(-low / own))


def dynamic_solution(x, w_codes, w_scale):
    """Each token's own largest |x| falls on code 127; the rest is the static layer with a scale a row."""
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    codes = torch.round(x / scale)
    return (codes @ w_codes.to(codes.dtype).T) * scale * w_scale


def _dynamic_cases(random):
    """Tokens of very different size; the largest value of one token is positive, of the next negative."""
    for tokens, outputs, features in ((5, 7, 12), (8, 8, 8), (2, 3, 40)):
        codes = off_ties(random, tokens * features, -90, 90).view(tokens, features)
        at = torch.randint(features, (tokens,), generator=random)
        codes[torch.arange(tokens), at] = 127.0 * (-1.0) ** torch.arange(tokens)
        sizes = 10 ** (4 * torch.rand(tokens, 1, generator=random) - 3)
        yield codes * sizes, *_weight(random, outputs, features)


def _dynamic_edges():
    """A token of zeros beside another."""
    codes = torch.tensor([[1, 2, 3], [-4, 5, 127]], dtype=torch.int8)
    yield torch.tensor([[12.7, -3.0, 0.52], [0.0, 0.0, 0.0]]), codes, torch.tensor([0.1, 0.2])


def bytes_solution(tokens, in_features, out_features, way):
    """Weights once; the input once, or twice where its range must be found first; codes out and in; the output."""
    inputs, outputs = 4 * tokens * in_features, 4 * tokens * out_features
    if way == "float":
        return 4 * in_features * out_features + inputs + outputs
    weights = in_features * out_features + 4 * out_features
    codes = 2 * tokens * in_features
    if way == "static":
        return weights + inputs + codes + 8 + outputs
    maps = 2 * (8 if way == "tensor" else 4 * tokens)
    return weights + 2 * inputs + codes + maps + outputs


def _bytes_cases(random):
    for way in ("float", "static", "tensor", "token"):
        tokens, features, outputs = torch.randint(2, 3000, (3,), generator=random).tolist()
        yield tokens, features, outputs, way


def _bytes_edges():
    for way in ("float", "static", "tensor", "token"):
        yield 3, 2000, 600, way


def alarm_solution(x, scale, zero_point, limit):
    """The ends of the grid with half a step of grace; then how much of the grid is in use."""
    low, high = -scale * zero_point, scale * (255 - zero_point)
    outside = (x < low - scale / 2) | (x > high + scale / 2)
    if outside.float().mean() > limit:
        return "narrow"
    used = max(x.max().item(), 0.0) - min(x.min().item(), 0.0)
    return "wide" if used < (high - low) / 2 else "fine"


def _alarm_cases(random):
    """Both ends, the grace of half a step, the limit and the half of the grid, each from both sides."""
    scale = 2.0 ** whole(random, -6, 2)
    zero_point = whole(random, 20, 100)
    low, high = -zero_point, 255 - zero_point
    inside = torch.rand(16, 64, generator=random) * 225 - zero_point + 10  # most of the grid

    def beside(count, *, at, fill=inside):
        changed = fill.clone()
        changed.view(-1)[torch.randperm(1024, generator=random)[:count]] = float(at)
        return scale * changed

    yield scale * inside, scale, zero_point, 0.0
    yield beside(9, at=low - 1.5), scale, zero_point, 1 / 128
    for end in (low - 0.7, high + 0.7):
        yield beside(3, at=end), scale, zero_point, 1 / 128  # fewer than the limit allows
        yield beside(9, at=end), scale, zero_point, 1 / 128  # one more than the limit allows
        yield beside(8, at=end), scale, zero_point, 1 / 128  # as many as the limit allows
        yield beside(1, at=end), scale, zero_point, 0.0
    for end in (low - 0.4, high + 0.4):
        yield beside(300, at=end), scale, zero_point, 0.01
    third = inside / 3
    yield beside(20, at=high + 3, fill=third), scale, zero_point, 0.01  # narrow comes first
    for span in (125.0, 130.0, 60.0, 20.0):
        yield scale * torch.cat([torch.tensor([-10.0, span - 10]), torch.zeros(60)]), scale, zero_point, 0.01
        yield scale * torch.linspace(span - 9, span, 62), scale, zero_point, 0.01  # the grid must hold 0, too
    for span in (126.8, 128.2):  # below 0 alone, and so near to half a grid that a real unit tells
        yield -scale * torch.linspace(span - 9, span, 62), scale, 220, 0.01


def calibration_solution(stories, chinese, count):
    """Half of what may be used from each kind of text that will come."""
    return torch.cat([stories[: count // 2], chinese[: count // 2]])


@cache
def _domains() -> tuple:
    """The model, text to calibrate on (stories, Chinese) and text to measure on."""
    model, tokenizer = load_lm()
    seen, unseen = (token_stream(tokenizer, [text] * 8) for text in CHINESE)
    calibration = token_stream(tokenizer, load_text("calibration"))
    return model, (calibration[:4096], seen), (token_stream(tokenizer, load_text("eval"))[:512], unseen[:512])


def _kl_after(tokens) -> tuple[float, float]:
    """KL of the static model calibrated on the tokens, on unseen stories and unseen Chinese."""
    model, _, measured = _domains()
    layers = linear_layers(model)
    inputs = capture_inputs(model, tokens, layers, window=128)
    new = copy.deepcopy(model)
    for name, layer in layers.items():
        observer = Percentile(percentile=99.99).update(inputs[name])
        new.set_submodule(name, StaticInt8Linear.from_linear(layer, observer))
    return tuple(divergence(model, new, text, window=128).kl for text in measured)


@cache
def _target(count: int) -> float:
    """Of the KL on either kind: known of the bundled model, on another one a quarter above the solution's worse one."""
    if chosen_model() == "bundled":
        return 0.016
    return 1.25 * max(_kl_after(calibration_solution(*_domains()[1], count)))


def _test_calibration(f):
    _, (stories, chinese), _ = _domains()
    for count in (200, 512):
        got = call(EXERCISES["8.5"], f, (stories, chinese, count))
        tokens = as_tensor(got)
        expect(
            tokens is not None and tokens.ndim == 1 and bool((tokens == tokens.round()).all()),
            f"Return one row of token ids, whole numbers; got {shown(got)}.",
        )
        expect(
            2 <= len(tokens) <= count,
            f"At most {count} tokens may be calibrated on (and 2 at least); you return {len(tokens)}.",
        )
    found = dict(zip(("stories", "Chinese"), _kl_after(tokens.long()), strict=True))
    target, worst = _target(count), max(found, key=found.get)
    told = ", ".join(f"{kind} {kl:.4f}" for kind, kl in found.items())
    expect(
        found[worst] <= target,
        f"KL on fresh text: {told}; the target is {target:.2g} on both, and {worst} misses it "
        f"{found[worst] / target:.1f} times over. What has the observer seen of such text?",
    )
    return f"KL on fresh text: {told}."


EXERCISES = {
    "8.1": Exercise(
        "a static layer",
        hints=(
            "Three steps: the codes of x on the given grid, the sums, the scales.",
            "codes = clamp(round(x / scale) + zero_point, 0, 255). Subtract zero_point again before the product.",
            "(codes − zero_point) @ w_codes.float().T, then times scale (one number) and w_scale (one a column).",
        ),
        solution=static_solution,
        cases=_static_cases,
        edges=_static_edges,
        slips={
            "Values outside the grid must be cut to the codes 0 … 255.": (
                "torch.clamp(torch.round(x / scale) + zero_point, 0, 255)", "torch.round(x / scale) + zero_point"
            ),
            "A code of 300 became 44: it was cast to uint8 before it was clamped.": (
                "torch.clamp(torch.round(x / scale) + zero_point, 0, 255)",
                "(torch.round(x / scale) + zero_point).long().to(torch.uint8).float()",
            ),
            "Clamp last, after zero_point was added: codes end at 0 and 255.": (
                "torch.clamp(torch.round(x / scale) + zero_point, 0, 255)",
                "torch.clamp(torch.round(x / scale), 0, 255) + zero_point",
            ),
            "The codes are 0 … 255, not −128 … 127.": ("0, 255)", "-128, 127)"),
            "zero_point must be subtracted from the codes again.": ("(codes - zero_point)", "codes"),
            "zero_point is added to make codes, and subtracted from them.": (
                "scale) + zero_point", "scale) - zero_point", "codes - zero_point", "codes + zero_point"
            ),
            "The rows of the weight have scales too: w_scale.": (" * scale * w_scale", " * scale"),
            "The sums are in steps of the input: multiply by its scale.": (" * scale * w_scale", " * w_scale"),
            "Those are the integer sums; two scales make real numbers of them.": (" * scale * w_scale", ""),
            "The input was not rounded at all: that is a weight-only layer.": (
                "(codes - zero_point) @", "(x / scale) @"
            ),
            "The input was cut but not rounded.": ("torch.round(x / scale)", "x / scale"),
            "That is a dynamic layer: the grid is given here, not read off x.": _own_grid,
            "Round to the nearest code; floor is not round.": ("torch.round", "torch.floor"),
            "Cutting off the decimals goes towards 0, not to the nearest code.": ("torch.round", "torch.trunc"),
            "Products and sums do not fit in 8 bits: widen the codes first.": (
                "(codes - zero_point) @ w_codes.to(codes.dtype).T",
                "((codes - zero_point).long().to(torch.int8) @ w_codes.T).float()",
            ),
            "Rows are tokens, columns are rows of the weight: yours is turned.": ("return sums * scale * w_scale",
                "return (sums * scale * w_scale).T"),
        },
    ),
    "8.2": Exercise(
        "a dynamic layer, per token",
        hints=(
            "The same three steps, but the scale comes from x: one for each row.",
            "x.abs().amax(1, keepdim=True) is (tokens, 1). Symmetric codes −127 … 127 need no zero point.",
            "scale = largest / 127 (kept above a tiny number), codes = round(x / scale), sums · scale · w_scale.",
        ),
        solution=dynamic_solution,
        cases=_dynamic_cases,
        edges=_dynamic_edges,
        slips={
            "A token of zeros has scale 0, and 0/0 is NaN: keep the scale above a tiny number.": (
                ".clamp(min=1e-30)", ""
            ),
            "Each token needs a scale of its own; yours is one for all.": (
                "x.abs().amax(1, keepdim=True)", "x.abs().max()"
            ),
            "Each token needs a scale of its own; yours is one a channel, and cannot leave the sum.": (
                "x.abs().amax(1, keepdim=True)", "x.abs().amax(0, keepdim=True)", ") * scale * w_scale",
                ") * scale.mean() * w_scale",
            ),
            "The value of largest size may be negative: take the largest |x|.": (
                "x.abs().amax(1, keepdim=True)", "x.amax(1, keepdim=True)"
            ),
            "The sums are in steps of each token: multiply by its scale, (tokens, 1).": (
                " * scale * w_scale", " * w_scale"
            ),
            "The rows of the weight have scales too: w_scale.": (" * scale * w_scale", " * scale"),
            "Those are the integer sums; two scales make real numbers of them.": (" * scale * w_scale", ""),
            "The largest |x| falls on code 127; 128 does not exist in 8 bits.": ("/ 127", "/ 128"),
            "The largest |x| was to fall on code 127; yours falls on 127.5 (255 steps, as in the library).": (
                "/ 127)", "/ 127.5)", "torch.round(x / scale)", "torch.round(x / scale).clamp(-128, 127)"
            ),
            "Codes of 8 bits with a sign end at 127; yours have 9 bits.": ("/ 127", "/ 255"),
            "All 8 bits may be used: codes go to 127.": ("/ 127", "/ 63"),
            "The input was not rounded to codes: that is a weight-only layer.": (
                "torch.round(x / scale)", "(x / scale)"
            ),
            "Round to the nearest code; floor is not round.": ("torch.round", "torch.floor"),
            "Cutting off the decimals goes towards 0, not to the nearest code.": ("torch.round", "torch.trunc"),
            "The codes have 4 bits: 8 were meant.": ("/ 127", "/ 7"),
        },
    ),
    "8.3": Exercise(
        "bytes moved",
        hints=(
            "Go down the table: one term a row. Count tensors first, bytes afterwards.",
            "M·K inputs of 4 bytes (twice if dynamic), M·K codes of 1 byte (written, read), M·N outputs of 4 bytes.",
            "static: K·N + 4·N + 4·M·K + 2·M·K + 8 + 4·M·N; dynamic adds 4·M·K and also writes its maps.",
        ),
        solution=bytes_solution,
        cases=_bytes_cases,
        edges=_bytes_edges,
        slips={
            "Dynamic reads the float input twice: once for its range.": ("2 * inputs", "inputs"),
            "Static need not look for the range: it reads the float input once.": (
                "weights + inputs + codes + 8", "weights + 2 * inputs + codes + 8"
            ),
            "The weight has a scale for each row, 4 bytes each.": (" + 4 * out_features\n", "\n"),
            "The codes of the input are written by one pass and read by the next.": (
                "2 * tokens * in_features", "tokens * in_features"
            ),
            "The codes of the input have one byte each, and are moved twice.": (
                "codes = 2 * tokens * in_features", "codes = 8 * tokens * in_features"
            ),
            "The codes of the input are missing: written, and read again.": (
                "codes = 2 * tokens * in_features", "codes = 0"
            ),
            "The map of the input is missing: a scale and a zero point, 8 bytes.": ("codes + 8 +", "codes +"),
            "Dynamic writes its map and reads it again: twice 8 bytes.": ("maps = 2 * (8", "maps = (8",
                "else 4 * tokens", "else 8 * tokens"),
            "Per token, each token's scale is written once and read once.": ("else 4 * tokens", "else 2 * tokens"),
            "The maps of the dynamic ways are missing: written, and read again.": ("codes + maps +", "codes +"),
            "Per token the map is symmetric: a scale, no zero point.": ("else 4 * tokens", "else 8 * tokens"),
            "The map of a static layer is only read: 8 bytes.": ("codes + 8 +", "codes + 16 +"),
            "int8 weights take one byte each.": ("weights = in_features", "weights = 4 * in_features"),
            "float weights take four bytes each.": (
                "return 4 * in_features * out_features", "return in_features * out_features"
            ),
            "The outputs are floats, 4 bytes each, (tokens, out).": (
                "4 * tokens * out_features", "tokens * out_features"
            ),
            "The outputs are written: they count, too.": ("4 * tokens * out_features", "0"),
            "The ways differ: float reads no codes, dynamic reads its input twice.": (
                'way == "float"', "False", 'way == "static"', "True"
            ),
            "Inputs are (tokens, in), outputs (tokens, out), and one scale stands for each of the out rows.": (
                "inputs, outputs = 4 * tokens * in_features, 4 * tokens * out_features",
                "in_features, out_features = out_features, in_features\n"
                "    inputs, outputs = 4 * tokens * in_features, 4 * tokens * out_features",
            ),
        },
    ),
    "8.4": Exercise(
        "the alarm",
        hints=(
            "Where does the grid end? Code 0 and code 255, turned back into real numbers.",
            "A value is cut if it lies more than half a step beyond an end; (condition).float().mean() is a share.",
            "First the share against limit, then the width in use, from min(x.min(), 0) to max(x.max(), 0), against "
            "half of the grid's.",
        ),
        solution=alarm_solution,
        cases=_alarm_cases,
        slips={
            "One value outside is enough for you; more than `limit` of them were to ring.": (
                "outside.float().mean() > limit", "outside.any()"
            ),
            "*More* than limit: exactly the limit is allowed.": ("mean() > limit", "mean() >= limit"),
            "Look at both ends: the grid has a lowest value as well.": ("(x < low - scale / 2) | ", ""),
            "Look at both ends: the grid has a highest value as well.": (" | (x > high + scale / 2)", ""),
            "Values beyond the last code by less than half a step are rounded back onto it.": (
                "low - scale / 2", "low", "high + scale / 2", "high"
            ),
            "Half a *step*, scale / 2: not half of a real unit.": ("scale / 2", "0.5"),
            "Half a step of grace, not a whole one.": ("scale / 2", "scale"),
            "The grid must hold 0 as well: it belongs to the values' span.": (
                "max(x.max().item(), 0.0) - min(x.min().item(), 0.0)", "x.max().item() - x.min().item()"
            ),
            "The span reaches from the smallest to the largest value, with 0: not from 0 to the largest |x|.": (
                "max(x.max().item(), 0.0) - min(x.min().item(), 0.0)", "x.abs().max().item()"
            ),
            "Which question comes first? Values that are cut off ring, however small the others are.": (
                "if outside.float().mean() > limit:",
                "if max(x.quantile(0.95).item(), 0) - min(x.quantile(0.05).item(), 0) < (high - low) / 2:\n"
                '        return "wide"\n    if outside.float().mean() > limit:',
            ),
            "Half of the grid's width is (high − low) / 2; (high + low) / 2 is its middle.": (
                "(high - low) / 2", "(high + low) / 2"
            ),
            "Less than *half* of the grid; yours is a third.": ("(high - low) / 2", "(high - low) / 3"),
            "The grid does not lie around 0: use zero_point.": (
                "low, high = -scale", "zero_point = 128\n    low, high = -scale"
            ),
            "The grid ends at code 255: scale · (255 − zero_point).": ("(255 - zero_point)", "255"),
            "It never rings for a wide grid: look at the span of the values.": (
                '"wide" if used < (high - low) / 2 else "fine"', '"fine"'
            ),
            "It never rings.": lambda x, scale, zero_point, limit: "fine",
        },
    ),
    "8.5": Exercise(
        "calibrate for two kinds of text",
        test=_test_calibration,
        hints=(
            "An observer knows what it has seen. What will the layer read?",
            "Both kinds of text must be among the tokens, and neither may be a handful.",
            "torch.cat of the first so many tokens of each, together at most count.",
        ),
        solution=calibration_solution,
        seconds=60.0,
    ),
}  # fmt: skip
