"""A number in the text is one that a cell beside it computes, or is explained here."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from quantlab import checks
from recipes import notebooks as build

EXERCISES = build.NOTEBOOKS.parent / "quantlab/exercises"
BEFORE, AFTER = 6, 3  # code cells that a paragraph may speak of
# A number that looks measured: with decimals, in percent, or a number of times. Whole numbers are settings, mostly.
MEASURED = re.compile(r"(?<![\w.,/×^·-])[−-]?(\d+(?:[.,]\d+)*|\.\d+)(?:\s(times)|\s?(%))?(?![\w/])")
NUMBER = re.compile(r"\d[\d,]*\.?\d*(?:e-?\d+)?|\.\d+")
NO_CLAIM = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\[[^\]]*\]\([^)]*\)|^#+ [^\n]*$|<[^>]*>|§\d+(\.\d+)*"
    r"|[Nn]otebooks? \d\d|[Ss]ections? \d+|[Ee]xercises? \d+\.\d+(?:(?:,|,? and| to) \d+\.\d+)*|\b(?:19|20)\d\d\b",
    flags=re.M | re.S,
)
# What no cell beside it computes, and why: it is cited, reckoned in the head, or a version.
EXPLAINED = {
    ("00", "0.69"): "log 2, in the glossary",
    ("05", "1.125"): "a tie, reckoned in the head",
    ("06", "3.3"): "two windows in the head",
    ("06", "1.8"): "two windows in the head",
    ("09", "100 times"): "Xiao et al., cited",
    ("09", "6.7"): "Dettmers et al., cited: billions of parameters",
    ("10", "0.8"): "two columns in the head",
    ("10", "0.4"): "two columns in the head",
    ("11", "0.09"): "one output in the head",
    ("14", "1.2"): "an example, in the head",
    ("14", "0.66"): "a factor that was chosen",
    ("18", "0.19"): "3 bits of 16",
    ("19", "4.5"): "true bits of Q4_0, counted before",
    ("21", "10.1"): "a version of TensorRT",
    ("22", "0.05 %"): "half of 2 to the power −10",
}


def numbers(text: str) -> set[float]:
    found = (word.replace(",", "").rstrip(".") for word in NUMBER.findall(text))
    return {float(word) for word in found if word and word.count(".") < 2}


def computed(cell) -> set[float]:
    """The numbers in a code cell and in what it has printed or shown as text."""
    shown = (text for output in cell.outputs for text in build.texts(output).values())
    return set().union(*map(numbers, (cell.source, *shown)))


def targets(text: str) -> set[float]:
    """The numbers in the file that judges the exercise which a cell sets, such as a target."""
    chapters = re.findall(r"^### Exercise (\d+)\.\d+", text, re.M)
    files = (EXERCISES / f"{checks.CHAPTERS[chapter]}.py" for chapter in chapters if chapter in checks.CHAPTERS)
    return set().union(*(numbers(path.read_text(encoding="utf-8")) for path in files))


def unexplained(cells: list) -> list[tuple[str, str]]:
    """(number, the words around it) of each measured-looking number that no code cell nearby has."""
    code = {i: computed(cell) for i, cell in enumerate(cells) if cell.cell_type == "code"}
    found = []
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            near = [k for k in code if k < i][-BEFORE:] + [k for k in code if k > i][:AFTER]
            known = set().union(targets(cell.source), *(code[k] for k in near))
            found += _missing(NO_CLAIM.sub(" ", cell.source), known)
    return found


def _missing(text: str, known: set[float]) -> list[tuple[str, str]]:
    missing = []
    for match in MEASURED.finditer(text):
        word, times, percent = match.groups()
        if "." not in word and not times and not percent:
            continue
        value, digits = float(word.replace(",", "")), len(word.partition(".")[2])
        if not any(abs(round(k * by, digits) - value) < 1e-9 for k in known for by in ((1, 100) if percent else (1,))):
            label = word + (" times" if times else " %" if percent else "")
            missing.append((label, text[max(0, match.start() - 60) : match.end() + 30].replace("\n", " ")))
    return missing


@pytest.mark.parametrize("path", sorted(build.NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name[:2])
def test_every_measured_number_in_the_text_stands_beside_a_cell_that_computes_it(path):
    found = unexplained(nbformat.read(path, 4).cells)
    assert [(n, text) for n, text in found if (path.name[:2], n) not in EXPLAINED] == []


def test_every_explanation_is_of_a_number_in_the_text():
    notebooks = {path.name[:2]: [] for path in build.NOTEBOOKS.glob("*.ipynb")}
    for path in build.NOTEBOOKS.glob("*.ipynb"):
        notebooks[path.name[:2]] += [number for number, _ in unexplained(nbformat.read(path, 4).cells)]
    assert [(stem, number) for stem, number in EXPLAINED if number not in notebooks[stem]] == []


def test_a_number_that_nothing_computes_is_found():
    cell = new_code_cell("1 / 3", outputs=[new_output("execute_result", {"text/plain": "0.3333"})])
    for text in ("It is 0.33, or 33 %.", "`0.7` is code, [0.7](x) a link, $0.7$ a formula; 7 is whole; see section 7."):
        assert unexplained([cell, new_markdown_cell(text)]) == []
    for text, number in (
        ("It is 0.34.", "0.34"),
        ("By 12 % less", "12 %"),
        ("about 7 times", "7 times"),
        ("# A 5.5\n0.35", "0.35"),
    ):
        assert [n for n, _ in unexplained([cell, new_markdown_cell(text)])] == [number]
