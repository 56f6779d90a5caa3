"""Each exercise under attack: its solution's mutants are refused or equivalent, every form of a right answer passes,
and each slip that it knows gets its own message."""

import importlib
import time

import pytest
from mutants import mutants, right_forms, survivors

from quantlab import checks
from quantlab.exercises import CHAPTERS
from quantlab.judging import Exercise, edited, judge, slip

FILES = CHAPTERS.values()
EXERCISES = {
    name: exercise
    for file in FILES
    for name, exercise in importlib.import_module(f"quantlab.exercises.{file}").EXERCISES.items()
}
SLOW = 0.25  # seconds of the processor for one judgment, from which on the machine tries thirty mutants, evenly chosen
BY_CASES = [name for name, exercise in EXERCISES.items() if exercise.test is None and callable(exercise.solution)]


@pytest.mark.parametrize("name", BY_CASES)
def test_every_mutant_is_refused_or_equivalent(name):
    exercise = EXERCISES[name]
    began = time.process_time()
    judge(exercise, exercise.solution)
    some = 30 if time.process_time() - began > SLOW else None  # python -m tests.mutants tries all of them
    wrong = [(mutant.what, seen) for mutant, seen in survivors(exercise, some) if seen]
    assert wrong == []


@pytest.mark.parametrize("name", BY_CASES)
def test_every_form_of_the_right_answer_is_accepted(name):
    verdicts = {form: judge(EXERCISES[name], answer) for form, answer in right_forms(EXERCISES[name]).items()}
    assert {form: v for form, v in verdicts.items() if not v.startswith("passed")} == {}


@pytest.mark.parametrize("name", BY_CASES)
def test_each_slip_gets_its_own_message(name):
    exercise = EXERCISES[name]
    for message in exercise.slips:
        verdict = judge(exercise, slip(exercise, message))
        assert verdict.startswith("not yet."), (message, verdict)
        assert message in verdict, (message, verdict)


def double_solution(x, n):
    total = 0
    for _ in range(n):
        total = total + x
    return total


TOY = Exercise("n times", solution=double_solution, cases=lambda random: [(3.5, 4)], seconds=0.5)


def test_the_machine_finds_what_one_case_cannot_tell():
    """With one case an argument written in passes; a second case tells it."""
    passed = {mutant.what for mutant, _ in survivors(TOY)}
    assert "n is always that of the first case" in passed
    more = Exercise("n times", solution=double_solution, cases=lambda random: [(3.5, 4), (0.25, 7)], seconds=0.5)
    passed = {mutant.what for mutant, _ in survivors(more)}
    assert "n is always that of the first case" not in passed
    assert len(list(mutants(more))) > 8


def test_an_edit_that_does_not_occur_is_named():
    with pytest.raises(ValueError, match="no 'floor'"):
        edited(double_solution, ("floor", "round"))


def test_checks_still_find_every_exercise():
    assert all(checks.find(name) is EXERCISES[name] for name in EXERCISES)
