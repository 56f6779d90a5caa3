"""Where each error is taken apart: which notebook, and which of its cells."""

from dataclasses import dataclass
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@dataclass(frozen=True)
class Entry:
    """An error in print, and the running cells that take it apart, each found by a piece of its text."""

    claim: str
    chapter: str  # "04": how the notebook's name begins
    cells: tuple[str, ...]


def _entry(claim: str, chapter: str, *cells: str) -> Entry:
    return Entry(claim, chapter, cells)


ATLAS: dict[str, Entry] = {
    "E1": _entry("INT8 is 8 times smaller", "03", "assert 3.9 < 32 / eight < 4"),
    "E2": _entry("round((x − z) / s), z any real", "21", "assert seed_zero.abs() > 0.1 * step"),
    "E3": _entry("clamp to ±(2ⁿ − 1)", "02", "for limit in (2**8 - 1, 2**7 - 1):"),
    "E4": _entry("clip the zero point into the codes", "01", "clipped = QParams(torch.tensor(s), torch.tensor(0",
                 "assert error.max() <= qp.scale / 2 * 1.001"),
    "E5": _entry("quantizing is ⌊W / s⌋", "01", "floored = qp.scale * (torch.floor("),
    "E6": _entry("asymmetric is always better", "01", "(error_of(x, True) / error_of(x, False))"),
    "E7": _entry("WX = the product of codes, whatever the scales", "07", "same, real = inputs @ weights"),
    "E8": _entry("dynamic: the precision changes", "08", 'maps = {"dynamic": [], "static": []}'),
    "E9": _entry("quantize_dynamic, then train", "13", "torch.ao.quantization.quantize_dynamic(copy.deepcopy(net)"),
    "E10": _entry("prepare, train, convert, done", "13", "def older_recipe(net, x):"),
    "E11": _entry("QAT adds noise; the gradient passes everywhere", "13", "noisy = [values + 0.5 * (torch.rand(",
                  "assert slope.unique().tolist() == [0, 1]"),
    "E12": _entry("PTQ, step 3: fine-tune", "13", "assert all(p.grad is None for m in (model, ptq["),
    "E13": _entry("random noise will do for calibration", "02", "found(kl[\"random numbers\", key] > 10 *"),
    "E14": _entry("NF4 is evenly spaced, or a 4-bit float", "04", "gaps, both = nf4.diff(), nf4[torch.isin("),
    "E15": _entry("NF4 by simpler recipes", "04", "mirrored = torch.cat([-half, half]).unique()"),
    "E16": _entry("all NF4 codes are used alike", "04", "bits = {size: round(entropy(p), 2) for size, p in used"),
    "E17": _entry("divide by the largest weight of the matrix", "04", "db = {size: decibels(nf4, size)"),
    "E18": _entry("NF4 is a method, always slower", "15", "ratios = [fastest(coded, x) / fastest(dense, x)"),
    "E19": _entry("LLM.int8() is weight-only", "09", 'assert changes["LLM.int8()"] < 1e-10'),
    "E20": _entry("AWQ keeps 1 % in float", "11", "assert all(q.q.codes.dtype == torch.int8 for q in stored)"),
    "E21": _entry("GPTQ is careful with important weights", "10", "found(min(of_weight) > 1.1 and max(of_output) < 1",
                  "assert torch.equal(gptq.qparams.scale[:, 0], grid.scale)"),
    "E22": _entry("INT8 is faster", "07", "def pays_from(way, K):"),
    "E23": _entry("int8 is the same on any CPU", "07", "right, got = pair.sum().item(), pair.sum().clamp("),
    "E24": _entry("stars for memory", "12", 'turn = (weights["W8A8"] - weights["W4"])'),
    "E25": _entry("a fake-quantized model is smaller", "03", 'fake = save_quantized(folder / "fake"'),
    "E26": _entry("perplexity of what the model writes", "06", "def own(m, temperature):"),
    "E27": _entry("calibrate on the test set", "02", "found(leaked[few][0] > 1.5,"),
    "E28": _entry("q·s + z", "01", "mixed = codes * qp.scale + qp.zero_point"),
    "E29": _entry("axis 0 is the output", "03", "y = (read @ q.codes.float().T) * q.qparams.scale.flatten()"),
    "E30": _entry("the K of Q4_K_M is k-means", "19", "assert (steps - steps.round()).abs().max() < 1e-3"),
    "E31": _entry("TensorRT as it was; old names", "21", "assert 3 < more < 4", "assert \"torchao\" in said"),
    "E32": _entry("FP16 has 11 bits of fraction", "05", "stored = ((values(FP16) >= 1)"),
    "E33": _entry("a cast to FP16 is quantization", "05", 'ways = {"FP16 cast": lambda x: x.half().float()'),
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """The atlas as a notebook shows it."""

    entries: dict[str, Entry]
    files: dict[str, str]  # of the notebooks, by chapter

    def __repr__(self) -> str:
        return "\n".join(f"{name:4} {entry.chapter}  {entry.claim}" for name, entry in self.entries.items())

    def _repr_markdown_(self) -> str:
        lines = ["| | claim | notebook | a line of the cell |", "|---|---|---|---|"]
        for name, entry in self.entries.items():
            file, texts = self.files.get(entry.chapter), "; ".join(f"`{text}`" for text in entry.cells)
            link = f"[{entry.chapter}]({file})" if file else entry.chapter
            lines.append(f"| {name} | {entry.claim} | {link} | {texts} |")
        return "\n".join(lines)


def notebooks() -> dict[str, tuple[str, str]]:
    """{chapter: (title, file)} of the notebooks that are there.

    >>> notebooks().get("21")
    ('21 Bug hunt', '21_bug_hunt.ipynb')
    """
    found = {}
    for path in sorted(NOTEBOOKS.glob("src/[0-9][0-9]_*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        title = next((line.removeprefix("# # ") for line in lines if line.startswith("# # ")), path.stem)
        found[path.stem[:2]] = title, f"{path.stem}.ipynb"
    return found


def atlas() -> Table:
    """Every error, the notebook that takes it apart, and its cells.

    >>> atlas().entries["E5"].chapter
    '01'
    """
    return Table(ATLAS, {chapter: file for chapter, (_, file) in notebooks().items()})
