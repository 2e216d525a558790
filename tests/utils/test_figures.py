"""Figures: drawn from real results, and clear errors."""

import numpy as np
import pytest
import torch

from austeer.errors import AusteerError
from austeer.overview.figures import draw_overview
from austeer.overview.overview import of_momentum, of_plan
from made_momentum import momentum_of, signal


@pytest.fixture(scope="module")
def momentum():
    return momentum_of(signal(40, 0.4, layers=6, width=300))


def test_a_figure_is_a_png_or_an_svg_by_its_name(momentum, tmp_path):
    overview = of_momentum(momentum, "ffn", 50)
    draw_overview(overview, tmp_path / "new" / "a.png")
    draw_overview(overview, tmp_path / "a.svg")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize("pairs, layers, width, k", [(1, 1, 3, 3), (2, 1, 1, 1), (200, 90, 10, 7)])
def test_any_momentum_can_be_drawn(pairs, layers, width, k, tmp_path):
    draw_overview(of_momentum(momentum_of(signal(pairs, 0.2, layers=layers, width=width)), None, k), tmp_path / "a.png")
    draw_overview(of_momentum(momentum_of(torch.zeros(4, 2, 3)), "ffn", 2), tmp_path / "a.png")


def test_panels(momentum, tmp_path, monkeypatch):
    """What is drawn is what the overview holds."""
    from austeer.overview import figures as overview_figures

    kept = []
    monkeypatch.setattr(overview_figures, "save_figure", lambda figure, path: kept.append(figure))
    overview = of_momentum(momentum, "ffn", 50)
    draw_overview(overview, tmp_path / "a.png")
    draw_overview(of_plan(momentum.select("ffn", k=50), None, 50), tmp_path / "a.png")
    whole, plan = kept
    beta, layers, stability, ties = whole.axes[:4]
    assert beta.get_yscale() == "log"
    assert [text.get_text() for text in beta.get_legend().get_texts()] == ["measured", "fair coin"]
    shares = np.asarray(layers.images[0].get_array())
    assert shares.shape == (len(overview.ranks), 6) and shares.sum(1) == pytest.approx(100)
    lines = {line.get_label(): line.get_ydata() for line in stability.lines}
    assert list(lines["halves of 20 and 20 pairs"]) == pytest.approx([100 * v for v in overview.stability.overlap])
    assert list(lines["by chance"]) == pytest.approx([100 * v for v in overview.stability.chance])
    heights = [bar.get_height() for bar in ties.patches]
    assert sum(heights) == sum(level[1] for level in overview.levels)
    assert len(plan.axes) == 2 and plan.axes[0].images, "the heat map and its scale"


def test_an_unknown_format_names_the_file(momentum, tmp_path):
    with pytest.raises(AusteerError, match=r"a\.xyz"):
        draw_overview(of_momentum(momentum, "ffn", 50), tmp_path / "a.xyz")
