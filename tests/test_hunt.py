"""The bug hunt keeps its word: bugs are bugs, mended is mended, what is fine is fine, and no cheat proves anything."""

import contextlib
import inspect
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from learners_hunt import CLEARED, PROOFS

from quantlab import hunt, progress
from quantlab.explorers import explore_hunt
from quantlab.hunt import judging, playing
from quantlab.hunt.atlas import ATLAS, notebooks
from quantlab.hunt.judging import judge, run_test
from quantlab.hunt.playing import CASES, ROOMS

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
BUGS = [name for name, case in CASES.items() if case.buggy]
FINE = [name for name, case in CASES.items() if not case.buggy]
FLOOR, HALVES, SATURATES = "ranges.3", "ranges.2", "integers.3"


@pytest.fixture(autouse=True)
def _fresh():
    hunt.restart()
    yield
    hunt.restart()


def said(capsys, *arguments, **options) -> str:
    hunt.verdict(*arguments, **options)
    return " ".join(capsys.readouterr().out.split())


def printed(function) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        function()
    return out.getvalue()


# --- the programs -----------------------------------------------------------------------------------------------


def test_33_bugs_each_error_once_and_ten_that_are_fine():
    assert sorted(CASES[name].error for name in BUGS) == sorted(f"E{number}" for number in range(1, 34))
    assert len(FINE) == 10
    assert len(ROOMS) == 6
    assert all(5 < len(room.cases) < 9 and any(not case.buggy for case in room.cases) for room in ROOMS.values())


@pytest.mark.parametrize("name", BUGS)
def test_the_reference_test_proves_each_bug(name):
    case = CASES[name]
    kinds = [run_test(case.test, case, f).kind for f in (case.program, case.mended, case.mended_again)]
    assert kinds[0] in ("failed", "raised")
    assert kinds[1:] == ["passed", "passed"]
    assert judge(case, case.test).proves


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine_passes_its_test_and_the_tempting_repair_does_not(name):
    case = CASES[name]
    assert run_test(case.test, case, case.program).kind == "passed"
    assert run_test(case.test, case, case.tempting).exposes


@pytest.mark.parametrize("name", CASES)
def test_the_print_out_does_not_raise_and_is_the_same_each_time(name):
    case = CASES[name]
    first = printed(lambda: case.demo(case.program))
    assert first
    assert printed(lambda: case.demo(case.program)) == first


@pytest.mark.parametrize("name", CASES)
def test_the_page_shows_the_program_and_gives_nothing_away(name, capsys):
    hunt.show(name)
    page, case = capsys.readouterr().out, CASES[name]
    assert "def program(" in page
    assert " ".join(case.promise.split())[:40] in page
    assert not re.search(rf"mended|tempting|story|hint|\b{case.error or 'E5'}\b", page)
    assert max(map(len, page.splitlines())) <= 120
    assert case.title not in (case.error, "")


@pytest.mark.parametrize("name", CASES)
def test_versions_take_the_same_arguments_and_differ_in_their_text(name):
    case = CASES[name]
    versions = [f for f in (case.program, case.mended, case.mended_again, case.tempting) if f]
    assert len({str(inspect.signature(f)) for f in versions}) == 1
    assert len({inspect.getsource(f) for f in versions}) == len(versions)


# Bugs whose print-out is, to the last character, that of the mended program; the others print another number.
HIDDEN_WHOLLY = {
    "ranges.1", "ranges.4", "ranges.6", "ranges.7", "ranges.8", "codebooks.1", "codebooks.2", "integers.3",
    "integers.4", "integers.6", "measuring.4", "measuring.7", "measuring.8", "training.2", "training.5", "tools.1",
    "tools.4", "tools.6",
}  # fmt: skip


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_hides_wholly_in_its_print_out_in_the_named_cases(name):
    case = CASES[name]
    assert playing.printed(case, case.mended_again)
    assert (playing.printed(case) == playing.printed(case, case.mended)) == (name in HIDDEN_WHOLLY)


@pytest.mark.parametrize("name", BUGS)
def test_a_learners_test_from_the_promise_alone_is_accepted(name):
    judged = judge(CASES[name], PROOFS[name])
    assert judged.proves, judged.text


@pytest.mark.parametrize("name", FINE)
def test_a_learners_fair_test_clears_what_is_fine(name):
    case = CASES[name]
    assert run_test(CLEARED[name], case, case.program) == judging.Outcome("passed")


# --- judging ----------------------------------------------------------------------------------------------------


def strict(program):
    """Asks for one way of breaking ties, which the promise leaves open."""
    assert program(torch.tensor([0.9, 0.5]), 1.0).tolist() == [1, 0]


