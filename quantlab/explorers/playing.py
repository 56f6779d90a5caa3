"""What plays with an explorer's controls: the values at which each can stand, "play" and "reset"."""

import asyncio

import ipywidgets as widgets

from quantlab.explorers.data import thinned

PACE = 0.15  # seconds between the steps of "play"
STEPS = 60  # of one round, at most


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
    """The button "play" moves a slider once through its values and back to where it stood.

    It is the slider that was moved last, at first the first one. The button again, or any control, stops it.
    """

    def __init__(self, controls: dict[str, widgets.Widget]):
        sliders = [control for control in controls.values() if not isinstance(control, widgets.Checkbox)]
        self.slider, self.timer, self.values, self.busy = sliders[0], None, [], False
        self.button = _button("play")
        self.button.on_click(lambda _: self.stop() if self.timer else self.play())
        for control in controls.values():
            control.observe(self._moved, names="value")

    def play(self) -> None:
        stops = stops_of(self.slider)
        some = thinned(stops, STEPS, self.slider.value)
        here = some.index(self.slider.value)
        self.values = some[here + 1 :] + some[: here + 1]
        self.button.description = "stop"
        self._step()

    def stop(self) -> None:
        self.timer.cancel()
        self.timer, self.button.description = None, "play"

    def _step(self) -> None:
        self.timer = asyncio.get_running_loop().call_later(PACE, self._step)
        self.busy = True
        self.slider.value = self.values.pop(0)
        self.busy = False
        if not self.values:
            self.stop()

    def _moved(self, change) -> None:
        if self.busy:
            return
        if not isinstance(change.owner, widgets.Checkbox):
            self.slider = change.owner
        if self.timer:
            self.stop()


def _button(text: str) -> widgets.Button:
    return widgets.Button(description=text, layout={"width": "5em"})
