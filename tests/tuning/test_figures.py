"""Figures of searches, and of the causal check: what is written in them can be read."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_rgba

from austeer.causal import figures as causal_figures
from austeer.tuning import figures
from austeer.tuning.held_out import HeldOut, Unsteered
from austeer.tuning.tune import Trial
from austeer.utils.figures import text_color


@pytest.fixture
def drawn(monkeypatch):
    """The figures, laid out and not written."""
    kept = []

    def keep(figure, path):
        figure.draw_without_rendering()
        kept.append(figure)

    for module in (figures, causal_figures):
        monkeypatch.setattr(module, "save_figure", keep)
    return kept


def held_out(effect, operation="shift"):
    return HeldOut(
        **{"name": f"momentum {operation}, attention, 10 AUs", "method": "momentum", "detail": "", "site": "attention"},
        **{"operation": operation, "k": 10, "alpha": 2.0, "layers": 3, "effect": effect, "low": None, "high": None},
        **{"share": 0.5, "accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "p": 0.5, "kl": 0.1, "rise": 0.1},
    )


def contrast(color, ground):
    """Of WCAG 2."""

    def luminance(color):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgba(color)[:3]]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    darker, lighter = sorted([luminance(color), luminance(ground)])
    return (lighter + 0.05) / (darker + 0.05)


def test_text_in_a_heat_map_stands_out_from_its_cell(drawn, tmp_path):
    effects = [-3.0, -2.0, -1.0, -0.001, 0.5, 1.5, 2.5, math.nan, -math.inf]
    trials = [
        Trial("momentum", "", "attention", "shift", k, 0.5, 1.0, 4 + k, effect, None, None, 0.5, 0.1)
        for k, effect in enumerate(effects, 1)
    ]
    result = SimpleNamespace(trials=trials, settings={"sites": ["attention"]}, held_out=[held_out(-0.001)])
    figures.draw_tune(result, tmp_path / "tune.png")
    cells = drawn[0].axes[0]
    (image,) = cells.images
    texts = {text.get_text().splitlines()[0]: text for text in cells.texts}
    assert "+0.00" in texts and len(texts) == len(effects)
    for effect, text in zip(effects, cells.texts):
        red, green, blue, opacity = image.to_rgba(effect)
        ground = [opacity * part + 1 - opacity for part in (red, green, blue)]
        assert contrast(text.get_color(), ground) >= 4.5
        assert (text.get_weight() == "bold") == (text is cells.texts[-1]), "it was judged by the most items"


@pytest.mark.parametrize("ground, color", [("white", "black"), ("#053061", "white"), ((0, 0, 0, 0), "black")])
def test_text_on_a_ground(ground, color):
    assert text_color(ground) == color


@pytest.mark.parametrize("count", [1, 2, 20])
def test_rows_of_a_comparison_are_beside_their_names(count, drawn, tmp_path):
    rows = [held_out(0.1 * i, operation) for i, operation in zip(range(count), ["shift", "push", "scale"] * 7)]
    unsteered = Unsteered(1.0, 0.5, 0.4, 0.6)
    result = SimpleNamespace(held_out=rows, unsteered=unsteered, settings={"max_kl": 0.1})
    figures.draw_compare(result, tmp_path / "compare.png")
    names, accuracy, side_effect = drawn[0].axes
    assert accuracy.get_ylim() == side_effect.get_ylim() == names.get_ylim()
    assert [bar.get_y() + bar.get_height() / 2 for bar in side_effect.patches] == pytest.approx(list(range(count)))
    expect_apart(names.yaxis, vertical=True)


@pytest.mark.parametrize("most", [2e-6, 3e-5, 0.01, 10.0])
def test_labels_of_a_logarithmic_axis_are_apart(most, drawn, tmp_path):
    units = [
        SimpleNamespace(groups=("top", "matched"), beta=0.5, raised={"scale": value}, wanted=lambda way: 0.1)
        for value in (1e-6, most / 2, most)
    ]
    about = {"model": "a-model-of-a-very-long-name/" * 3, "site": "attention", "items": 32, "task": "a task"}
    result = SimpleNamespace(findings={"scale": None}, units=units, **about)
    causal_figures.draw_causal(result, tmp_path / "causal.png")
    below = drawn[0].axes[1]
    assert expect_apart(below.xaxis) >= 2
    title = drawn[0]._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= drawn[0].bbox.width


def expect_apart(axis, vertical=False):
    """No two labels of an axis meet; returns how many it has."""
    first, last = sorted(axis.get_view_interval())
    labels = [tick.label1 for tick in axis.get_major_ticks() if first <= tick.get_loc() <= last]
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    ends = sorted((box.y0, box.y1) if vertical else (box.x0, box.x1) for box in boxes)
    assert all(before[1] < after[0] for before, after in pairwise(ends))
    assert not any(tick.label1.get_text() for tick in axis.get_minor_ticks())
    return len(boxes)