def reads_the_source(program):
    assert "floor" not in inspect.getsource(program)


def calls_and_reads_the_source(program):
    program(torch.ones(1), 1.0)
    assert "floor" not in inspect.getsource(program.__closure__[1].cell_contents)


def counts_its_calls(seen=None):
    seen = []

    def test(program):
        program(torch.ones(1), 1.0)
        seen.append(1)
        assert len(seen) % 2 == 0

    return test


def depends_on_luck(program):
    """Finds the bug only when the value is beyond one half."""
    x = next(LUCK)
    assert program(torch.tensor([x]), 1.0).item() == round(x)


LUCK = iter([0.9, 0.2, 0.3, 0.2, 0.9] * 3)


def never_ends(program):
    program(torch.ones(1), 1.0)
    while True:
        pass


def never_ends_and_catches(program):
    while True:
        try:
            program(torch.ones(1), 1.0)
            time.sleep(0.001)
        except Exception:  # noqa: BLE001, S110
            pass


WORTHLESS = {
    "asserts nothing": (lambda program: None, "never called the program"),
    "always passes": (lambda program: program(torch.ones(1), 1.0) and None, "passes on the program as it is shown"),
    "always fails": (lambda program: (_ for _ in ()).throw(AssertionError), "never called the program"),
    "reads the source": (reads_the_source, "never called the program"),
    "reads it behind the curtain": (calls_and_reads_the_source, "itself stopped with OSError"),
    "counts its calls": (counts_its_calls(), "did not say the same each time"),
    "luck": (depends_on_luck, "did not say the same each time"),
    "asks for more than the promise": (strict, "fails on a second mended program"),
    "a typing error": (lambda program: program(torch.ones(1), 1.0) + undefined, "NameError"),  # noqa: F821
    "returns its finding": (lambda program: program(torch.ones(1), 1.0) == 1, "A test speaks by `assert`"),
    "wrong arguments": (lambda program: program(1), "itself stopped with TypeError"),
    "bad input": (lambda program: program("abc", 1.0), "stop as well"),
    "no function": (True, "without brackets"),
    "asserts the contrary": (
        lambda program: (_ for _ in ()).throw(AssertionError("x")) if program(torch.ones(1), 1.0) else None,
        "fails on the mended program as well (it says: x)",
    ),
}


@pytest.mark.parametrize("kind", WORTHLESS)
def test_a_worthless_test_proves_nothing_and_is_told_why(kind, capsys):
    test, message = WORTHLESS[kind]
    assert message in said(capsys, FLOOR, "bug", test=test)
    assert hunt.score().found == 0


def test_the_line_of_a_broken_test_is_named(capsys):
    def mine(program):
        value = program(torch.ones(1), 1.0)
        assert value.item().missing == 1

    text = said(capsys, FLOOR, "bug", test=mine)
    assert "AttributeError" in text
    assert "value.item().missing == 1" in text


@pytest.mark.parametrize("test", [never_ends, never_ends_and_catches])
def test_an_endless_test_is_stopped(test):
    began = time.monotonic()
    outcome = run_test(test, CASES[FLOOR], CASES[FLOOR].program, seconds=0.3)
    assert outcome.kind == "endless"
    assert time.monotonic() - began < 30
    assert "did not end" in judge(CASES[FLOOR], test, seconds=0.3).text


def test_an_import_is_not_interrupted(tmp_path, monkeypatch):
    """A module that is half imported would stay so."""
    (tmp_path / "slow_to_import.py").write_text("import time\nfor _ in range(20): time.sleep(0.05)\nDONE = True\n")
    monkeypatch.syspath_prepend(tmp_path)

    def imports(program):
        import slow_to_import

        assert slow_to_import.DONE
        never_ends(program)

    assert run_test(imports, CASES[FLOOR], CASES[FLOOR].program, seconds=0.1).kind == "endless"
    assert sys.modules.pop("slow_to_import").DONE


@pytest.mark.parametrize("name", BUGS)
def test_a_test_that_recognises_the_text_of_the_mended_program_is_caught(name):
    """It knows, by its code, the shown program and the first mended one; the second it has never seen."""
    case = CASES[name]

    def knows(program):
        inner = next(cell.cell_contents for cell in program.__closure__ if inspect.isfunction(cell.cell_contents))
        calls = next(cell.cell_contents for cell in program.__closure__ if isinstance(cell.cell_contents, list))
        calls.append(1)  # pretends to have called
        assert inner.__code__.co_code == case.mended.__code__.co_code

    assert not judge(case, knows).proves


