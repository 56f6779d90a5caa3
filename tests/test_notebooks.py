"""The notebooks are what recipes/notebooks.py makes of their sources, and it keeps its promises."""

import base64
import io
import re
import sys

import jupytext
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from recipes import notebooks as build

TOY = f"""\
# %% [markdown]
# # Toy

# %%
import sys, time
import ipywidgets, matplotlib.pyplot as plt
from tqdm import tqdm
sys.executable == {sys.executable!r}

# %%
plt.plot([1, 3, 2])
plt.show()

# %%
ipywidgets.IntSlider(3)

# %% tags=["nbval-ignore-output"]
for _ in tqdm(range(3)):
    print(time.time_ns(), end="\\r")

# %% tags=["raises-exception"]
1 / 0
"""


def png(level: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (level, 0, 0)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def stream(text: str, name: str = "stdout"):
    return new_output("stream", name=name, text=text)


def picture(level: int):
    return new_output("display_data", {"image/png": png(level), "text/plain": "<Figure>"})


def cell(source: str, *outputs, tags=()):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {})


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "src/01_toy.py"
    path.parent.mkdir()
    path.write_text(TOY, encoding="utf-8")
    return path


# The workbook's own notebooks


def test_every_source_has_a_notebook_and_every_notebook_a_source():
    assert build.unpaired(build.NOTEBOOKS) == []


def test_notebooks_are_as_built_from_their_sources():
    assert [problem for path in sorted(build.NOTEBOOKS.glob("src/*.py")) for problem in build.check(path)] == []


@pytest.mark.parametrize("path", sorted(build.NOTEBOOKS.glob("src/*.py")), ids=lambda path: path.stem[:2])
def test_what_a_notebook_links_is_there(path):
    """Links are relative to the folder of notebooks; what follows # is a heading of the page."""
    text = "\n".join(c.source for c in jupytext.read(path, fmt="py:percent").cells if c.cell_type == "markdown")
    targets = re.findall(r"""\]\(([^)\s]+)\)|(?:src|href)=["']([^"']+)""", text)
    local = [a or b for a, b in targets if not re.match(r"[a-z]+:|#", a or b)]
    assert [link for link in local if not (build.NOTEBOOKS / link.partition("#")[0]).exists()] == []


# Building


def test_building_twice_gives_the_same_bytes(source):
    target = build.notebook_of(source)
    contents = []
    for fresh in (False, False, True):
        assert build.build(source, fresh=fresh) == []
        contents.append(target.read_bytes())
    assert contents[0] == contents[1] != contents[2]
    assert build.unpaired(source.parent.parent) == []


def test_a_built_notebook_holds_what_a_reader_without_a_kernel_needs(source):
    assert build.build(source) == []
    notebook = nbformat.read(build.notebook_of(source), 4)
    imports, plot, slider, volatile, error = [c.outputs for c in notebook.cells if c.cell_type == "code"]
    assert imports[0].data == {"text/plain": "True"}  # the kernel is this very Python
    assert set(plot[0].data) == {"image/png", "text/plain"}
    assert slider[0].data == {"text/plain": "IntSlider(value=3)"}
    assert [(output.name, output.text.count("\r")) for output in volatile] == [("stdout", 1)]
    assert error[0].traceback == ["ZeroDivisionError: division by zero"]
    assert notebook.metadata == build.METADATA


@pytest.mark.parametrize(("code", "problem"), [("int('x')", "ValueError"), ("'/tmp/x'", "a path")])
def test_a_bad_cell_is_reported_and_leaves_the_old_notebook(source, code, problem):
    target, old = build.notebook_of(source), build.as_text(new_notebook())
    target.write_text(old)
    source.write_text(f"# %%\n{code}\n")
    found = build.build(source)
    assert code in found[0]
    assert problem in found[0]
    assert target.read_text() == old
    assert sorted(path.name for path in target.parent.iterdir()) == ["01_toy.ipynb", "src"]


# The normal form


def messy():
    view = {build.WIDGET: {"model_id": "abc"}, "text/plain": "VBox()", "image/png": png(0)}
    notebook = new_notebook(
        cells=[
            new_markdown_cell("text", metadata={"collapsed": True}),
            cell("1", stream("10%\r"), stream("50%\r"), stream("done\n"), new_output("execute_result", view)),
            cell("2", stream("100%|###| 3/3 [00:00]\n", "stderr"), tags=[build.VOLATILE]),
            cell("3", stream("2it [00:00]\n", "stderr")),
        ]
    )
    notebook.metadata = {"widgets": {"state": {}}, "language_info": {"name": "python", "version": "3.11.7"}}
    return notebook


def test_normal_form():
    normal = build.normal_form(messy())
    nbformat.validate(normal)
    assert normal.metadata == build.METADATA
    assert [cell.id for cell in normal.cells] == ["cell-001", "cell-002", "cell-003", "cell-004"]
    assert [cell.execution_count for cell in normal.cells[1:]] == [1, 2, 3]
    assert [cell.metadata for cell in normal.cells] == [{}, {}, {"tags": [build.VOLATILE]}, {}]
    text, widget = normal.cells[1].outputs
    assert text.text == "done\n"
    assert set(widget.data) == {"text/plain", "image/png"}
    assert normal.cells[2].outputs == []
    assert normal.cells[3].outputs[0].name == "stderr"  # reported as a problem: nbval would miss it


