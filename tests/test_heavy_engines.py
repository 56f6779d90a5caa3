"""Engines in environments of their own: how these are made, and what was measured in them."""

import json
import re
from pathlib import Path

import pytest

from quantlab.export.table import OWN, Row, stored_rows
from recipes import engines

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", engines.ENGINES)
def test_the_plan_makes_an_environment_of_pins_then_tests_and_measures_there(name, monkeypatch):
    monkeypatch.setattr(engines, "is_made", lambda _: False)
    of, commands = engines.ENGINES[name], engines.plan(name)
    made, got, tested, measured = commands
    assert made[1:3] == ["-m", "venv"]
    assert made[-1] == str(ROOT / f".venv-{name}")
    assert re.fullmatch(r"[\w-]+==[\d.]+", of.package)
    assert of.package in got
    for pins in ("constraints.txt", of.pins):
        assert got[got.index(pins) - 1] == "-c"
    assert of.tests in tested
    assert measured[1:] == [of.script, "--store"]
    assert all(command[0] == str(engines.python_of(name)) for command in commands[1:])
    assert all((ROOT / file).is_file() for file in (of.pins, of.script, of.tests))
    monkeypatch.setattr(engines, "is_made", lambda _: True)
    assert engines.plan(name) == [tested, measured]


@pytest.mark.parametrize("name", engines.ENGINES)
def test_pins_name_one_version_each_and_do_not_disagree(name):
    def pins(file: str) -> dict:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))

    ours, shared = pins(engines.ENGINES[name].pins), pins("constraints.txt")
    assert ours
    assert not ours.keys() & shared.keys()


def test_an_environment_is_made_again_when_its_pins_change(tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / ".venv-executorch").mkdir()
    for file in ("constraints.txt", engines.ENGINES["executorch"].pins):
        (tmp_path / file).write_text("torch==1.0\n")
    assert not engines.is_made("executorch")
    (tmp_path / ".venv-executorch/complete").write_text(engines.wanted("executorch"))
    assert engines.is_made("executorch")
    (tmp_path / "constraints.txt").write_text("torch==2.0\n")
    assert not engines.is_made("executorch")


def test_a_step_that_fails_is_the_last_and_leaves_no_stamp(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engines, "plan", lambda name: [["make"], ["pip"], ["test"]])
    monkeypatch.setattr(engines, "ROOT", tmp_path)
    monkeypatch.setattr(engines.subprocess, "call", lambda command, **_: command == ["pip"])
    assert engines.main(["executorch"]) == 1
    assert capsys.readouterr().out.split("\n")[:-1] == ["$ make", "$ pip"]
    assert not any(tmp_path.iterdir())
    assert engines.main(["executorch", "plan"]) == 0  # runs nothing
    for wrong in ([], ["tensorflow"], ["executorch", "now"]):
        with pytest.raises(SystemExit):
            engines.main(wrong)


def test_the_environments_are_no_part_of_the_repository():
    assert "/.venv-*/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("engine", "file"), OWN.items())
def test_what_was_measured_says_when_where_and_of_which_versions(engine, file):
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", kept["date"])
    assert kept["processor"]
    pinned = next(of.package for of in engines.ENGINES.values() if engine.split()[0].lower() in of.package)
    package, version = pinned.split("==")
    assert kept["versions"][package] == version
    assert kept["versions"].keys() >= {"torch", "transformers"}
    rows = stored_rows(engine)
    assert rows
    assert all(isinstance(row, Row) and row.nbytes > 0 and 0 <= row.apart < 1 and row.times > 0 for row in rows)
    for row in kept["model"]:
        assert row["engine"] == engine
        assert row["bytes"] > 0
        assert 0 <= row["kl"] < 1
        assert 0.5 < row["top1"] <= 1
        assert row["times"] > 0
    assert f"`{file.name}`" in (file.parent / "README.md").read_text(encoding="utf-8")