@pytest.mark.parametrize("name", FINE)
def test_an_accusing_test_of_what_is_fine_is_a_false_alarm(name, capsys):
    case = CASES[name]

    def too_strict(program):
        case.test(program)
        raise AssertionError

    assert "a false alarm" in said(capsys, name, "bug", test=too_strict)
    assert hunt.score().alarms == (name,)


def test_a_test_is_not_run_with_more_than_it_needs():
    """A program is handed over without its name: what is seen of it is the same for each version."""
    case = CASES[SATURATES]
    seen = [judging.disguised(case, f, []) for f in (case.program, case.mended, case.mended_again)]
    assert len({(f.__name__, f.__qualname__, f.__doc__, str(inspect.signature(f))) for f in seen}) == 1


# --- playing ----------------------------------------------------------------------------------------------------


def test_stubs_and_dots_are_not_attempted(capsys):
    def stub(program):
        raise NotImplementedError

    for arguments in ((...,), (None,), ("bug", stub)):
        assert said(capsys, FLOOR, *arguments).endswith("not attempted yet")
    assert "proved by a test" in said(capsys, FLOOR, "bug")
    assert hunt.score().open == 43


def test_a_whole_hunt(capsys):
    for name in BUGS[2:]:
        assert "found, and proved" in said(capsys, name, "bug", test=CASES[name].test)
    for name in FINE[1:]:
        assert "Fine, though it looks odd" in said(capsys, name, "fine")
    assert "there is a bug in it" in said(capsys, BUGS[0], "fine")
    hunt.reveal(BUGS[1])
    score = hunt.score()
    assert (score.found, score.cleared, score.open) == (31, 9, 1)
    assert (score.missed, score.told, score.alarms) == ((BUGS[0],), (BUGS[1],), ())
    assert score.chapters == tuple(sorted({CASES[BUGS[0]].chapter, CASES[BUGS[1]].chapter}))
    assert "31 of 33" in repr(score)
    file = notebooks()[CASES[BUGS[0]].chapter][1]
    assert f"[01 Scale and zero point]({file}), for {BUGS[0]}" in score._repr_markdown_()
    assert f"01 Scale and zero point, for {BUGS[0]}" in repr(score)


def test_an_exercise_of_two_right_verdicts_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("QUANTLAB_PROGRESS", str(tmp_path / "mine.json"))
    rooms = zip(playing.EXERCISES.values(), ROOMS, strict=True)
    assert all(name.partition(".")[0] == room for both, room in rooms for name in both)
    hunt.verdict("ranges.3", "bug", test=CASES["ranges.3"].test)
    hunt.verdict("ranges.4", "fine")
    assert progress.read() == {}
    hunt.verdict("ranges.4", "bug", test=CASES["ranges.4"].test)
    assert list(progress.read()) == ["21.1"]


def test_what_was_told_is_no_find_any_more(capsys):
    hunt.reveal(FLOOR)
    out = capsys.readouterr().out
    assert "def mended_again(" in out
    assert "E5" in out
    said(capsys, FLOOR, "bug", test=CASES[FLOOR].test)
    assert hunt.score().found == 0
    said(capsys, HALVES, "bug", test=lambda program: _fail(program))
    said(capsys, HALVES, "fine")
    assert hunt.score().cleared == 0


def _fail(program):
    assert program(torch.tensor([0.5])).item() == 1


def test_a_bug_called_fine_can_still_be_found(capsys):
    said(capsys, FLOOR, "fine")
    said(capsys, FLOOR, "bug", test=CASES[FLOOR].test)
    score = hunt.score()
    assert (score.found, score.missed, score.chapters) == (1, (FLOOR,), ("01",))


def test_a_find_stays_a_find(capsys):
    said(capsys, FLOOR, "bug", test=CASES[FLOOR].test)
    said(capsys, FLOOR, "fine")
    hunt.reveal(FLOOR)
    score = hunt.score()
    assert (score.found, score.missed, score.told) == (1, (), ())


@pytest.mark.parametrize("call", [hunt.show, hunt.program, hunt.hint, hunt.reveal])
@pytest.mark.parametrize("name", ["cellar", "ranges.99", "", 3])
def test_an_unknown_name_is_an_error_of_ours(call, name):
    with pytest.raises(ValueError, match="no program"):
        call(name)


def test_another_opinion_is_an_error_of_ours():
    with pytest.raises(ValueError, match="opinion"):
        hunt.verdict(FLOOR, "perhaps")


