"""What plays with an explorer's controls: where each can stand, "play", "reset", and what follows once they rest."""

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

import ipywidgets as widgets

from quantlab.explorers.data import thinned

PACE = 0.15  # seconds between the steps of "play"
STEPS = 60  # of one round, at most
REST = 0.4  # seconds without a move after which a control is at rest


def stops_of(control: widgets.Widget) -> list:
    """All values of a control, in their order; where a slider stands between two steps, this value too.

    >>> stops_of(widgets.IntSlider(2, min=1, max=3))
    [1, 2, 3]
    """
    if isinstance(control, widgets.Checkbox):
        return [False, True]
    if hasattr(control, "options"):
        return [option[1] if isinstance(option, tuple) else option for option in control.options]
    count = round((control.max - control.min) / control.step)
    stops = [control.min + i * control.step for i in range(count + 1)]
    if isinstance(control, widgets.FloatSlider):
        stops = [float(round(stop, 9)) for stop in stops]
    return stops if control.value in stops else sorted([*stops, control.value])


def reset_button(controls: dict[str, widgets.Widget]) -> widgets.Button:
    """A button that puts all controls back to where they stand now."""
    start = {name: control.value for name, control in controls.items()}
    button = _button("reset")

    def reset(_button) -> None:
        for name, value in start.items():
            controls[name].value = value

    button.on_click(reset)
    return button


class Player:
    """The button "play" moves a control once through its values and back to where it stood.

    It is the control that was moved last, at first the first one. The button again, or any control, stops it.
    """

    def __init__(self, controls: dict[str, widgets.Widget]):
        played = [control for control in controls.values() if not isinstance(control, widgets.Checkbox)]
        self.played, self.timer, self.busy, self.to_come, self.past = played[0], None, False, [], []
        self.button = _button("play")
        self.button.on_click(lambda _: self.stop() if self.timer else self.play())
        for control in controls.values():
            control.observe(self._moved, names="value")

    def play(self) -> None:
        some = thinned(stops_of(self.played), STEPS, self.played.value)
        here = some.index(self.played.value)
        self.to_come, self.past = some[here + 1 :] + some[: here + 1], []
        self.button.description = "stop"
        self._step()

    def stop(self) -> None:
        self.timer.cancel()
        self.timer, self.button.description = None, "play"

    def _step(self) -> None:
        self.timer = asyncio.get_running_loop().call_later(PACE, self._step)
        self.past.append(self.to_come.pop(0))
        self.busy = True
        try:
            self.played.value = self.past[-1]
        finally:
            self.busy = False
        if not self.to_come:
            self.stop()

    def _moved(self, change) -> None:
        if self.busy or self._is_echo(change):
            return
        if not isinstance(change.owner, widgets.Checkbox):
            self.played = change.owner
        if self.timer:
            self.stop()

    def _is_echo(self, change) -> bool:
        """A browser answers 0.97 with 0.9699999999999999, as if a hand had moved it."""
        if change.owner is not self.played or not isinstance(change.new, float):
            return False
        return any(math.isclose(change.new, value, abs_tol=1e-9) for value in self.past[-3:])


class Rest:
    """Acts once nothing has moved for a while, where a loop runs that can wait, as in a kernel."""

    def __init__(self, act: Callable[[], None]):
        self.act, self.timer = act, None

    def begin(self) -> None:
        """What moved may be at rest from now on."""
        if self.timer:
            self.timer.cancel()
        with suppress(RuntimeError):  # no loop: a script, a test
            self.timer = asyncio.get_running_loop().call_later(REST, self.act)


def _button(text: str) -> widgets.Button:
    return widgets.Button(description=text, layout={"width": "5em"})
