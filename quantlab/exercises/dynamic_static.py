"""Exercises of chapter 8: dynamic or static?"""

import copy
from functools import cache

import torch

from quantlab.affine import choose_qparams, quantize
from quantlab.checks import Exercise, expect
from quantlab.exercises.material import CHINESE
from quantlab.linear import StaticInt8Linear
from quantlab.lm import capture_inputs, chosen_model, divergence, linear_layers, load_lm, load_text, token_stream
from quantlab.observers import Percentile


def _layer(seed: int = 0):
    """Codes and scales of a weight (7, 12), and an input of 5 tokens that a grid of scale 0.02 from 100 holds."""
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (7, 12), generator=random, dtype=torch.int8)
    scale = torch.rand(7, generator=random) * 0.01 + 0.001
    return codes, scale, torch.rand(5, 12, generator=random) * 4 - 1.5


def _output(y, wanted: torch.Tensor) -> torch.Tensor:
    expect(torch.is_tensor(y), f"Return a tensor, the layer's output; got {type(y).__name__}.")
    expect(
        y.shape == wanted.shape,
        f"The output has a row for each token and a column for each row of the weight, {tuple(wanted.shape)}; got "
        f"{tuple(y.shape)}.",
    )
    expect(bool(torch.isfinite(y.float()).all()), "The output must be finite; yours holds NaN or infinity.")
    return y.float()


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-30))