def test_a_room_shows_all_its_programs(capsys):
    hunt.show("tools")
    out = capsys.readouterr().out
    assert [f"tools.{number} " in out for number in range(1, 7)] == [True] * 6


def test_program_and_hint(capsys):
    assert hunt.program(FLOOR)(torch.tensor([0.9]), 1.0).item() == 0
    hunt.hint(FLOOR)
    assert capsys.readouterr().out.startswith(f"{FLOOR}: ")
    assert all(case.hint.count("?") >= 1 or case.hint.endswith(".") for case in CASES.values())


# Slider values at which the bug of a room's picture hides, and how far off the program may be there.
HIDDEN = {"ranges": (-8, 0.02), "codebooks": (0.5, 0), "integers": (60, 0), "training": (0.3, 0), "tools": (0.5, 0.002)}


@pytest.mark.parametrize("room", ROOMS)
def test_the_picture_of_a_room_shows_its_bug_at_once_and_hides_it_elsewhere(room):
    explorer = explore_hunt(room)

    def off():
        promised, given = (line.get_ydata() for line in explorer.ax.lines)
        return abs(np.asarray(given) - np.asarray(promised)).max()

    assert off() > 0.1
    if room in HIDDEN:
        explorer.controls["value"].value = HIDDEN[room][0]
        assert off() <= HIDDEN[room][1]


def test_a_hunt_goes_on_another_day(tmp_path, capsys):
    said(capsys, FLOOR, "bug", test=CASES[FLOOR].test)
    said(capsys, "ranges.4", "fine")
    before, path = hunt.score(), tmp_path / "hunt.json"
    hunt.save(path)
    hunt.restart()
    hunt.resume(path)
    assert hunt.score() == before
    hunt.restart()
    hunt.resume(tmp_path / "none.json")  # nothing was saved there: nothing is known
    assert hunt.score().open == 43


@pytest.mark.parametrize("text", ["{", "[1]", '{"ranges.99": ["right"]}', '{"ranges.1": ["rich"]}', '{"ranges.1": 1}'])
def test_a_file_that_is_no_hunt_is_an_error_of_ours(tmp_path, text):
    path = tmp_path / "hunt.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="hunt"):
        hunt.resume(path)
    assert hunt.score().open == 43


# --- the atlas --------------------------------------------------------------------------------------------------


def cell_source(cell: dict) -> str:
    return "".join(cell["source"])


def cells_with(chapter: str, text: str) -> list[dict]:
    """The code cells of a notebook that were run and hold this text."""
    (path,) = NOTEBOOKS.glob(f"{chapter}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [c for c in cells if c["cell_type"] == "code" and c["execution_count"] and text in cell_source(c)]


def test_the_atlas_has_every_error_and_the_chapters_of_the_programs():
    assert list(ATLAS) == [f"E{number}" for number in range(1, 34)]
    assert all(entry.cells for entry in ATLAS.values())
    read_again = {case.error: case.chapter for case in CASES.values() if case.buggy}
    assert set(read_again.values()) <= notebooks().keys()
    elsewhere = {e: (read_again[e], entry.chapter) for e, entry in ATLAS.items() if read_again[e] != entry.chapter}
    assert elsewhere == ELSEWHERE


# Errors that chapter 21 takes apart itself, though an earlier one explains what they break.
ELSEWHERE = {"E2": ("01", "21")}
# Of these the cells assert nothing: what they print is stored, and nbval compares it.
COMPARED = {"E3", "E9", "E10"}


@pytest.mark.parametrize("error", ATLAS)
def test_the_chapter_has_each_cell_that_takes_an_error_apart(error):
    entry = ATLAS[error]
    for text in entry.cells:
        assert len(cells_with(entry.chapter, text)) == 1, text


@pytest.mark.parametrize("error", ATLAS)
def test_a_cell_that_takes_an_error_apart_can_fail(error):
    cells = [cell for text in ATLAS[error].cells for cell in cells_with(ATLAS[error].chapter, text)]
    asserting = [any(map(asserts, cell_source(cell).splitlines())) for cell in cells]
    tags = [cell["metadata"].get("tags", ()) for cell in cells]
    compared = [bool(c["outputs"]) and "nbval-ignore-output" not in t for c, t in zip(cells, tags, strict=True)]
    assert all(a or c for a, c in zip(asserting, compared, strict=True))
    assert any(asserting) == (error not in COMPARED)


def asserts(line: str) -> bool:
    return line.lstrip().startswith(("assert ", "found(", "check("))


def test_the_atlas_as_a_table():
    table = hunt.atlas()
    assert repr(table).count("\n") == 32
    assert table._repr_markdown_().count("ipynb") == 33
