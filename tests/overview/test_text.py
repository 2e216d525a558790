"""An overview in a terminal: it fits, it is what the overview says, and it can be read by people."""

import re
from dataclasses import replace

import pytest
import torch

from austeer.overview.overview import of_momentum, of_plan
from austeer.overview.text import (
    evidence_lines,
    evidence_table,
    layer_lines,
    power_line,
    site_table,
    stability_table,
    summary_lines,
    unit_table,
)
from austeer.plans.evidence import Evidence
from austeer.statistics import DetectableRate
from made_momentum import momentum_of, signal
from small_plans import EVIDENCE, KNOWN, plan_of


@pytest.fixture(scope="module")
def overview():
    return of_momentum(momentum_of(signal(60, 0.4, layers=20, width=200)), "ffn", 40)


def width_of(table):
    """As it is shown: two columns apart."""
    return sum(max(len(row[i]) for row in table) for i in range(len(table[0]))) + 2 * (len(table[0]) - 1)


def test_every_table_fits_a_terminal_of_80_columns(overview):
    for table in (unit_table(overview, 40), stability_table(overview.stability), site_table(overview)):
        assert len({len(row) for row in table}) == 1
        assert width_of(table) <= 80


def test_aus_are_rows(overview):
    table = unit_table(overview, 7)
    assert table[0] == ["rank", "layer", "AU", "beta", "95 %", "delta", "effect", "p", "q"] and len(table) == 8
    unit = overview.units[3]
    assert table[4][:4] == ["3", str(unit.layer), str(unit.index), f"{unit.beta:+.3f}"]
    assert table[4][4] == f"{overview.low[3]:.2f}-{overview.high[3]:.2f}"
    assert float(table[4][7]) == pytest.approx(overview.p[3], rel=0.5)
    plan = unit_table(of_plan(KNOWN, None, 5), 2)
    assert plan[0] == ["rank", "layer", "AU", "beta", "delta"] and len(plan) == 2


@pytest.mark.parametrize("layers, width", [(3, 80), (20, 80), (60, 80), (80, 80), (126, 80), (126, 120), (90, 30)])
def test_the_map_of_layers_fits_and_adds_up(layers, width):
    overview = of_momentum(momentum_of(signal(20, 0.4, layers=layers, width=50)), "ffn", 30)
    lines = layer_lines(overview, width)
    assert len(lines) == len(overview.ranks) + 2 and max(map(len, lines)) <= max(width, 36)
    assert lines[0].split()[:2] == ["layer", "0"]
    cells = [re.search("[·▁-█]+", line)[0] for line in lines[1:]]
    assert len(set(map(len, cells))) == 1 and len(cells[0]) <= layers
    together = -(-layers // len(cells[0]))
    for row, counts in zip(cells, [*overview.by_rank, overview.by_layer]):
        for i, cell in enumerate(row):
            assert (cell == "·") == (sum(counts[together * i : together * (i + 1)]) == 0), "no AU is lost to a shade"
    assert lines[-1].startswith("  top 30 ")


def test_the_summary_tells_what_was_found(overview):
    lines = list(summary_lines(overview))
    found = overview.significance
    below = f"{found.below} .*p <= 0.05.*chance {found.chance:.0f}"
    assert re.search(f"^{found.discoveries} of 4000 AUs .* 5 %.* {below}", lines[0])
    ties = overview.ties
    assert re.search(rf"^{ties.tied} AUs .*\|beta\| = {ties.beta:.3f} .* {ties.inside} of them", lines[1])
    assert lines[2] == power_line(overview.power) and len(lines) == 3
    whole = replace(overview, ties=replace(overview.ties, inside=overview.ties.tied))
    assert len(list(summary_lines(whole))) == 2, "no word of ties where all are in"


def test_power_for_people():
    rates = {0.6: 400, 0.7: 100}
    found = DetectableRate(pairs=60, level=0.0012, power=0.8, rate=0.7345, needed=rates)
    shown = power_line(found)
    assert re.search("^60 pairs .* 73 % .*power 0.8, p <= 1.2e-03.* 60 % takes 400, 70 % takes 100", shown)
    assert re.search("^60 pairs .*no AU", power_line(replace(found, rate=None)))


def test_stability_for_people(overview):
    table = stability_table(overview.stability)
    assert table[0][1:] == ["10", "30", "100", "300", "1000"] and len(table) == 4
    assert "30 and 30 pairs" in table[1][0] and "chance" in table[2][0] and "all pairs" in table[3][0]
    overlap = dict(zip(overview.stability.k, overview.stability.overlap))
    for k, cell in zip(table[0][1:], table[1][1:]):
        assert float(cell.removesuffix(" %")) / 100 == pytest.approx(overlap[int(k)], abs=0.006)
    assert table[2][1:] == ["0.25 %", "0.75 %", "2.5 %", "7.5 %", "25 %"]
    small = of_momentum(momentum_of(signal(20, 0.4, layers=1, width=5)), "ffn", 3)
    assert stability_table(small.stability)[0][1:] == ["1", "2", "3", "4", "5"]


def test_sites_for_people(demo_momentum):
    overview = of_momentum(demo_momentum, "ffn", 10)
    table = site_table(overview)
    assert [row[0] for row in table] == ["site", "attention", "ffn"] and width_of(table) <= 80
    assert table[2][3] == str(overview.significance.discoveries)
    without = of_momentum(replace(demo_momentum, half=None, half_pairs=0), "ffn", 10)
    assert site_table(without)[0] == ["site", "AUs", "|beta|", "pass"]


def test_evidence_for_people():
    table = evidence_table(EVIDENCE)
    assert table[1] == ["2", "+0.5", "", "", "+0.01", "9 pairs"]
    assert table[2] == ["4 *", "+0.9", "+0.6 to +1.2", "100%", "+0.04", "9 pairs"]
    lines = list(evidence_lines(EVIDENCE))
    assert re.search(rf"effect: {EVIDENCE.effect}.*side effect: {EVIDENCE.side_effect}.*\*", lines[0])
    assert re.search(r"\+0.4 % .*-1.2, \+2.1.* fold .*Xeon, 2 cores.*float32, batch 1", lines[1])
    two = plan_of([("ffn", 0, 1), ("attention", 0, 1)])
    spread = replace(EVIDENCE.tested[0], alpha={"ffn": 2.0, "attention": 0.5})
    known = two.with_evidence(Evidence(effect="e", side_effect="s", tested=(spread,)))
    assert evidence_table(known.evidence)[1][0] == "ffn 2, attention 0.5"
    assert list(evidence_lines(Evidence())) == []


def test_small_and_large_p_values():
    overview = of_momentum(momentum_of(torch.cat([torch.ones(30, 1, 1), torch.randn(30, 1, 1)], 2)), "ffn", 2)
    cells = unit_table(overview, 2)
    assert cells[1][7] == "2e-09" and re.fullmatch(r"\d\.\d{3}", cells[2][7])
    assert cells[1][6] == "inf", "a difference that never varies"
