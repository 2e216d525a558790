"""Evidence: numbers that are numbers, texts of one line, and nothing claimed that was not tried."""

import json
from dataclasses import replace

import numpy as np
import pytest

from austeer import PlanError
from austeer.plans.evidence import LONGEST_TEXT, MOST_ROWS, Evidence, Outcome, Overhead

TRIED = Outcome(4, "48 held-out pairs", 0.9, 0.6, 1.2, 0.75, 0.04)
COST = Overhead(0.4, "Xeon, 2 cores", "fold", "float32, batch 1", -1.2, 2.1)
KNOWN = Evidence("log-odds, nats", "cross-entropy, nats a token", (replace(TRIED, alpha=2), TRIED), 4, (COST,))


def test_json_gives_it_back():
    by_site = replace(KNOWN, tested=(replace(TRIED, alpha={"attention": 8, "ffn": 0.5}),), alpha=None)
    for evidence in (KNOWN, by_site, Evidence(), Evidence(overhead=(COST,))):
        text = json.dumps(evidence.to_json(), allow_nan=False)
        assert Evidence.from_json(json.loads(text)) == evidence


def test_numbers_of_any_kind_become_floats():
    row = Outcome(np.float32(2), "text", np.int64(3), share=1, side_effect=np.float64(0.5))
    assert row == Outcome(2.0, "text", 3.0, share=1.0, side_effect=0.5)
    for number in (row.alpha, row.effect, row.share, row.side_effect):
        assert type(number) is float
    assert type(Evidence("effect", tested=[Outcome(8, "text", 1)], alpha=8).alpha) is float


def test_ranges_of_alpha():
    assert KNOWN.ranges() == {None: (2, 4)} and Evidence().ranges() == {}
    rows = tuple(Outcome({"attention": a, "ffn": 0.5}, "text", 1) for a in (8, -2, 4))
    assert Evidence("effect", tested=rows).ranges() == {"attention": (-2, 8), "ffn": (0.5, 0.5)}


@pytest.mark.parametrize(
    "row, change, message",
    [
        (TRIED, {"alpha": float("nan")}, "alpha.*nan"),
        (TRIED, {"alpha": 10**400}, "alpha.*inf"),
        (TRIED, {"alpha": True}, "alpha.*bool"),
        (TRIED, {"alpha": {}}, "alpha.*site"),
        (TRIED, {"alpha": {7: 8}}, "alpha.*site.*int"),
        (TRIED, {"data": ""}, "data.*''.* 1 to"),
        (TRIED, {"data": "two\nlines"}, r"data.*'two\\nlines'"),
        (TRIED, {"data": "x" * (LONGEST_TEXT + 1)}, f"data.*{LONGEST_TEXT + 1} characters"),
        (TRIED, {"share": 1.01}, "share.*1.01.*0 to 1"),
        (TRIED, {"low": None}, "effect.*None to 1.2"),
        (COST, {"percent": "0.4"}, "percent.*str"),
        (COST, {"device": None}, "device.*NoneType"),
        (KNOWN, {"effect": ""}, "^effect.*''"),
        (KNOWN, {"side_effect": ""}, "side_effect.*''"),
        (KNOWN, {"alpha": 3}, "alpha.* 3.*tested"),
        (KNOWN, {"tested": (COST,)}, "tested.*Outcome"),
        (KNOWN, {"overhead": None}, "overhead.*NoneType.*Overhead"),
        (KNOWN, {"tested": (TRIED,) * (MOST_ROWS + 1)}, f"tested.*{MOST_ROWS + 1} rows.*{MOST_ROWS}"),
    ],
)
def test_what_is_no_evidence(row, change, message):
    with pytest.raises(PlanError, match=message):
        replace(row, **change)
