"""A third, twice, always: what the text says of a quantity in words is shown by a cell beside it, or explained here.

tests/claims/NN.tsv has a line for each: the words as they stand in the text; a piece of a code cell or of its printed
output that shows it; and where there is none, why none is needed. `python tests/test_claims.py 05` lists what has no
line yet.
"""

import csv
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a script
from recipes import notebooks as build

BEFORE, AFTER = 8, 4  # code cells that a paragraph may speak of
CLAIMS = Path(__file__).with_name("claims")
COUNT = r"(?:two|three|four|five|six|seven|eight|nine|ten|a (?:hundred|thousand|million)|several|many|\w+s of)"
PART = r"(?:third|quarter|fifth|sixth|seventh|eighth|ninth|tenth|twelfth|twentieth|hundredth|thousandth|millionth)s?"
SAID = re.compile(
    rf"\b(?:{COUNT} times|(?:a|one|two|three|four|five|six|seven|eight|nine)[ -](?:half|halves|{PART})"
    r"|half (?:of|as|the|its|their|that)\b|twice|halve[sd]?|double[sd]?(?! quantization)"
    r"|(?:nearly|almost) (?:all|every\w*|always|never|none|nothing|no)|most of|hardly|always|never)\b",
    re.I,
)
NO_CLAIM = re.compile(r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|^#+ [^\n]*$|<[^>]*>", re.M | re.S)


def plain(text: str) -> str:
    """On one line; without code, formulas, addresses, headings and stars."""
    return " ".join(NO_CLAIM.sub(" ", text).replace("*", "").split())


def claims(stem: str) -> list[dict]:
    path = CLAIMS / f"{stem}.tsv"
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def problems(cells: list, rows: list[dict]) -> list[str]:
    """Words without a line, lines whose proof is not in a cell nearby or that say nothing, and lines without words."""
    found, used = [], set()
    shown = {i: _shown(cell) for i, cell in enumerate(cells) if cell.cell_type == "code"}
    for i, cell in enumerate(cells):
        text = plain(cell.source) if cell.cell_type == "markdown" else ""
        nearby = [k for k in shown if k < i][-BEFORE:] + [k for k in shown if k > i][:AFTER]
        near = " ".join(shown[k] for k in nearby)
        for match in SAID.finditer(text):
            lines = [n for n, row in enumerate(rows) if _covers(row["words"], text, match)]
            used.update(lines)
            around = text[max(0, match.start() - 70) : match.end() + 50]
            found += [] if lines else [f"no line for: …{around}…"]
            wrong = [rows[n] for n in lines if not _holds(rows[n], near)]
            found += [f"no cell nearby has {row['proof']!r}: {row['words']}" for row in wrong]
    return found + [f"not in the text: {row['words']}" for n, row in enumerate(rows) if n not in used]


def _shown(cell) -> str:
    texts = [text for output in cell.outputs for text in build.texts(output).values()]
    return " ".join(" ".join([cell.source, *texts]).split())


def _covers(words: str, text: str, match: re.Match) -> bool:
    places = (m.span() for m in re.finditer(re.escape(words), text))
    return bool(words) and any(a <= match.start() and match.end() <= b for a, b in places)


def _holds(row: dict, near: str) -> bool:
    return " ".join(row["proof"].split()) in near if row["proof"] else bool(row["why"])


@pytest.mark.parametrize("path", sorted(build.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name[:3])
def test_every_quantity_in_words_has_its_cell(path):
    assert problems(nbformat.read(path, 4).cells, claims(path.stem.partition("_")[0])) == []


def test_words_without_a_cell_are_found():
    cell = new_code_cell("a / b", outputs=[new_output("execute_result", {"text/plain": "0.5003"})])
    text = new_markdown_cell("It takes **half of** the time, as `always` a double quantization does.")
    right = {"words": "half of the time", "proof": "0.5003", "why": ""}
    assert problems([cell, text], [right]) == []
    assert problems([cell, text], [right | {"proof": "", "why": "in the head"}]) == []
    for wrong in ({"proof": "0.7"}, {"proof": ""}, {"words": "half of the bytes"}):
        assert problems([cell, text], [right | wrong]) != []
    assert len(problems([cell, text], [])) == 1


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rows = claims(name) if (CLAIMS / f"{name}.tsv").exists() else []
        print(*problems(nbformat.read(next(build.NOTEBOOKS.glob(f"{name}_*.ipynb")), 4).cells, rows), sep="\n")
