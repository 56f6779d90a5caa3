"""The pages of the site as Sphinx reads them: chapters from the built notebooks, API, ledger, glossary, first page."""

import base64
import csv
import html
import importlib
import inspect
import io
import itertools
import json
import pkgutil
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
from nbformat.v4 import new_markdown_cell, new_output

import quantlab
from quantlab.checks import find
from quantlab.plots import pareto_front, plot_curves
from recipes.filming import ROOT, shows_explorer
from recipes.notebooks import has_tag

LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
CHECK = re.compile(r'^check\("([\d.]+)"', re.M)
HEADING = re.compile(r"^(#+) (.*)$", re.M)
TERM = re.compile(r"^## \d+\. Glossary\n", re.M)
LANDING = "01_scale_and_zero_point"  # the chapter whose first explorer stands on the first page
REAL_LEDGER = (
    "chapter 16, in general English. Its weights were codes of 4 bits before they were floats, which flatters none of "
    "these rows (`benchmarks/flattery.py`)"
)
API = "# API\n\nEvery public name of the library, by the file it stands in; the examples are run as tests."
COLUMNS = {
    "method": "method", "bits": "bits", "group": "group", "bits_per_weight": "bits a weight", "bytes": "bytes",
    "perplexity": "perplexity", "perplexity_error": "± error", "kl": "KL, nats", "kl_error": "± error",
    "top1": "same top token",
}  # fmt: skip


# --- chapters ---------------------------------------------------------------------------------------------------


def chapter(path: Path, films: Path, stems: set[str]) -> nbformat.NotebookNode:
    """A built notebook as a page: explorers that move, hints under exercises, links that lead to pages."""
    notebook, number = nbformat.read(path, 4), 0
    cells, section = [], ""
    for at, cell in enumerate(notebook.cells):
        section = (HEADING.findall(cell.source) or [("", section)])[-1][1] if cell.cell_type == "markdown" else section
        if cell.cell_type == "markdown":
            cell.source = with_page_links(cell.source, stems)
        elif shows_explorer(cell) and any("image/png" in out.get("data", {}) for out in cell.outputs):
            number += 1
            stem = films / path.stem / str(number)
            cell.outputs = [html_output(film_html(stem, f"../_static/films/{path.stem}/{number}", plain(section)))]
        else:
            describe(cell, plain(section), notebook.cells[at + 1 : at + 2])
        cells += [cell, *hints_below(cell)]
    cells.insert(1, new_markdown_cell(how_to_open(path)))
    notebook.cells = cells
    return notebook


def how_to_open(path: Path) -> str:
    return (
        f"````{{note}}\nThis page shows what `notebooks/{path.name}` gave when it was run. To open it and run it "
        "yourself, with checks that answer, in a checkout of this repository:\n\n```text\npython run.py setup\n"
        f"python run.py lab   # then open notebooks/{path.name}\n```\n````"
    )


def with_page_links(text: str, stems: set[str]) -> str:
    """Links to notebooks lead to their pages; what has no page here stands as text."""

    def page(match) -> str:
        words, to = match.groups()
        if to.startswith("http") or (to.endswith(".ipynb") and to.removesuffix(".ipynb") in stems):
            return match[0]
        return words if to.endswith((".ipynb", ".py")) else match[0]

    return LINK.sub(page, text)


def film_html(stem: Path, address: str, section: str) -> str:
    """What film.js takes over: the first picture and its numbers, which also stand without it."""
    index = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    place = [control["start"] for control in index["controls"]]
    text = index["texts"][next(row for row in index["states"] if row[: len(place)] == place)[-1]]
    names = ", ".join(control["label"] for control in index["controls"])
    width, height = index["size"]
    alt = html.escape(f"Explorer: {section}. Controls: {names}. Its numbers stand below the picture.", quote=True)
    return (
        f'<div class="film" data-film="{address}"><div class="frame"><img src="{address}.webp" alt="{alt}" '
        f'width="{width}" height="{height}" loading="lazy"></div><p class="numbers">{html.escape(text)}</p>'
        '<p class="static-only">The sliders need JavaScript.</p></div>'
    )


def html_output(text: str) -> nbformat.NotebookNode:
    return new_output("display_data", {"text/html": text})


def describe(cell, section: str, after: list) -> None:
    """Give a picture its text alternative: the section, and what the text below says. A guess gets its choices."""
    for i, output in enumerate(cell.outputs):
        text = output.get("data", {}).get("text/plain", "")
        if text.startswith("Predict. "):
            cell.outputs[i] = html_output(prediction_html(text))
        elif "image/png" in output.get("data", {}):
            output.data["text/html"] = picture_html(output.data["image/png"], alternative(section, after))