def test_normal_form_of_a_normal_form_is_itself_and_the_argument_is_not_changed():
    notebook = messy()
    before = build.as_text(notebook)
    normal = build.normal_form(notebook)
    assert build.as_text(notebook) == before
    assert build.as_text(build.normal_form(normal)) == build.as_text(normal)


# Old outputs


def kept(old, new) -> list[bool]:
    old, new = build.normal_form(new_notebook(cells=old)), build.normal_form(new_notebook(cells=new))
    fresh = [cell.outputs for cell in new.cells]
    build.keep_old_outputs(old, new)
    return [cell.outputs != outputs for cell, outputs in zip(new.cells, fresh, strict=True)]


@pytest.mark.parametrize(
    ("old", "new", "keep"),
    [
        (stream("<A at 0x7f00aa>"), stream("<A at 0x7f00bb>"), True),
        (stream("mse 0.125"), stream("mse 0.126"), False),
        (picture(100), picture(101), True),
        (picture(100), picture(200), False),
    ],
)
def test_outputs_of_a_checked_cell_are_kept_when_only_noise_differs(old, new, keep):
    assert kept([cell("f()", old)], [cell("f()", new)]) == [keep]


def test_outputs_of_a_volatile_cell_are_kept_until_a_checked_cell_changes():
    def timing(text):
        return cell("time_it()", stream(text), picture(len(text)), tags=[build.VOLATILE])

    one, two = cell("f()", stream("1")), cell("f()", stream("2"))
    assert kept([one, timing("   3.1 ms")], [one, timing("1,045.2 ms")]) == [False, True]
    assert kept([one, timing("3.1 ms")], [one, timing("3.1 s")]) == [False, False]
    assert kept([one, timing("3.1 ms")], [cell("g()"), one, timing("45.2 ms")]) == [False, False, False]
    assert kept([one, timing("3.1 ms")], [two, timing("45.2 ms")]) == [False, False]


def test_outputs_of_volatile_cells_are_kept_all_or_none():
    """A sum in one cell and its parts in another would not fit together if they came from two runs."""

    def whole(text):
        return cell("whole()", stream(text), tags=[build.VOLATILE])

    def part(text):
        return cell("part()", stream(text), tags=[build.VOLATILE])

    assert kept([whole("3.1 s"), part("1.2 s")], [whole("4.1 s"), part("1.9 s")]) == [True, True]
    assert kept([whole("3.1 s"), part("1.2 s")], [whole("4.1 s"), part("1.9 s, or less")]) == [False, False]


def test_outputs_of_a_cell_whose_source_has_changed_are_new():
    assert kept([cell("f()", picture(100))], [cell("f( )", picture(101))]) == [False]


# Problems


def problems_of(*cells, source_text="# %%\n1\n", tmp_path) -> str:
    (tmp_path / "01_toy.py").write_text(source_text)
    text = build.as_text(build.normal_form(new_notebook(cells=list(cells))))
    return "\n".join(build.problems(text, tmp_path / "01_toy.py"))


def test_a_good_notebook_has_no_problem(tmp_path):
    assert problems_of(cell("1", stream("1")), tmp_path=tmp_path) == ""


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (cell("2", stream("1")), "differ from the source"),
        (cell("1", stream("1"), tags=["x"]), "differ from the source"),
        (cell("1"), "no outputs"),
        (cell("1", stream("x" * 1_000_001)), "1.0 MB"),
        (cell("1", stream("1", "stderr")), "stderr"),
        (cell("1", stream("UserWarning: x")), "a warning"),
        (cell("1", stream("4.2: not yet. Your code stopped in line 3 of f")), "more than its bare raise"),
        (cell("1", stream("in /home/me/x")), "a path of this machine"),
        (cell("1", new_output("display_data", {"text/html": r"C:\Users\me"})), "a path of this machine"),
        (cell("1", new_output("error", ename="KeyError", evalue="'x'")), "an error"),
        (cell("1", stream("1"), tags=[build.RAISES]), "no error in spite of the tag"),
        (cell("print(1)\nplt.show()", picture(1)), "no output of its print()"),
        (cell("print(1)\nplt.show()", stream("1")), "no output of its plt.show()"),
    ],
)
def test_problems_are_reported(bad, word, tmp_path):
    assert word in problems_of(bad, tmp_path=tmp_path)


def test_a_notebook_saved_by_jupyterlab_or_never_run_is_reported(tmp_path):
    (tmp_path / "01_toy.py").write_text("# %%\n1\n")
    notebook = build.normal_form(new_notebook(cells=[cell("1", stream("1"))]))
    for change in ({"id": "f00"}, {"execution_count": None}, {"metadata": {"scrolled": True}}):
        saved = build.normal_form(notebook)
        saved.cells[0].update(nbformat.from_dict(change))
        found = build.problems(build.as_text(saved), tmp_path / "01_toy.py")
        assert "not as recipes/notebooks.py writes it" in found[0]


def test_a_lonely_file_is_reported(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src/01_a.py").touch()
    (tmp_path / "02_b.ipynb").touch()
    assert build.unpaired(tmp_path) == ["src/01_a.py has no notebook", "02_b.ipynb has no source in src"]
