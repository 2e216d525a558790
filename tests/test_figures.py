"""Figures: drawn from real results, and clear errors."""

import pytest

from austeer.errors import AusteerError
from austeer.figures import draw_overview
from austeer.overview import Overview
from austeer.plan import AtomicUnit


@pytest.fixture
def overview():
    units = [AtomicUnit("ffn", 1, 3, 0.9, 0.1), AtomicUnit("ffn", 0, 2, -0.8, -0.1)]
    return Overview("momentum of 10 pairs", "ffn", units, [1, 1, 0], [1.0, 2.0], [0.1, 0.2], ([3, 1], [2.0, 0.5]))


def test_a_figure_is_a_png_or_an_svg_by_its_name(overview, tmp_path):
    draw_overview(overview, tmp_path / "new" / "a.png")
    draw_overview(overview, tmp_path / "a.svg")
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_an_unknown_format_names_the_file(overview, tmp_path):
    with pytest.raises(AusteerError, match=r"a\.xyz"):
        draw_overview(overview, tmp_path / "a.xyz")