def picture_html(png: str, alt: str) -> str:
    data = base64.b64decode(png)
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    return (
        f'<img src="data:image/png;base64,{"".join(png.split())}" alt="{html.escape(alt, quote=True)}" '
        f'width="{width}" height="{height}">'
    )


def alternative(section: str, after: list) -> str:
    below = plain(after[0].source) if after and after[0].cell_type == "markdown" else ""
    sentence = re.match(r"(?:What you saw\. )?(.{0,300}?[.:?])(?:\s|$)", below, re.S)
    return f"Picture: {section}. {sentence[1] if sentence and not below.startswith('#') else ''}".strip()


def plain(text: str) -> str:
    """Markdown without its marks, in one line."""
    return " ".join(re.sub(r"[*`$_#]|<[^>]+>", "", LINK.sub(r"\1", text)).split())


def prediction_html(text: str) -> str:
    """A question, and its choices to tick: for the reader alone, nothing is sent or kept."""
    question, _, below = text.removeprefix("Predict. ").partition("\n")
    choices = [choice.strip() for choice in below.split("( )")[1:]]
    name = f"guess-{zlib.crc32(question.encode())}"
    answers = [f'<label><input type="radio" name="{name}"> {html.escape(choice)}</label>' for choice in choices]
    if not choices:
        answers = [f'<label><input type="number" step="any"> {html.escape(below)}</label>']
    return f'<fieldset class="predict"><legend>Predict. {html.escape(question)}</legend>{"".join(answers)}</fieldset>'


def hints_below(cell) -> list:
    """Under the check of an exercise its hints, each behind a fold."""
    if cell.cell_type != "code" or has_tag(cell, "exercise"):
        return []
    names = CHECK.findall(cell.source)
    folds = [
        f"<details><summary>Hint {i} for exercise {name}</summary>\n\n{hint}\n\n</details>"
        for name in names
        for i, hint in enumerate(find(name).hints, 1)
    ]
    return [new_markdown_cell("\n\n".join(folds))] if folds else []


# --- the other pages --------------------------------------------------------------------------------------------