def _off(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def static_solution(x, w_codes, w_scale, scale, zero_point):
    """Codes on the fixed grid, cut to 0..255; whole numbers multiplied and added; both scales at the end."""
    codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
    sums = (codes - zero_point) @ w_codes.float().T
    return sums * scale * w_scale


def _static_causes(x, w_codes, w_scale, scale, zero_point) -> tuple:
    """What slips give, and what to say of each."""
    w = w_codes.float()
    free = torch.round(x / scale) + zero_point
    codes = free.clamp(0, 255)
    own = choose_qparams(x.min(), x.max(), qmin=0, qmax=255)
    fresh = (quantize(x, own) - own.zero_point).float()
    return (
        ((free - zero_point) @ w.T * scale * w_scale, "Values outside the grid must be cut to the codes 0 … 255."),
        ((free.long().to(torch.uint8).float() - zero_point) @ w.T * scale * w_scale,
         "A code of 300 became 44: it was cast to uint8 before it was clamped."),
        (codes @ w.T * scale * w_scale, "zero_point must be subtracted from the codes again."),
        ((codes - zero_point) @ w.T * scale, "The rows of the weight have scales too: w_scale."),
        ((codes - zero_point) @ w.T * w_scale, "The sums are in steps of the input: multiply by its scale."),
        ((codes - zero_point) @ w.T, "Those are the integer sums; two scales make real numbers of them."),
        (x @ w.T * w_scale, "The input was not rounded at all: that is a weight-only layer."),
        (x.clamp(-scale * zero_point, scale * (255 - zero_point)) @ w.T * w_scale,
         "The input was cut but not rounded."),
        (fresh @ w.T * own.scale * w_scale, "That is a dynamic layer: the grid is given here, not read off x."),
        ((torch.floor(x / scale) + zero_point).clamp(0, 255).sub(zero_point) @ w.T * scale * w_scale,
         "Round to the nearest code; floor is not round."),
    )  # fmt: skip


def _test_static(f):
    w_codes, w_scale, x = _layer()
    for size, case in ((1.0, "inside the grid"), (4.0, "partly outside the grid")):
        given = (size * x, w_codes, w_scale, 0.02, 100)
        wanted = static_solution(*given)
        got = _output(f(given[0].clone(), w_codes.clone(), w_scale.clone(), 0.02, 100), wanted)
        cause = next(
            (text for wrong, text in _static_causes(*given) if _near(got, wrong)),
            "Codes, minus zero_point, times the weight's codes (widened: int8 products overflow), times both scales.",
        )
        expect(
            _near(got, wanted), f"For an input {case} the output is off by {_off(got, wanted):.2g} of its size. {cause}"
        )
    zero = _output(f(torch.zeros(5, 12), w_codes, w_scale, 0.02, 100), wanted)
    expect(
        bool((zero == 0).all()),
        f"An input of zeros must give exactly 0; got {zero.abs().max():.3g}. Its code is zero_point.",
    )


def dynamic_solution(x, w_codes, w_scale):
    """Each token's own largest |x| falls on code 127; the rest is the static layer with a scale a row."""
    scale = (x.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    codes = torch.round(x / scale)
    return (codes @ w_codes.float().T) * scale * w_scale


def _test_dynamic(f):
    w_codes, w_scale, x = _layer()
    float_y = (x.double() @ w_codes.double().T * w_scale).float()

    def run(x):
        return _output(f(x.clone(), w_codes.clone(), w_scale.clone()), float_y)

    y = run(x)
    _expect_own_scales(run, x, y)
    error = _off(y, float_y)
    expect(
        error < 0.02,
        f"The output is off by {error:.2g} of its size; 8 bits a token keep it below 0.02. "
        + _dynamic_cause(y, x, w_codes, w_scale),
    )
    _expect_rounded_input(run, x, y, exact=_near(y, float_y, 1e-6))
    silent = x.clone()
    silent[1] = 0.0
    y = f(silent, w_codes, w_scale)
    expect(
        bool(torch.isfinite(y).all() and (y[1] == 0).all()),
        "A token of zeros must give zeros; yours gives "
        f"{y[1].abs().max().item():.3g}. Its scale is 0, and 0/0 is NaN: keep the scale above a tiny number.",
    )


def _expect_own_scales(run, x, y):
    """One token louder: its own output grows with it, and no other changes."""
    loud = x.clone()
    loud[2] *= 1000
    beside = run(loud)
    others = [0, 1, 3, 4]
    expect(
        _near(beside[others], y[others], 1e-5),
        "Token 2 was made 1000 times as loud, and the outputs of the others changed by "
        f"{_off(beside[others], y[others]):.2g} of their size. Each token needs a scale of its own: over which "
        "dimension is the maximum taken?",
    )
    expect(
        _near(beside[2], 1000 * y[2], 1e-3),
        f"A token 1000 times as loud should have 1000 times the output; it has {beside[2].norm() / y[2].norm():.4g} "
        "times. The scale must be read off the token, anew in every call.",
    )


def _expect_rounded_input(run, x, y, *, exact: bool):
    """Inputs moved by much less than a step keep their codes; what sets a token's scale stays where it is."""
    inner = (x < x.amax(1, keepdim=True)) & (x > x.amin(1, keepdim=True))
    nudged = x + 1e-5 * inner * (x.abs() < 0.9 * x.abs().amax(1, keepdim=True))
    moved = (run(nudged) - y).abs().max().item()
    expect(
        not exact and moved <= 1e-6 * y.abs().max(),
        "Input values moved by 1e-5, far less than a step, and the output moved with them: the input was not rounded "
        "to codes. That is a weight-only layer.",
    )


def _dynamic_cause(y, x, w_codes, w_scale) -> str:
    w = w_codes.float()
    scale = x.abs().amax(1, keepdim=True) / 127
    codes = torch.round(x / scale)
    causes = (
        (codes @ w.T * w_scale, "The sums are in steps of each token: multiply by its scale, (tokens, 1)."),
        (codes @ w.T * scale, "The rows of the weight have scales too: w_scale."),
        (codes @ w.T, "Those are the integer sums; two scales make real numbers of them."),
    )
    return next(
        (text for wrong, text in causes if _near(y, wrong)),
        "Are all 8 bits used, no code outside them, and nothing multiplied in int8 (which overflows)?",
    )


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


def _test_bytes(f):
    def got(*given) -> int:
        value = f(*given)
        expect(
            isinstance(value, int) or (isinstance(value, float) and value.is_integer()),
            f"Return a whole number of bytes; got {value!r} for {given}.",
        )
        return int(value)

    for way in ("float", "static", "tensor", "token"):
        for shape in ((3, 2000, 600), (300, 64, 96), (17, 5, 3)):
            wanted, mine = bytes_solution(*shape, way), got(*shape, way)
            expect(
                mine == wanted,
                f"{way}, {shape[0]} tokens, {shape[1]} → {shape[2]}: {wanted:,} bytes are read or written, you counted "
                f"{mine:,}: {abs(mine - wanted):,} too {'many' if mine > wanted else 'few'}. "
                + _bytes_cause(mine - wanted, *shape, way),
            )
    ratio = got(512, 2048, 2048, "tensor") / got(512, 2048, 2048, "static")
    return f"At 512 tokens, 2048 → 2048, dynamic moves {ratio:.2f} times what static does."


def _bytes_cause(off: int, tokens: int, K: int, N: int, way: str) -> str:
    causes = {
        -4 * tokens * K: "Dynamic reads the float input twice: once for its range.",
        4 * tokens * K: "Static need not look for the range: it reads the float input once.",
        -4 * N: "The weight has a scale for each row, 4 bytes each.",
        -tokens * K: "The codes of the input are written by one pass and read by the next.",
        -2 * tokens * K: "The codes of the input are written by one pass and read by the next.",
        -8: "The input's map: a scale and a zero point, 8 bytes; dynamic writes and reads it.",
        -16: "The input's map: a scale and a zero point, 8 bytes; dynamic writes and reads it.",
        8: "The map of a static layer is only read.",
        -4 * tokens: "Per token, each token's scale is written once and read once.",
        -8 * tokens: "Per token, each token's scale is written once and read once.",
        8 * tokens: "Per token the map is symmetric: a scale, no zero point.",
        3 * K * N: "int8 weights take one byte each.",
    }
    return causes.get(off, "Go through the table, row by row: what is read, what is written, how often, bytes each?")


def alarm_solution(x, scale, zero_point, limit):
    """The ends of the grid with half a step of grace; then how much of the grid is in use."""
    low, high = -scale * zero_point, scale * (255 - zero_point)
    outside = (x < low - scale / 2) | (x > high + scale / 2)
    if outside.float().mean() > limit:
        return "narrow"
    used = max(x.max().item(), 0.0) - min(x.min().item(), 0.0)
    return "wide" if used < (high - low) / 2 else "fine"


def _test_alarm(f):
    scale, zero_point = 0.02, 50  # the grid is -1.0 .. 4.1
    random = torch.Generator().manual_seed(0)
    inside = torch.rand(100, 50, generator=random) * 5 - 0.95
    few, many, below = inside.clone(), inside.clone(), inside.clone()
    few.view(-1)[:3] = 9.0
    many.view(-1)[:40] = 9.0
    below.view(-1)[:40] = -3.0
    rare = (inside / 4).clone()
    rare.view(-1)[:40] = 50.0
    ends = inside.clone()
    ends.view(-1)[:400], ends.view(-1)[400:800] = -1.009, 4.109
    cases = (
        (inside, "fine", "Nothing lies outside the grid, and its values fill it."),
        (many, "narrow", "40 of 5000 values are 9.0 and the grid ends at 4.1."),
        (below, "narrow", "40 of 5000 values are −3.0 and the grid begins at −1.0: look at both ends."),
        (few, "fine", "3 of 5000 values are outside, fewer than the limit allows."),
        (ends, "fine", "800 values lie beyond the last code by less than half a step: rounding brings them back."),
        (inside / 4, "wide", "The values reach a quarter of the grid: three codes of four are never used."),
        (inside * 0.7, "fine", "The values use 70 % of the grid."),
        (inside.clamp(min=2.2), "fine",
         "The grid must hold 0 as well, so values from 2.2 to 4.05 need four fifths of it."),
        (rare, "narrow", "40 values are cut off, however small the others are. Which question comes first?"),
    )  # fmt: skip
    for x, wanted, why in cases:
        got = f(x.clone(), scale, zero_point, 0.001)
        expect(
            isinstance(got, str) and got in ("narrow", "wide", "fine"),
            f'Return "narrow", "wide" or "fine"; got {got!r}.',
        )
        expect(got == wanted, f'"{got}" where "{wanted}" was right. {why}')
    got = f(few.clone(), scale, zero_point, 0.0)
    expect(got == "narrow", f'3 of 5000 values are cut off and the limit is 0: "narrow", not "{got}".')


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
    count = 512
    _, (stories, chinese), _ = _domains()
    tokens = f(stories.clone(), chinese.clone(), count)
    expect(
        torch.is_tensor(tokens) and tokens.ndim == 1 and tokens.dtype == torch.int64,
        f"Return one row of token ids, int64; got {type(tokens).__name__}.",
    )
    expect(
        2 <= len(tokens) <= count,
        f"At most {count} tokens may be calibrated on (and 2 at least); you return {len(tokens)}.",
    )
    found, target = dict(zip(("stories", "Chinese"), _kl_after(tokens), strict=True)), _target(count)
    shown = ", ".join(f"{kind} {kl:.4f}" for kind, kl in found.items())
    worst = max(found, key=found.get)
    expect(
        found[worst] <= target,
        f"KL on fresh text: {shown}; the target is {target:.2g} on both, and {worst} misses it "
        f"{found[worst] / target:.1f} times over. What has the observer seen of such text?",
    )
    return f"KL on fresh text: {shown}."


EXERCISES = {
    "8.1": Exercise(
        "a static layer",
        _test_static,
        (
            "Three steps: the codes of x on the given grid, the sums, the scales.",
            "codes = clamp(round(x / scale) + zero_point, 0, 255). Subtract zero_point again before the product.",
            "(codes − zero_point) @ w_codes.float().T, then times scale (one number) and w_scale (one a column).",
        ),
        static_solution,
    ),
    "8.2": Exercise(
        "a dynamic layer, per token",
        _test_dynamic,
        (
            "The same three steps, but the scale comes from x: one for each row.",
            "x.abs().amax(1, keepdim=True) is (tokens, 1). Symmetric codes −127 … 127 need no zero point.",
            "scale = largest / 127 (kept above a tiny number), codes = round(x / scale), sums · scale · w_scale.",
        ),
        dynamic_solution,
    ),
    "8.3": Exercise(
        "bytes moved",
        _test_bytes,
        (
            "Go down the table: one term a row. Count tensors first, bytes afterwards.",
            "M·K inputs of 4 bytes (twice if dynamic), M·K codes of 1 byte (written, read), M·N outputs of 4 bytes.",
            "static: K·N + 4·N + 4·M·K + 2·M·K + 8 + 4·M·N; dynamic adds 4·M·K and also writes its maps.",
        ),
        bytes_solution,
    ),
    "8.4": Exercise(
        "the alarm",
        _test_alarm,
        (
            "Where does the grid end? Code 0 and code 255, turned back into real numbers.",
            "A value is cut if it lies more than half a step beyond an end; (condition).float().mean() is a share.",
            "First the share against limit, then the width in use, from min(x.min(), 0) to max(x.max(), 0), against "
            "half of the grid's.",
        ),
        alarm_solution,
    ),
    "8.5": Exercise(
        "calibrate for two kinds of text",
        _test_calibration,
        (
            "An observer knows what it has seen. What will the layer read?",
            "Both kinds of text must be among the tokens, and neither may be a handful.",
            "torch.cat of the first so many tokens of each, together at most count.",
        ),
        calibration_solution,
    ),
}
