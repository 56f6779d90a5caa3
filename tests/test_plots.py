"""Plots: what the artists hold, not what the pixels show."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from quantlab.plots import pareto_front, plot_bars, plot_curves, plot_pareto


@pytest.fixture
def ax():
    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def test_curves_hold_what_was_given_with_names_and_scales(ax):
    given = {"a": ([1, 2], [3, 4]), "b": ([1, 10], [0.1, 100])}
    assert plot_curves(given, xlabel="bits", ylabel="error", log="y", ax=ax) is ax
    for line, (name, (x, y)) in zip(ax.lines, given.items(), strict=True):
        assert line.get_label() == name
        np.testing.assert_array_equal(line.get_xydata(), np.transpose([x, y]))
    assert len({line.get_color() for line in ax.lines}) == 2
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale(), ax.get_yscale()) == ("bits", "error", "linear", "log")
    assert ax.get_legend() is not None


def test_one_curve_needs_no_legend(ax):
    assert plot_curves({"only": ([1], [1])}, xlabel="", ylabel="", log="xy", ax=ax).get_legend() is None
    assert ax.get_xscale() == "log"


def test_bars_stand_side_by_side_by_place(ax):
    plot_bars({"a": {"x": 1, "y": 2}, "b": {"y": 4, "x": 3}}, ylabel="KL", ax=ax)
    bars = sorted((bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in ax.patches)
    assert [height for _, height in bars] == [1, 3, 2, 4]
    assert [x for x, _ in bars] == pytest.approx([-0.2, 0.2, 0.8, 1.2])
    assert ax.get_yscale() == "linear"


def test_on_a_logarithmic_axis_bars_are_dots(ax):
    plot_bars({"a": {"x": 1, "y": 20}}, ylabel="KL", log=True, color="black", ax=ax)
    assert ax.get_yscale() == "log"
    assert not ax.patches
    assert ax.lines[0].get_ydata().tolist() == [1, 20]


def test_the_places_have_names(ax):
    plot_bars({"a": {"x": 1, "y": 2}}, ylabel="KL", ax=ax)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["x", "y"]


def test_the_front_is_what_nothing_beats():
    random = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(p) for p in random.integers(0, 6, (12, 2)).tolist()]
        beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
        assert pareto_front(points) == sorted(set(points) - beaten)
    assert pareto_front([]) == []


def test_the_pareto_picture_holds_front_points_limit_and_mine(ax):
    points = {"a": (1, 0.5), "b": (2, 0.6), "mine": (3, 0.1)}
    assert plot_pareto(points, xlabel="MB", ylabel="KL", limit=2.5, mine="mine", ax=ax) is ax
    lines = {line.get_label(): line for line in ax.lines}
    assert lines["the best so far"].get_xydata().tolist() == [[1, 0.5], [3, 0.1]]
    assert {name: tuple(lines[name].get_xydata()[0]) for name in points} == points
    assert lines["mine"].get_marker() == "*"
    assert len({lines[name].get_marker() for name in points}) == 3
    assert lines["the budget"].get_xdata()[0] == 2.5
    assert ax.get_yscale() == "log"
