"""Guesses that are noticed: guess = predict(question, choices) · guess.reveal(what came out) · score()

A guess lives in the kernel's memory and nowhere else. Without a kernel, the question and its choices stand as text.
"""

import html
from collections.abc import Sequence

import ipywidgets as widgets
from IPython.display import display

from quantlab.arguments import check_choice, check_list, check_number

_asked: dict[str, "Prediction"] = {}  # by question: asked again, it is the same prediction anew


class Prediction:
    """A question with buttons (words to choose from) or a slider (a number, right if within `near` of the answer)."""

    def __init__(self, question: str, control: widgets.Widget, near: float | None):
        self.question, self.control, self.near, self.moved, self.right = question, control, near, False, None
        control.observe(self._remember, "value")
        self.view = widgets.VBox([widgets.HTML(f"<b>Predict.</b> {html.escape(question)}"), control])

    def _remember(self, _change) -> None:
        self.moved = True

    @property
    def guess(self):
        """What was chosen; None as long as nothing was."""
        return self.control.value if self.moved else None

    def _repr_mimebundle_(self, **options):
        return self.view._repr_mimebundle_(**options) | {"text/plain": repr(self)}

    def __repr__(self) -> str:
        choices = "   ".join(f"( ) {choice}" for choice in getattr(self.control, "options", []))
        return f"Predict. {self.question}\n{choices or f'a number from {self.control.min:g} to {self.control.max:g}'}"

    def reveal(self, answer) -> str:
        """The guess beside what came out, as a line.

        Raises: ValueError if the answer is no choice, or no number where one was asked for.
        """
        if self.near is None:
            check_choice(answer, "answer", self.control.options)
            self.right = self.guess == answer
        else:
            answer = check_number(answer, "answer")
            self.right = self.moved and abs(self.guess - answer) <= self.near
        shown = f"{answer:.4g}" if self.near is not None else answer
        if self.guess is None:
            return f"It came out as: {shown}. (You made no guess.)"
        said = f"{self.guess:.4g}" if self.near is not None else self.guess
        return f"You said: {said}. It came out as: {shown}. {'Right.' if self.right else 'Not what you expected.'}"


def predict(question: str, choices: Sequence, *, near: float | None = None) -> Prediction:
    """Ask before the answer is computed: shows the question with a button for each word of choices.

    With near, choices are the two ends of a slider, and a guess within `near` of the answer is right.

    Returns: the Prediction; its reveal(answer), in the next cell, sets the guess beside what came out.
    Raises: ValueError for fewer than two choices, or choices that are no words (with near: no two numbers, in order).

    >>> guess = predict("What is lost by floor?", ["nothing", "half a step"])
    Predict. What is lost by floor?
    ( ) nothing   ( ) half a step
    >>> guess.reveal("half a step")
    'It came out as: half a step. (You made no guess.)'
    """
    choices = check_list(choices, "choices")
    if len(choices) < 2 or (near is not None and len(choices) != 2):
        raise ValueError(f"choices must be at least two words, or with near two ends; got {choices!r}")
    control = _buttons(choices) if near is None else _slider(*choices, check_number(near, "near", above=0))
    prediction = _asked[question] = Prediction(str(question), control, near)
    display(prediction)
    return prediction


def _buttons(choices: list) -> widgets.ToggleButtons:
    for choice in choices:
        if not isinstance(choice, str):
            raise ValueError(f"choices must be words, got {choice!r}")
    control = widgets.ToggleButtons(options=choices, value=None, description="", tooltips=choices)
    control.style.button_width = "auto"
    return control


def _slider(low, high, near: float) -> widgets.FloatSlider:
    low, high = check_number(low, "choices[0]"), check_number(high, "choices[1]")
    if not low < high:
        raise ValueError(f"choices[0] must be below choices[1], got {low} and {high}")
    return widgets.FloatSlider(value=(low + high) / 2, min=low, max=high, step=(high - low) / 100, description="guess")


def score() -> str:
    """How often the learner was right, of the predictions of this kernel whose answers are known; a line.

    >>> score().startswith(("You made", "No prediction"))
    True
    """
    known = [prediction for prediction in _asked.values() if prediction.right is not None]
    made = [prediction for prediction in known if prediction.moved]
    if not known:
        return "No prediction has been answered yet."
    right = sum(prediction.right for prediction in made)
    return f"You made {len(made)} of {len(known)} predictions, and {right} came out as you said."
