"""Predictions: shown with a kernel and without, compared with what came out, and counted."""

import pytest

from quantlab import predictions
from quantlab.predictions import predict, score

CHOICES = ["nothing", "half a step", "a step"]


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch):
    monkeypatch.setattr(predictions, "_asked", {})


def test_a_guess_is_set_beside_what_came_out():
    guess = predict("What is lost?", CHOICES)
    assert guess.guess is None
    assert guess.reveal("a step") == "It came out as: a step. (You made no guess.)"
    guess.control.value = "nothing"
    assert guess.reveal("a step") == "You said: nothing. It came out as: a step. Not what you expected."
    guess.control.value = "a step"
    assert guess.reveal("a step").endswith("Right.")


def test_a_number_is_right_when_it_is_near():
    guess = predict("How many decibels?", (0, 12), near=0.5)
    assert guess.guess is None
    assert "no guess" in guess.reveal(6.02)
    guess.control.value = 5.6
    assert guess.reveal(6.02) == "You said: 5.6. It came out as: 6.02. Right."
    guess.control.value = 7.2
    assert guess.reveal(6.02).endswith("Not what you expected.")


def test_the_score_counts_what_was_made_and_what_was_right():
    assert score() == "No prediction has been answered yet."
    for question, choice in (("a", "nothing"), ("b", "a step"), ("c", None)):
        guess = predict(question, CHOICES)
        if choice:
            guess.control.value = choice
        guess.reveal("a step")
    assert score() == "You made 2 of 3 predictions, and 1 came out as you said."


def test_asked_again_a_question_counts_once():
    for _ in range(3):
        predict("a", CHOICES).reveal("nothing")
    assert score() == "You made 0 of 1 predictions, and 0 came out as you said."


def test_what_is_shown_without_a_kernel_is_the_question(capsys):
    predict("Is 1 < 2?", ["yes", "no"])
    assert capsys.readouterr().out == "Predict. Is 1 < 2?\n( ) yes   ( ) no\n"
    guess = predict("How much?", (0, 10), near=1)
    bundle = guess._repr_mimebundle_()
    assert bundle["text/plain"] == "Predict. How much?\na number from 0 to 10"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "&lt;" in predict("Is 1 < 2?", ["yes", "no"]).view.children[0].value


@pytest.mark.parametrize(
    ("arguments", "near", "words"),
    [
        (["one"], None, "at least two"),
        ([1, 2], None, "must be words"),
        ("yes", None, "choices must be a list"),
        ((0, 1, 2), 0.5, "two ends"),
        ((2, 1), 0.5, "below"),
        ((0, 1), 0, "near must be above 0"),
    ],
)
def test_bad_questions_are_named(arguments, near, words):
    with pytest.raises(ValueError, match=words):
        predict("?", arguments, near=near)


def test_an_answer_that_is_no_choice_is_named():
    with pytest.raises(ValueError, match="answer must be one of"):
        predict("?", CHOICES).reveal("two steps")
