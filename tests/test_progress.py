"""What is passed is remembered in a file of the learner's own, and never at the price of a check."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quantlab import checks, progress
from quantlab.exercises import CHAPTERS

ROOT = Path(progress.__file__).resolve().parent.parent


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A file of progress that is chosen by the environment variable."""
    monkeypatch.setenv("QUANTLAB_PROGRESS", str(tmp_path / "mine.json"))
    monkeypatch.setattr(progress, "_told", set())
    return tmp_path / "mine.json"


def pass_first():
    checks.check("0.1", checks.find("0.1").solution)


# --- where


def test_nothing_is_kept_under_pytest_nor_where_the_variable_says_off(monkeypatch):
    assert progress.place() is None
    for word in ("off", "", "OFF"):
        monkeypatch.setenv("QUANTLAB_PROGRESS", word)
        assert progress.place() is None
    pass_first()
    assert progress.read() == {}


def test_elsewhere_it_lies_beside_the_notebooks_which_git_ignores(monkeypatch):
    monkeypatch.delenv("PYTEST_VERSION")
    monkeypatch.delenv("QUANTLAB_PROGRESS", raising=False)
    assert progress.place() == ROOT / "progress.json"
    assert "/progress.json" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_kernel_that_a_test_starts_keeps_nothing():
    code = "from quantlab import progress; print(progress.place())"
    assert run(code, {}).stdout.strip() == "None"
    without = run(code, {"PYTEST_VERSION": None, "QUANTLAB_PROGRESS": "off"})
    assert without.stdout.strip() == "None"


def run(code: str, changes: dict):
    env = {name: value for name, value in (os.environ | changes).items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


# --- what


def test_a_pass_is_noted_once_and_nothing_else_is(file, capsys):
    checks.check("0.1", None)
    checks.check("0.1", lambda parameters, bits: parameters * bits)
    assert not file.exists()
    pass_first()
    first = file.read_text()
    pass_first()
    assert file.read_text() == first
    assert list(progress.read()) == ["0.1"]
    assert capsys.readouterr().out.count("passed") == 2


def test_many_programs_note_at_once(file):
    names = [f"1.{i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: progress.remember(name, passed=True), names))
    assert sorted(progress.read()) == sorted(names)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"passed": {}}', '{"format": "x", "passed": {"a": 1}}', "\xff"])
def test_a_damaged_file_is_left_alone_and_one_line_says_so(file, content, capsys):
    file.write_bytes(content.encode("latin-1"))
    pass_first()
    pass_first()
    said = capsys.readouterr().out
    assert said.count("0.1 bytes of a model: passed") == 2
    assert said.count("could not be noted: the file of progress is damaged") == 1
    assert file.read_bytes() == content.encode("latin-1")
    assert progress.progress().passed == {}
    assert "taken as empty" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path, monkeypatch, capsys):
    (tmp_path / "no folder").write_text("")
    monkeypatch.setenv("QUANTLAB_PROGRESS", str(tmp_path / "no folder/mine.json"))
    monkeypatch.setattr(progress, "_told", set())
    pass_first()
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("passed")
    assert len(said) == 2
    assert "could not be noted" in said[1]
    assert str(tmp_path) not in said[1]


# --- the map


def test_the_map_has_every_exercise_and_marks_what_is_passed(file):
    empty = progress.progress()
    assert list(empty.there) == sorted([*CHAPTERS, "21"], key=int)
    assert all(about and names for about, names in empty.there.values())
    assert "■" not in repr(empty)
    pass_first()
    shown = repr(progress.progress()).splitlines()
    assert shown[0].split()[-1].startswith("■□")
    count = sum(len(names) for _, names in empty.there.values())
    assert shown[-1] == f"1 of {count} exercises passed; next: 0.2"
    whole = progress.Progress({name: "" for _, names in empty.there.values() for name in names}, empty.there)
    assert repr(whole).endswith(f"{count} of {count} exercises passed")


def test_an_exercise_that_is_there_no_more_does_not_count(file):
    progress.remember("0.99", passed=True)
    assert repr(progress.progress()).splitlines()[-1].startswith("0 of ")
    assert progress.summary({"anna": {"0.1": "", "0.99": ""}}).splitlines()[-1].startswith("anna: 1 of ")


# --- a class


def learner(path: Path, *names: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"format": progress.FORMAT, "passed": dict.fromkeys(names, "2026-11-29")}))
    return path


def test_merging_a_class(tmp_path, capsys):
    files = [learner(tmp_path / "anna.json", "0.1", "1.1"), learner(tmp_path / "ben.json", "0.1")]
    assert progress.main(["merge", *map(str, files), "--out", str(tmp_path / "class.csv")]) == 0
    said = capsys.readouterr().out
    assert "of 2 learners" in said
    assert "0.1: 2  0.2: 0" in said
    assert "anna: 2 of " in said
    header, anna, ben = (line.split(",") for line in (tmp_path / "class.csv").read_text().splitlines())
    assert header[:2] == ["learner", "0.1"]
    assert (anna[0], anna[header.index("1.1")]) == ("anna", "2026-11-29")
    assert (ben[0], ben[header.index("1.1")]) == ("ben", "")


def test_files_of_one_name_are_told_by_their_folders(tmp_path):
    files = [learner(tmp_path / who / "progress.json", "0.1") for who in ("anna", "ben")]
    assert list(progress.merge(files)) == ["anna/progress", "ben/progress"]
    assert list(progress.merge([files[0], files[0]])) == ["anna/progress", "anna/progress (1)"]


def test_merging_names_the_file_that_is_missing_or_damaged(tmp_path, capsys):
    good, bad = learner(tmp_path / "anna.json", "0.1"), tmp_path / "ben.json"
    assert progress.main(["merge", str(good), str(bad)]) == 1
    assert "ben.json" in capsys.readouterr().err
    bad.write_text("{")
    assert progress.main(["merge", str(good), str(bad), "--out", str(tmp_path / "class.csv")]) == 1
    assert "ben.json is damaged" in capsys.readouterr().err
    assert not (tmp_path / "class.csv").exists()


def test_the_command_prints_the_map(file, capsys):
    assert progress.main([]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith(" 0  start here")
