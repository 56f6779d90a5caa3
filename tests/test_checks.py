"""Every exercise: the solution passes, the stub is "not attempted yet", wrong answers get a message that fits."""

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import quantlab.exercises
from quantlab import checks
from quantlab.exercises import CHAPTERS
from quantlab.lm import load_lm

FILES = CHAPTERS.values()  # in reading order: every xdist worker must collect the same tests in the same order
NAMES = [name for file in FILES for name in importlib.import_module(f"quantlab.exercises.{file}").EXERCISES]
WRONG = {
    name: wrong for file in FILES for name, wrong in importlib.import_module(f"wrong_answers_{file}").WRONG.items()
}


ENGINE = {"20.2": "onnxruntime", "20.4": "onnxruntime"}  # what an exercise cannot be judged without


def skip_without_engine(name):
    if name in ENGINE:
        pytest.importorskip(ENGINE[name], reason=f"{ENGINE[name]} is not here: pip install -e .[deploy]")


def stub(*_args):
    raise NotImplementedError


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_passes(name):
    skip_without_engine(name)
    exercise = checks.find(name)
    assert checks.judge(exercise, exercise.solution).startswith("passed")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("answer", [stub, None, ...], ids=["stub", "None", "dots"])
def test_the_stub_is_not_attempted(name, answer):
    exercise = checks.find(name)
    if answer is stub and not callable(exercise.solution):
        return  # an exercise whose answer is a value has no function to leave as it is
    assert checks.judge(exercise, answer) == "not attempted yet"


@pytest.mark.parametrize("name", NAMES)
def test_wrong_answers_get_a_message_that_fits(name):
    skip_without_engine(name)
    wrong = WRONG[name]
    assert len(wrong) >= 3
    for answer, message in wrong:
        verdict = checks.judge(checks.find(name), answer)
        assert verdict.startswith("not yet."), (answer, verdict)
        assert message in verdict, (message, verdict)


@pytest.mark.parametrize("name", NAMES)
def test_three_hints_that_are_not_the_solution(name, capsys):
    exercise = checks.find(name)
    assert len(exercise.hints) == 3
    assert len(set(exercise.hints)) == 3
    checks.solution(name)
    shown = capsys.readouterr().out
    assert shown.strip()
    assert not any(shown.strip() in hint for hint in exercise.hints)


def test_hints_come_one_after_the_other(capsys, monkeypatch):
    monkeypatch.setattr(checks, "_given", {})
    for _ in range(4):
        checks.hint("1.1")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"1.1 hint {i} of 3" for i in (1, 2, 3, 3)]


def test_check_prints_one_verdict(capsys):
    checks.check("1.1", stub)
    assert capsys.readouterr().out == "1.1 quantize: not attempted yet\n"


def test_an_error_in_the_answer_is_no_traceback():
    def broken(*_args):
        return 1 / 0

    assert "ZeroDivisionError" in checks.judge(checks.find("1.1"), broken)


def endless(*_arguments):
    while True:
        pass


@pytest.mark.parametrize("name", ["8.5", "13.4", "14.5"])
def test_an_endless_answer_is_stopped_where_a_test_judges_as_well(name, monkeypatch):
    exercise = replace(checks.find(name), seconds=0.3)
    monkeypatch.setitem(importlib.import_module(exercise.test.__module__).EXERCISES, name, exercise)
    assert "No answer after 0.3 seconds" in checks.judge(exercise, endless)


def test_every_file_is_a_chapter_and_holds_its_exercises():
    found = {module.name for module in pkgutil.iter_modules(quantlab.exercises.__path__)}
    assert found == {*CHAPTERS.values(), "material"}
    numbers = [int(chapter) for chapter in CHAPTERS]
    assert numbers == sorted(set(numbers))
    notebooks = {path.name[:2] for path in (Path(__file__).parent.parent / "notebooks/src").glob("*.py")}
    assert {f"{number:02d}" for number in numbers} <= notebooks
    for chapter, file in CHAPTERS.items():
        names = importlib.import_module(f"quantlab.exercises.{file}").EXERCISES
        assert list(names) == [f"{chapter}.{i}" for i in range(1, len(names) + 1)]


def test_no_wrong_answer_is_left_over():
    assert list(WRONG) == NAMES


@pytest.mark.parametrize("name", ["1.99", "99.1", "x", "01.1", 1.1])
def test_unknown_exercises_are_named(name):
    with pytest.raises(ValueError, match="no exercise"):
        checks.check(name, None)


def test_a_finding_asserts_on_the_bundled_model_and_tells_on_others(monkeypatch, capsys):
    for name in (None, "", "bundled"):
        monkeypatch.delenv("QUANTLAB_MODEL", raising=False)
        if name is not None:
            monkeypatch.setenv("QUANTLAB_MODEL", name)
        checks.found(True, "so")
        with pytest.raises(AssertionError, match="found on this model: 3 is below 2"):
            checks.found(False, "3 is below 2")
    checks.found(False, "3 s", of="machine")
    monkeypatch.setenv("QUANTLAB_MODEL", "smollm2")
    checks.found(False, "3 is below 2")
    checks.found(True, "so")
    assert capsys.readouterr().out == "Not so on this machine: 3 s\nNot so on this model: 3 is below 2\n"


@pytest.mark.parametrize("chosen", ["bundled", "smollm2"])
def test_a_finding_may_have_another_home_than_the_bundled_model(chosen, monkeypatch, capsys):
    """Which model the workbook runs on does not matter then: `on` says on which one was measured."""
    monkeypatch.setenv("QUANTLAB_MODEL", chosen)
    with pytest.raises(AssertionError, match="found on this model: 3 is below 2"):
        checks.found(False, "3 is below 2", home="smollm2", on="smollm2")
    checks.found(False, "3 is below 2", home="smollm2", on="bundled")
    checks.found(True, "so", home="smollm2", on="smollm2")
    assert capsys.readouterr().out == "Not so on this model: 3 is below 2\n"


def test_a_chapter_that_the_chosen_model_does_not_suit_takes_the_bundled_one(monkeypatch, capsys):
    bundled = sum(p.numel() for p in checks.lm_where(lambda model: None)[0].parameters())
    assert capsys.readouterr().out == ""
    config = LlamaConfig(vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2)  # fmt: skip
    other, tokenizer = LlamaForCausalLM(config), object()

    def load(name="bundled"):
        return (other, tokenizer) if name == "bundled" else load_lm(name)

    monkeypatch.setattr("quantlab.lm.load_lm", load)
    assert checks.lm_where(lambda model: None) == (other, tokenizer)

    def works(model):
        raise ValueError("it has no such norm")

    model, _ = checks.lm_where(works)
    assert sum(p.numel() for p in model.parameters()) == bundled
    assert capsys.readouterr().out == "On the bundled model, since it has no such norm\n"