def first_page(films: Path, stems: list[str]) -> str:
    """What the workbook is, one explorer, and the chapters."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    learn = re.search(r"^## What you will learn\n\n(.*?)\n\n", readme, re.M | re.S)
    intro = re.search(r"^# quantlab\n\n(.*?)\n\n", readme, re.M | re.S)
    landing = LANDING if LANDING in stems else stems[0]
    parts = [f"# quantlab\n\n{intro[1]}"]
    if (films / landing / "1.json").exists():
        explorer = film_html(films / landing / "1", f"_static/films/{landing}/1", "a layer of a real language model")
        parts.append(f"```{{raw}} html\n{explorer}\n```")
        parts.append(f"*Drag it: everything moves here, without a kernel. It is from [](chapters/{landing}.ipynb).*")
    if learn:
        parts.append(f"## What you will learn\n\n{learn[1]}")
    chapters = "\n".join(f"chapters/{stem}" for stem in stems)
    parts.append(f"```{{toctree}}\n:caption: Chapters\n:maxdepth: 1\n\n{chapters}\n```")
    parts.append("```{toctree}\n:caption: Reference\n:maxdepth: 1\n\nglossary\nledger\napi/index\n```")
    return "\n\n".join(parts) + "\n"


def glossary() -> str:
    """The glossary of notebook 00."""
    notebook = nbformat.read(ROOT / "notebooks/00_start_here.ipynb", 4)
    cell = next(cell.source for cell in notebook.cells if cell.cell_type == "markdown" and TERM.search(cell.source))
    below = TERM.split(cell, maxsplit=1)[1]
    return "# Glossary\n\n" + re.split(r"^## ", below, flags=re.M)[0]


def ledger_page(folder: Path) -> str:
    """Every way of quantizing the two models that was measured, and the front of the best of each."""
    return (
        "# The ledger\n\nBits a weight count all bytes of the model over all of its parameters; ± is a standard error; "
        "KL is to the float model. A click on a heading sorts.\n\n"
        + ledger_part(folder, "The bundled model", "what the chapters measured on it, in stories", "ledger")
        + ledger_part(folder, "SmolLM2-135M-Instruct", REAL_LEDGER, "ledger-smollm2")
    )


def ledger_part(folder: Path, title: str, words: str, name: str) -> str:
    """The picture and the table of one model."""
    with (ROOT / f"data/{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    head = "".join(f'<th scope="col">{column}</th>' for column in COLUMNS.values())
    body = "".join(f"<tr>{''.join(cell_html(row[column]) for column in COLUMNS)}</tr>" for row in rows)
    (folder / f"{name}.png").write_bytes(front_picture(rows))
    return (
        f"## {title}\n\n`data/{name}.csv`: {words}.\n\n"
        f"```{{image}} {name}.png\n:alt: {title}, KL to the float model over bits a weight of every row, and the line "
        "below which none lies; the rows on it are listed in the table.\n```\n\n"
        f'```{{raw}} html\n<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>\n```\n\n"
    )


def cell_html(value: str) -> str:
    """A number short, with its full value to sort by."""
    try:
        number = float(value)
    except ValueError:
        return f"<td>{html.escape(value)}</td>"
    shown = f"{number:,.0f}" if number > 999 else f"{number:.4g}"
    return f'<td class="number" data-value="{number}">{shown}</td>'


def front_picture(rows: list[dict]) -> bytes:
    points = [(float(r["bits_per_weight"]), float(r["kl"])) for r in rows if r["kl"] and float(r["kl"]) > 1e-6]
    fig, ax = plt.subplots(figsize=(8.4, 3.6), dpi=100)
    plot_curves(
        {"the best": tuple(zip(*pareto_front(points), strict=True))},
        xlabel="bits a weight, all bytes counted", ylabel="KL to the float model, nats", log="y", ax=ax,
    )  # fmt: skip
    ax.plot(*zip(*points, strict=True), "o", color="0.6", markersize=4, zorder=0, label="a row of the ledger")
    ax.legend(fontsize="small")
    fig.tight_layout()
    out = io.BytesIO()
    fig.savefig(out, format="png")
    plt.close(fig)
    return out.getvalue()


# --- API --------------------------------------------------------------------------------------------------------


def api() -> dict[str, str]:
    """{name: page} of the public names of quantlab: a page for each of its files and folders, and their "index"."""
    parts = {}
    for name in modules():
        parts.setdefault(name.split(".")[1], []).append(name)
    pages = {part: page for part, names in parts.items() if (page := api_page(names))}
    listed = "\n".join(pages)
    return pages | {"index": f"{API}\n\n```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n"}


def api_page(names: list[str]) -> str:
    """The public names of a module, or of a package and what is in it, each where it is met first; "" of none."""
    page, seen = [], set()
    for name in names:
        module, mark = importlib.import_module(name), "#" if name == names[0] else "##"
        members = [(each, member) for each, member in public(module) if member not in seen]
        seen.update(member for _, member in members)
        if members or name == names[0]:
            page.append(f"{mark} {name}\n\n{prose(inspect.getdoc(module) or '')}")
            page += [entry(each, member, f"{mark}#") for each, member in members]
    return "\n\n".join(page) + "\n" if seen else ""


def modules() -> list[str]:
    found = pkgutil.walk_packages(quantlab.__path__, "quantlab.")
    left_out = ("quantlab.exercises.", "quantlab.hunt.", "quantlab.explorers.")
    return sorted(each.name for each in found if not each.name.startswith(left_out) and "__main__" not in each.name)


def public(module) -> Iterator[tuple[str, object]]:
    """The functions and classes of a module that others may use, in the order of its file."""
    for name, member in vars(module).items():
        exported = name in getattr(module, "__all__", ()) or getattr(member, "__module__", None) == module.__name__
        if not name.startswith("_") and exported and (inspect.isfunction(member) or inspect.isclass(member)):
            if inspect.getdoc(member):
                yield name, member


def entry(name: str, member, mark: str) -> str:
    try:
        signature = re.sub(r"<[^<>]*>", "...", str(inspect.signature(member)))
    except ValueError:  # a class that takes what its base in C takes
        signature = "(...)"
    kind = "class " if inspect.isclass(member) else ""
    return f"{mark} {name}\n\n```python\n{kind}{name}{signature}\n```\n\n{prose(inspect.getdoc(member))}"


def prose(doc: str) -> str:
    """A docstring as Markdown: paragraphs as they are, what is indented or an example as code."""
    parts = []
    for block in re.split(r"\n\s*\n", doc):
        lines = block.splitlines()
        if block.startswith(">>>"):
            parts.append(f"```pycon\n{block}\n```")
        else:
            parts.append(mixed(lines))
    return "\n\n".join(parts)


def mixed(lines: list[str]) -> str:
    """Text whose indented lines are formulas."""
    runs = [(key, list(run)) for key, run in itertools.groupby(lines, lambda line: line.startswith("    "))]
    texts = (" ".join(map(str.strip, run)) for _, run in runs)
    return "\n\n".join(
        f"```text\n{inspect.cleandoc(chr(10).join(run))}\n```" if formula else escaped(text)
        for (formula, run), text in zip(runs, texts, strict=True)
    )


def escaped(text: str) -> str:
    """So that Markdown takes nothing of it for a mark."""
    return re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text)
