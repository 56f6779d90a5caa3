"""What each method loses on real models, against the bars; bits per character of the bundled one. About four minutes.

The rows on others' model and texts need the folder ../shared beside the repository; without it they are left out.
"""

import sys
from pathlib import Path

from quantlab import lm
from quantlab.outliers import plant_outliers
from recipes.base_model import bits_per_character

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


class Bench:
    """A model with its texts: measures methods, and remembers whether every bar was met."""

    def __init__(self, name: str, model, calibration, text):
        self.name, self.model, self.calibration, self.text = name, model, calibration, text
        self.whole, self.met, self.known = lm.perplexity(model, text).value, True, {}

    def lost(self, method: str, **options) -> tuple[float, float]:
        """(perplexity, KL to the float model) after quantizing."""
        key = (method, *sorted(options.items()))
        if key not in self.known:
            new, _ = lm.quantize_lm(self.model, self.calibration, method=method, **options)
            self.known[key] = (lm.perplexity(new, self.text).value, lm.divergence(self.model, new, self.text).kl)
        return self.known[key]

    def compare(self, what: str, first: tuple, second: tuple, bar: float, *, gap: float | None = None) -> None:
        """One line: KL of the second over KL of the first, at most bar; and the perplexity gap closed, at least gap."""
        (p0, kl0), (p1, kl1) = (self.lost(method, **options) for method, options in (first, second))
        closed, ratio = (p0 - p1) / (p0 - self.whole), kl1 / kl0
        good = ratio <= bar and (gap is None or closed >= gap)
        self.met &= good
        asked = f"KL <= {bar:g}" + ("" if gap is None else f", gap >= {gap:.0%}")
        print(
            f"{self.name:12}{what:42}perplexity {self.whole:7.3f}: {p0:8.3f} -> {p1:8.3f} ({closed:4.0%} of the gap)   "
            f"KL {kl0:.4f} -> {kl1:.4f}, ratio {ratio:.2f}   {asked}: {'met' if good else 'MISSED'}",
            flush=True,
        )


def bundled() -> bool:
    model, tokenizer = lm.load_lm(str(lm.DATA / "model"))
    calibration = lm.token_stream(tokenizer, lm.load_text("calibration"))[:16384]
    text = lm.token_stream(tokenizer, lm.load_text("eval"))
    bench = Bench("bundled", model, calibration, text)
    for bits, bar, more in ((4, 0.7, {}), (3, 0.6, {"act_order": True}), (2, 1.0, {"act_order": True})):
        what = f"{bits} bits, 128, rtn -> gptq" + (" act-order" if more else "")
        bench.compare(what, ("rtn", {"bits": bits}), ("gptq", {"bits": bits} | more), bar)
    symmetric = {"bits": 4, "group_size": 64, "symmetric": True}
    bench.compare("4 bits, 64, symmetric int4 -> nf4", ("rtn", symmetric), ("nf4", {"group_size": 64}), 1.0)
    clipped = ("rtn", {"bits": 3, "clip_search": True})
    bench.compare("3 bits, 128, rtn -> rtn with clip search", ("rtn", {"bits": 3}), clipped, 1.0)
    planted = Bench("planted", plant_outliers(model, channels=range(0, 240, 40), factor=100.0), calibration, text)
    planted.compare("4 bits, 128, rtn -> awq", ("rtn", {"bits": 4}), ("awq", {"bits": 4}), 1.0)
    if SHARED.is_dir():
        stories = lm.read_documents([SHARED / "corpora/tinystories_valid.txt"])[:300]
        bits = bits_per_character(model, tokenizer, stories, context=512)
        bench.met &= bits <= 0.85
        print(f"bundled     {bits:.4f} bits per character on 300 stories of its kind (bar 0.85)")
    return bench.met and planted.met


def others() -> bool:
    if not SHARED.is_dir():
        print("../shared is not here: the model that others trained is left out")
        return True
    model, tokenizer = lm.load_lm(str(SHARED / "models/stories260K"))
    train, valid = (SHARED / f"corpora/tinystories_{part}.txt" for part in ("train", "valid"))
    calibration = lm.token_stream(tokenizer, lm.read_documents([train])[:80])[:16384]
    text = lm.token_stream(tokenizer, lm.read_documents([valid])[:300])
    bench = Bench("stories260K", model, calibration, text)
    four, three = {"bits": 4, "group_size": None}, {"bits": 3, "group_size": None}
    groups = {"bits": 3, "group_size": 32}
    bench.compare("4 bits, row, rtn -> gptq", ("rtn", four), ("gptq", four), 1.0, gap=0.30)
    bench.compare("3 bits, row, rtn -> gptq", ("rtn", three), ("gptq", three), 0.62)
    acted = ("gptq", groups | {"act_order": True})
    bench.compare("3 bits, 32, rtn -> gptq act-order", ("rtn", groups), acted, 0.6)
    return bench.met


def main() -> int:
    met = [bundled(), others()]
    print("bars: " + ("met" if all(met) else "MISSED"))
    return int(not all(met))


if __name__ == "__main__":
    sys.exit(main())
